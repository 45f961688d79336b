"""XID errors: the driver's own reports of what went wrong on a GPU, collected without waiting.

The node's thread registers each device and asks for reports at every tick; the source hands them
out with the device's next reading or failure, each once. Where a device or driver offers no
reports the samples say so under `xids`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.nvml_errors import DriverError

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
    from flopledger_agent.gpus.nvml import EventSet, Handle, Nvml
    from flopledger_core.records import Device

# Reports taken per tick; a GPU in trouble can repeat itself endlessly, and the rest comes later.
REPORTS_PER_TICK_MAX: Final = 64
# Reports kept for devices that are not read; the oldest go first.
REPORTS_KEPT_MAX: Final = 1024


class XidReport(msgspec.Struct, frozen=True, kw_only=True):
    """One error. `gpu_instance` None: of the whole GPU."""

    uuid: str
    gpu_instance: int | None
    xid_code: int


class XidWatch:
    """Registers devices and collects their reports. Only `attach` is called by another thread."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._set: EventSet | None = None
        self._uuids: dict[int, str] = {}  # by handle
        self._reasons: dict[str, str | None] = {}  # by UUID; why there are no reports, or None
        self._reports: deque[XidReport] = deque(maxlen=REPORTS_KEPT_MAX)

    def register(self, uuid: str, handle: Handle) -> None:
        """Ask for the reports of a device that was found (again)."""
        try:
            if self._set is None:
                self._set = self._nvml.event_set()
            self._nvml.register_xids(handle, self._set)
        except DriverError as error:
            self._reasons[uuid] = error.meaning.reason
        else:
            self._reasons[uuid] = None
            self._uuids[self._nvml.handle_key(handle)] = uuid

    def poll(self) -> None:
        """Take what was reported since last time; an error here is no device's failure."""
        if self._set is None:
            return
        try:
            for _ in range(REPORTS_PER_TICK_MAX):
                report = self._nvml.next_xid(self._set)
                if report is None:
                    return
                key, xid, gpu_instance = report
                uuid = self._uuids.get(key)
                if uuid is not None:
                    self._reports.append(
                        XidReport(uuid=uuid, gpu_instance=gpu_instance, xid_code=xid)
                    )
        except DriverError:
            return  # a lost GPU among the registered ones; the others' reports stay queued

    def close(self) -> None:
        """Give the registrations back, before the driver is shut down."""
        events, self._set = self._set, None
        self._uuids, self._reasons = {}, {}
        if events is not None:
            try:
                self._nvml.free_events(events)
            except DriverError:
                return  # it went with the driver

    def attach(self, node: NodeSample) -> NodeSample:
        """The tick with every report at its device, and the reason where there are none."""
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        reasons = self._reasons
        if not reports and not any(reasons.values()):
            return node
        devices = [sample.device for sample in node.samples]
        devices += [failure.device for failure in node.failures]
        present = {device.uuid for device in devices}
        self._reports.extend(report for report in reports if report.uuid not in present)
        return msgspec.structs.replace(
            node,
            samples=tuple(_sample(item, reports, reasons) for item in node.samples),
            failures=tuple(_failure(item, reports) for item in node.failures),
        )


def _xids(device: Device, reports: list[XidReport]) -> tuple[int, ...]:
    """Those of the part, and those of the whole GPU for each of its parts."""
    return tuple(
        report.xid_code
        for report in reports
        if report.uuid == device.uuid and report.gpu_instance in (None, device.gpu_instance)
    )


def _sample(
    sample: GpuSample, reports: list[XidReport], reasons: dict[str, str | None]
) -> GpuSample:
    xids = _xids(sample.device, reports)
    reason = reasons.get(sample.device.uuid)
    if not xids and reason is None:
        return sample
    absent = sample.absent if reason is None else {**sample.absent, "xids": reason}
    return msgspec.structs.replace(sample, xids=xids, absent=absent)


def _failure(failure: DeviceFailure, reports: list[XidReport]) -> DeviceFailure:
    xids = _xids(failure.device, reports)
    return msgspec.structs.replace(failure, xids=xids) if xids else failure
