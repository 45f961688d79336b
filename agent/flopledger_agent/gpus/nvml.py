"""The NVIDIA driver through pynvml: the only importer of the binding, and the source built on it.

`Nvml` turns calls into values in our units and the binding's exceptions into `DriverError`.
`NvmlSource` samples every device in a thread of its own, under one deadline, so that a bad field
never loses the device, a bad device never loses the node, and a stuck call never stalls anybody.
A device once seen stays expected: when it is gone, every tick says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import pynvml

from flopledger_agent.gpus.device import UNKNOWN_NAME, DeviceReader, DeviceUnreadable, Request
from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_agent.gpus.node import NodeReader, NodeView
from flopledger_agent.gpus.nvml_errors import FUNCTION_NOT_FOUND, DriverError
from flopledger_agent.gpus.watchdog import Answer, Round, WatchedThread
from flopledger_core.records import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.gpm import Answers
    from flopledger_core.accelerators import AcceleratorTable

P = ParamSpec("P")
R = TypeVar("R")
Handle: TypeAlias = Any  # the binding carries no annotations
GpmSampleBuffer: TypeAlias = Any

KHZ_PER_MHZ: Final = 1000
PCI_DEVICE_SHIFT: Final = 16  # pciDeviceId: device above, vendor below
# Every device of a tick must answer within this real time. A healthy reading takes milliseconds; a
# driver in trouble waits for six seconds per request, which nobody here waits for.
DEADLINE_SECONDS: Final = 0.5
# A driver that cannot be opened is tried after 1, 2, 4, ... ticks, and at least this often.
BACKOFF_TICKS_MAX: Final = 64


def _code(error: Any) -> int:  # noqa: ANN401  (the binding sets the attribute by hand)
    return int(error.value)


def _translated(call: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(call)
    def translated(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return call(*arguments, **named)
        except pynvml.NVMLError as error:
            raise DriverError(_code(error)) from error

    return translated


class GpmQuery:
    """One call for many GPM metrics: the request is built once and filled by the driver."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(ids)
        metrics: Any = self._request.metrics
        for position, metric in enumerate(ids):
            metrics[position].metricId = metric
        # Reading field by field through ctypes costs more than the call: unpack the array at once.
        metric_type = pynvml.c_nvmlGpmMetric_t
        tail = ctypes.sizeof(metric_type) - metric_type.value.offset - struct.calcsize("d")
        self._layout = struct.Struct("=" + f"IId{tail}x" * len(ids))
        self._offset: int = pynvml.c_nvmlGpmMetricsGet_t.metrics.offset

    @_translated
    def answers(self, baseline: GpmSampleBuffer, newest: GpmSampleBuffer) -> Answers:
        """Every metric's return code and value over the two samples. Errors: DriverError."""
        self._request.sample1 = baseline
        self._request.sample2 = newest
        pynvml.nvmlGpmMetricsGet(self._request)
        flat = self._layout.unpack_from(self._request, self._offset)
        return dict(zip(flat[::3], zip(flat[1::3], flat[2::3], strict=True), strict=True))


class Nvml:
    """The driver's calls we use, in our units. Errors of every call: DriverError."""

    @_translated
    def open(self) -> str | None:
        """Load and initialise the library; the driver's version, None when it does not tell."""
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return None

    @_translated
    def shutdown(self) -> None:
        """Let go of the driver."""
        pynvml.nvmlShutdown()

    @_translated
    def count(self) -> int:
        """How many devices the driver sees."""
        return int(pynvml.nvmlDeviceGetCount())

    @_translated
    def handle_by_index(self, index: int) -> Handle:
        """The handle of the device at a position, which may change between boots."""
        return pynvml.nvmlDeviceGetHandleByIndex(index)

    @_translated
    def handle_by_uuid(self, uuid: str) -> Handle:
        """The handle of a device by the name that never changes."""
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)

    @_translated
    def uuid(self, handle: Handle) -> str:
        """GPU-..."""
        return str(pynvml.nvmlDeviceGetUUID(handle))

    @_translated
    def name(self, handle: Handle) -> str:
        """The product name."""
        return str(pynvml.nvmlDeviceGetName(handle))

    @_translated
    def pci_device_id(self, handle: Handle) -> str:
        """Four upper-case hex digits."""
        combined = int(pynvml.nvmlDeviceGetPciInfo_v3(handle).pciDeviceId)
        return f"{combined >> PCI_DEVICE_SHIFT:04X}"

    @_translated
    def compute_capability(self, handle: Handle) -> str:
        """Such as 9.0."""
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return f"{major}.{minor}"

    @_translated
    def core_count(self, handle: Handle) -> int:
        """CUDA cores of the whole device."""
        return int(pynvml.nvmlDeviceGetNumGpuCores(handle))

    @_translated
    def energy_mj(self, handle: Handle) -> int:
        """Millijoules since the driver was loaded."""
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    @_translated
    def power_mw(self, handle: Handle) -> int:
        """Milliwatts; a mean over one second on most devices."""
        return int(pynvml.nvmlDeviceGetPowerUsage(handle))

    @_translated
    def sm_clock_khz(self, handle: Handle) -> int:
        """The SM clock now; NVML says MHz. The mark of an absent value is passed on as it is."""
        megahertz = int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return megahertz if megahertz == 2**32 - 1 else megahertz * KHZ_PER_MHZ

    @_translated
    def max_sm_clock_khz(self, handle: Handle) -> int:
        """The highest SM clock the device can be set to."""
        return int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)) * KHZ_PER_MHZ

    @_translated
    def utilization_percent(self, handle: Handle) -> int:
        """Share of time in which anything ran, over the driver's own last sample period."""
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    def compute_pids(self, handle: Handle) -> tuple[int, ...]:
        """Processes with a compute context, sorted."""
        return self._pids(
            handle,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
        )

    def mps_pids(self, handle: Handle) -> tuple[int, ...]:
        """Processes that compute through an MPS server, sorted."""
        return self._pids(
            handle,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
        )

    @_translated
    def _pids(
        self, handle: Handle, newer: Callable[[Handle], Any], older: Callable[[Handle], Any]
    ) -> tuple[int, ...]:
        try:
            infos = newer(handle)
        except pynvml.NVMLError as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
            infos = older(handle)
        return tuple(sorted({int(info.pid) for info in infos if info.pid}))

    @_translated
    def gpm_supported(self, handle: Handle) -> bool:
        """Whether the device offers GPU performance monitoring."""
        return bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)

    @_translated
    def gpm_allocate(self) -> GpmSampleBuffer:
        """Room for one GPM sample."""
        return pynvml.nvmlGpmSampleAlloc()

    @_translated
    def gpm_free(self, buffer: GpmSampleBuffer) -> None:
        """Give the room back."""
        pynvml.nvmlGpmSampleFree(buffer)

    @_translated
    def gpm_sample(self, handle: Handle, buffer: GpmSampleBuffer) -> None:
        """Freeze the device's counters into `buffer`."""
        pynvml.nvmlGpmSampleGet(handle, buffer)

    def gpm_query(self, ids: tuple[int, ...]) -> GpmQuery:
        """A call for these metrics; ids the driver lacks answer with an error of their own."""
        return GpmQuery(ids)


# --- the source --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, kw_only=True)
class _Slot:
    """A device we expect, its thread and what became of its last sample."""

    device: Device
    thread: WatchedThread[GpuSample | None]
    reader: DeviceReader
    delivered: bool = False
    missing: bool = False
    return_count: int = 0  # each return of a device voids its handle


class NvmlSource:
    """Every GPU of the node through the NVIDIA driver, one sample per tick."""

    def __init__(
        self,
        clock: Clock,
        table: AcceleratorTable,
        *,
        known: Iterable[Device] = (),
        deadline_seconds: float = DEADLINE_SECONDS,
        wait: Callable[[Round, float], None] = Round.wait,
    ) -> None:
        self._clock = clock
        self._table = table
        self._deadline_seconds = deadline_seconds
        self._wait = wait
        self._nvml = Nvml()
        self._node_thread = WatchedThread[NodeView | None]("nvml-node")
        self._node_reader = NodeReader(self._nvml)
        self._slots: dict[str, _Slot] = {}
        for device in known:
            self._expect(device)
        self._view: NodeView | None = None
        self._reopen = False
        self._failure: str | None = None
        self._pause_ticks = 0
        self._backoff_ticks = 1
        self._closed = False

    def sample(self) -> NodeSample:
        """One reading of every device; never raises for a device's sake."""
        boot_ns, unix_ns = self._clock.boottime_ns(), self._clock.wall_unix_ns()
        samples: list[GpuSample] = []
        failures: list[DeviceFailure] = []
        failure = "closed" if self._closed else self._look()
        view = self._view
        if failure is not None or view is None:
            failures = [_failed(slot.device, failure or "timeout") for slot in self._slots.values()]
        else:
            samples, failures, failure = self._read(view)
        return NodeSample(
            boot_ns=boot_ns,
            unix_ns=unix_ns,
            samples=tuple(samples),
            failures=tuple(failures),
            driver=None if view is None or failure is not None else view.driver,
            failure=failure,
        )

    def close(self) -> None:
        """Let go of the driver; calls that hang are left behind and do not delay anything."""
        if self._closed:
            return
        self._closed = True
        together = Round()
        for slot in self._slots.values():
            if not slot.thread.stuck:
                slot.thread.start(slot.reader.release, together)
        self._wait(together, self._deadline_seconds)
        stuck = [slot for slot in self._slots.values() if slot.thread.stuck]
        if not stuck and not self._node_thread.stuck:
            together = Round()
            self._node_thread.start(self._node_reader.close, together)
            self._wait(together, self._deadline_seconds)
        for slot in self._slots.values():
            # What is stuck gives back what it holds if the driver ever answers.
            slot.thread.close(slot.reader.give_back if slot in stuck else None)
        self._node_thread.close()

    # --- the driver ---------------------------------------------------------------------------

    def _look(self) -> str | None:
        """Bring the view of the node up to date; why no device can be sampled, else None."""
        if self._pause_ticks > 0:
            self._pause_ticks -= 1
            return self._failure
        if self._node_thread.stuck:
            # What it knew still holds: only the look for new devices waits.
            return "timeout" if self._view is None else None
        together = Round()
        look = functools.partial(self._node_reader.look, reopen=self._reopen)
        answer = self._node_thread.start(look, together)
        self._reopen = False
        self._wait(together, self._deadline_seconds)
        if not answer.done:
            return "timeout" if self._view is None else None
        view = answer.value
        self._view = view
        if view is None:
            return self._back_off(_reason(answer.error))
        if not view.present and not view.unidentified and not self._slots:
            return "no_devices"
        self._failure = None
        return None

    def _back_off(self, reason: str) -> str:
        self._failure = reason
        self._pause_ticks = self._backoff_ticks - 1
        self._backoff_ticks = min(2 * self._backoff_ticks, BACKOFF_TICKS_MAX)
        return reason

    # --- the devices --------------------------------------------------------------------------

    def _expect(self, device: Device) -> _Slot:
        slot = self._slots.get(device.key)
        if slot is None:
            slot = self._slots[device.key] = _Slot(
                device=device,
                thread=WatchedThread(f"nvml-{device.key}"),
                reader=DeviceReader(self._nvml, self._clock, self._table, device.uuid),
            )
        return slot

    def _read(self, view: NodeView) -> tuple[list[GpuSample], list[DeviceFailure], str | None]:
        answers: dict[str, Answer[GpuSample | None]] = {}
        together = Round()
        for device in view.present:
            slot = self._expect(device)
            if slot.device.name == UNKNOWN_NAME:
                slot.device = device
            if slot.missing:
                slot.missing, slot.return_count = False, slot.return_count + 1
            if not slot.thread.stuck:
                request = Request(
                    generation=view.generation,
                    return_count=slot.return_count,
                    delivered=slot.delivered,
                )
                read = functools.partial(slot.reader.read, request)
                answers[device.key] = slot.thread.start(read, together)
        self._wait(together, self._deadline_seconds)
        samples: list[GpuSample] = []
        failures: list[DeviceFailure] = []
        lost_driver: list[str] = []
        for device in view.present:
            slot, answer = self._slots[device.key], answers.get(device.key)
            slot.delivered = False
            if answer is None or not answer.done:
                failures.append(_failed(slot.device, "timeout"))
            elif answer.value is None:
                failures.append(_failed(slot.device, _reason(answer.error)))
                if isinstance(answer.error, DeviceUnreadable) and answer.error.scope == "node":
                    lost_driver.append(answer.error.reason)
            else:
                slot.delivered = True
                slot.device = answer.value.device
                samples.append(answer.value)
        failures += self._missing(view)
        if lost_driver and len(lost_driver) == len(view.present):
            self._reopen = True
            self._view = None
            return [], failures, self._back_off(lost_driver[0])
        self._backoff_ticks = 1
        return samples, failures, None

    def _missing(self, view: NodeView) -> list[DeviceFailure]:
        """Expected devices that are not in the count, and devices that do not say who they are."""
        present = {device.key for device in view.present}
        gone: list[Device] = []
        for key, slot in self._slots.items():
            if key not in present:
                slot.missing = True
                gone.append(slot.device)
        nameless = list(view.unidentified)
        failures: list[DeviceFailure] = []
        for device in gone:
            # As many nameless devices as missing ones, or more: these are they.
            if len(nameless) >= len(gone) - len(failures):
                failures.append(_failed(device, nameless.pop(0)[1]))
            else:
                failures.append(_failed(device, "device_missing"))
        failures += [
            _failed(Device(uuid=f"unidentified-{index}", name="unknown"), reason)
            for index, reason in nameless
        ]
        return failures


def _failed(device: Device, reason: str) -> DeviceFailure:
    return DeviceFailure(device=device, reason=reason)


def _reason(error: BaseException | None) -> str:
    if isinstance(error, DeviceUnreadable):
        return error.reason
    if isinstance(error, DriverError):
        return error.meaning.reason
    return "unexpected_error"
