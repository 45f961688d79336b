"""The node's GPUs through the driver, in this process: one sample of every device per tick.

`NvmlSource` samples every device in a thread of its own, under one deadline, so that a bad field
never loses the device, a bad device never loses the node, and a stuck call never stalls anybody.
A device once seen stays expected: when it is gone, every tick says so.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final

from flopledger_agent.gpus.device import UNKNOWN_NAME, DeviceReader, DeviceUnreadable, Request
from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_agent.gpus.node import NodeReader, NodeView
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.nvml_errors import DriverError
from flopledger_agent.gpus.watchdog import Answer, Round, WatchedThread
from flopledger_core.records import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.clocks import Clock
    from flopledger_core.accelerators import AcceleratorTable

# Every device of a tick must answer within this real time. A healthy reading takes milliseconds; a
# driver in trouble waits for six seconds per request, which nobody here waits for.
DEADLINE_SECONDS: Final = 0.5
# A driver that cannot be opened is tried after 1, 2, 4, ... ticks, and at least this often.
BACKOFF_TICKS_MAX: Final = 64


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
