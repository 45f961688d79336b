"""The node's GPUs through the driver, in this process: one sample of every device per tick.

`NvmlSource` samples every device in a thread of its own, under one deadline, so that a bad field
never loses the device, a bad device never loses the node, and a stuck call never stalls anybody.
A device once seen stays expected: when it is gone, every tick says so.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from flopledger_agent.gpus.device import UNKNOWN_NAME, DeviceReader, DeviceUnreadable, Request
from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_agent.gpus.node import NodeReader, NodeView
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.nvml_errors import DriverError
from flopledger_agent.gpus.selection import EVERYTHING, Selection
from flopledger_agent.gpus.watchdog import Answer, Round, WatchedThread
from flopledger_core.records import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.gpm import Scale
    from flopledger_agent.gpus.node import Survey
    from flopledger_core.accelerators import AcceleratorTable

# Every device of a tick must answer within this real time. A healthy reading takes milliseconds; a
# driver in trouble waits for six seconds per request, which nobody here waits for.
DEADLINE_SECONDS: Final = 0.5
# A driver that cannot be opened is tried after 1, 2, 4, ... ticks, and at least this often.
BACKOFF_TICKS_MAX: Final = 64


@dataclasses.dataclass(slots=True, kw_only=True)
class _Slot:
    """A GPU we expect, its thread and what became of its last reading."""

    device: Device
    parts: tuple[Device, ...]  # as last read: the GPU, or the parts it is divided into
    thread: WatchedThread[tuple[GpuSample, ...] | None]
    reader: DeviceReader
    delivered: bool = False
    missing: bool = False
    return_count: int = 0  # each return of a device voids its handle

    def take_over(self, samples: tuple[GpuSample, ...]) -> list[str]:
        """What the GPU now consists of; returns the keys of parts that ended with it."""
        parts = tuple(sample.device for sample in samples)
        keys = {part.key for part in parts}
        ended = [part.key for part in self.parts if part.key not in keys]
        self.parts = parts
        if len(parts) == 1 and parts[0].slices is None:
            self.device = parts[0]
        return ended


_Tick: TypeAlias = tuple[list[GpuSample], list[DeviceFailure], list[str], str | None]
"""Samples, failures, retired keys, and why no device could be sampled."""


class NvmlSource:
    """Every GPU of the node through the NVIDIA driver, one sample per tick."""

    def __init__(  # noqa: PLR0913 (one collaborator an argument, named at the call)
        self,
        clock: Clock,
        table: AcceleratorTable,
        *,
        known: Iterable[Device] = (),
        deadline_seconds: float = DEADLINE_SECONDS,
        wait: Callable[[Round, float], None] = Round.wait,
        selection: Selection = EVERYTHING,
        scales: Mapping[str, Scale] | None = None,
        scales_of_driver: str | None = None,
    ) -> None:
        """`scales` were found out by an earlier source, on a driver of the version named."""
        self._clock = clock
        self._table = table
        self._deadline_seconds = deadline_seconds
        self._wait = wait
        self._nvml = Nvml()
        self._node_thread = WatchedThread[NodeView | None]("nvml-node")
        self._node_reader = NodeReader(self._nvml, selection)
        self._first_scales: dict[str, Scale] = dict(scales or {})  # of devices not expected yet
        self._scales_of_driver = scales_of_driver
        self._slots: dict[str, _Slot] = {}
        for device in known:
            slot = self._expect(device)
            if device not in slot.parts:
                slot.parts = (*slot.parts, device)
        self._view: NodeView | None = None
        self._reopen = False
        self._failure: str | None = None
        self._pause_ticks = 0
        self._backoff_ticks = 1
        self._closed = False
        self._paused = False

    def sample(self) -> NodeSample:
        """One reading of every device; never raises for a device's sake."""
        boot_ns, unix_ns = self._clock.boottime_ns(), self._clock.wall_unix_ns()
        samples: list[GpuSample] = []
        failures: list[DeviceFailure] = []
        retired: list[str] = []
        if self._closed or self._paused:
            failure: str | None = "closed" if self._closed else "paused"
        else:
            failure = self._look()
        view = self._view
        if failure is not None or view is None:
            for slot in self._slots.values():
                failures += _failed(slot, failure or "timeout")
        else:
            samples, failures, retired, failure = self._read(view)
        tick = NodeSample(
            boot_ns=boot_ns,
            unix_ns=unix_ns,
            samples=tuple(samples),
            failures=tuple(failures),
            driver=None if view is None or failure is not None else view.driver,
            failure=failure,
            retired=tuple(retired),
        )
        return self._node_reader.xids.attach(tick)

    def withdraw(self) -> None:
        """The last sample did not reach its consumer: means do not begin at it."""
        for slot in self._slots.values():
            slot.delivered = False

    def survey(self) -> Survey:
        """Where the devices are in the driver's list."""
        return self._node_reader.survey()

    def scales(self) -> dict[str, Scale]:
        """The known scales of cycle counters, by GPU or part, for a source that takes over."""
        scales: dict[str, Scale] = {}
        for slot in self._slots.values():
            scales |= slot.reader.scales()
        return scales

    def pause(self) -> None:
        """Let go of the driver until `resume`; what hangs in it is left behind."""
        if not self._paused and not self._closed:
            self._paused = True
            self._let_go()

    def resume(self) -> None:
        """Open the driver again at the next sample."""
        if self._paused:
            self._paused = False
            self._reopen = True
            self._pause_ticks, self._backoff_ticks = 0, 1

    def close(self) -> None:
        """Let go of the driver; calls that hang are left behind and do not delay anything."""
        if self._closed:
            return
        self._closed = True
        stuck = self._let_go()
        for slot in self._slots.values():
            # What is stuck gives back what it holds if the driver ever answers.
            slot.thread.close(slot.reader.give_back if slot in stuck else None)
        self._node_thread.close()

    def _let_go(self) -> list[_Slot]:
        """Give back what the driver allocated and shut it down; the slots that are stuck in it."""
        self._view = None
        together = Round()
        for slot in self._slots.values():
            slot.delivered = False
            if not slot.thread.stuck:
                slot.thread.start(slot.reader.give_back, together)
        self._wait(together, self._deadline_seconds)
        stuck = [slot for slot in self._slots.values() if slot.thread.stuck]
        if not stuck and not self._node_thread.stuck:
            together = Round()
            self._node_thread.start(self._node_reader.close, together)
            self._wait(together, self._deadline_seconds)
        return stuck

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
        if self._first_scales and view.driver != self._scales_of_driver:
            # Another driver may count otherwise. A stuck reader forgets by itself, at its next.
            self._first_scales = {}
            for slot in self._slots.values():
                if not slot.thread.stuck:
                    slot.reader.forget_scales()
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
        """The slot of a device's GPU; further parts of it are expected with it."""
        slot = self._slots.get(device.uuid)
        if slot is None:
            whole = msgspec.structs.replace(device, gpu_instance=None, slices=None)
            slot = self._slots[device.uuid] = _Slot(
                device=whole,
                parts=(device,),
                thread=WatchedThread(f"nvml-{device.uuid}"),
                reader=DeviceReader(
                    self._nvml, self._clock, self._table, device.uuid, self._first_scales
                ),
            )
        return slot

    def _read(self, view: NodeView) -> _Tick:
        answers: dict[str, Answer[tuple[GpuSample, ...] | None]] = {}
        together = Round()
        for device in view.present:
            slot = self._expect(device)
            if slot.device.name == UNKNOWN_NAME:
                if slot.parts == (slot.device,):
                    slot.parts = (device,)
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
                answers[device.uuid] = slot.thread.start(read, together)
        self._wait(together, self._deadline_seconds)
        samples: list[GpuSample] = []
        failures: list[DeviceFailure] = []
        retired: list[str] = []
        lost_driver: list[str] = []
        for device in view.present:
            slot, answer = self._slots[device.uuid], answers.get(device.uuid)
            slot.delivered = False
            if answer is None or not answer.done:
                failures += _failed(slot, "timeout")
            elif answer.value is None:
                failures += _failed(slot, _reason(answer.error))
                if isinstance(answer.error, DeviceUnreadable) and answer.error.scope == "node":
                    lost_driver.append(answer.error.reason)
            else:
                slot.delivered = True
                retired += slot.take_over(answer.value)
                samples += answer.value
        failures += self._missing(view)
        if lost_driver and len(lost_driver) == len(view.present):
            self._reopen = True
            self._view = None
            return [], failures, [], self._back_off(lost_driver[0])
        self._backoff_ticks = 1
        return samples, failures, retired, None

    def _missing(self, view: NodeView) -> list[DeviceFailure]:
        """Expected devices that are not in the count, and devices that do not say who they are."""
        present = {device.uuid for device in view.present}
        gone: list[_Slot] = []
        for uuid, slot in self._slots.items():
            if uuid not in present:
                slot.missing = True
                gone.append(slot)
        nameless = list(view.unidentified)
        failures: list[DeviceFailure] = []
        for number, slot in enumerate(gone):
            # As many nameless devices as missing ones, or more: these are they.
            if len(nameless) >= len(gone) - number:
                failures += _failed(slot, nameless.pop(0)[1])
            else:
                failures += _failed(slot, "device_missing")
        failures += [
            DeviceFailure(
                device=Device(uuid=f"unidentified-{index}", name="unknown"), reason=reason
            )
            for index, reason in nameless
        ]
        return failures


def _failed(slot: _Slot, reason: str) -> list[DeviceFailure]:
    """A failure of every part of a GPU: they are read together or not at all."""
    return [DeviceFailure(device=part, reason=reason) for part in slot.parts]


def _reason(error: BaseException | None) -> str:
    if isinstance(error, DeviceUnreadable):
        return error.reason
    if isinstance(error, DriverError):
        return error.meaning.reason
    return "unexpected_error"
