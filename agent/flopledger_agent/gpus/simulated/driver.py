"""The simulated driver: installed in pynvml's place of the library, asked for the truth by tests.

    with install(load_scenario(path), clock) as driver:
        ...any pynvml program...
        driver.truth(clock.boottime_ns())

One driver at a time, because pynvml holds one library. Uninstalling restores pynvml's state and
lets hanging calls return. Scenario time starts at install, or at the scenario's `start_boottime_ns`
on the clock, so that an agent killed and started again finds its counters where they would be.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import TracebackType
from typing import Protocol, Self

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.faults import Fault, FaultGate
from flopledger_agent.gpus.simulated.functions.events import SimulatedEventSet
from flopledger_agent.gpus.simulated.functions.gpm import Sample
from flopledger_agent.gpus.simulated.library import SimulatedLibrary
from flopledger_agent.gpus.simulated.scenario import Scenario, ScenarioProcess
from flopledger_agent.gpus.simulated.truth import Truth, gpu_truth, with_instances
from flopledger_core.errors import InvalidInput


class Clock(Protocol):
    """The time the driver lives in; every clock of the agent is one."""

    def boottime_ns(self) -> int:
        """Nanoseconds since boot; never steps."""
        ...

    def wall_unix_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedProcess:
    """A process as an operating system would tell; `real` ones must be asked of the real one."""

    name: str
    pid: int
    create_time_unix_ns: int
    user: str
    command: str
    parent_pid: int
    environ: dict[str, str]
    real: bool


class SimulatedDriver:
    """Devices, faults and truth of one scenario under one clock."""

    def __init__(self, scenario: Scenario, clock: Clock) -> None:
        self.scenario = scenario
        self._clock = clock
        boottime_ns = clock.boottime_ns()
        start_ns = scenario.start_boottime_ns
        self.start_boottime_ns = boottime_ns if start_ns is None else start_ns
        self.start_unix_ns = clock.wall_unix_ns() - (boottime_ns - self.start_boottime_ns)
        self.devices = tuple(
            Device(position, gpu, scenario.processes, self.start_unix_ns)
            for position, gpu in enumerate(scenario.gpus)
        )
        self.device_by_address = {device.address: device for device in self.devices}
        self.mig_by_address = {
            handle.address: handle
            for device in self.devices
            for placed in device.instances
            for handle in placed.handles
        }
        self.faults = scenario.faults
        self.gpm_samples: dict[int, Sample] = {}
        self.event_sets: dict[int, SimulatedEventSet] = {}
        self.initialised = 0
        self._gate = FaultGate(self.now_ns)
        self._processes = {p.pid: self._process(p) for p in scenario.processes.values()}
        self._replaced: object | None = None
        self._replaced_refcount = 0
        self._installed = False

    def now_ns(self) -> int:
        """Nanoseconds since the scenario's start; 0 before it."""
        return max(0, self._clock.boottime_ns() - self.start_boottime_ns)

    # --- pynvml -------------------------------------------------------------------------------

    def install(self) -> SimulatedDriver:
        """Take the place of pynvml's library. Errors: InvalidInput when another one is there."""
        if isinstance(pynvml.nvmlLib, SimulatedLibrary):
            raise InvalidInput("simulated driver", "installed", "uninstall the other one first")
        self._replaced = pynvml.nvmlLib
        self._replaced_refcount = pynvml._nvmlLib_refcount  # noqa: SLF001  (restored by uninstall)
        _swap_library(SimulatedLibrary(self), 0)
        self._installed = True
        return self

    def uninstall(self) -> None:
        """Give pynvml its former library back and let every hanging call return."""
        self._gate.close()
        if self._installed:
            self._installed = False
            _swap_library(self._replaced, self._replaced_refcount)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.uninstall()

    # --- what the NVML functions ask ----------------------------------------------------------

    def visible_devices(self) -> list[Device]:
        """The devices in the count now, in NVML's order."""
        now_ns = self.now_ns()
        return [d for d in self.devices if not (d.faults and d.vanished(now_ns))]

    def fault_code(self, name: str, faults: tuple[Fault, ...], *, named_only: bool = False) -> int:
        """The code a fault gives to a call of `name` now, or success; blocks while it hangs."""
        if named_only:
            faults = tuple(fault for fault in faults if fault.functions is not None)
        return self._gate.check(name, faults, self.now_ns()) if faults else 0

    # --- faults at run time -------------------------------------------------------------------

    def inject(self, fault: Fault, gpu: int | None = None) -> Fault:
        """Add a fault to one GPU (by its scenario position), or to all; returns it with its time.

        `at_ns` None means now. Faults of calls without a device: see `inject_system`.
        """
        placed = self._placed(fault)
        targets = self.devices if gpu is None else (self.devices[gpu],)
        for device in targets:
            device.set_faults((*device.faults, placed))
        return placed

    def inject_system(self, fault: Fault) -> Fault:
        """Add a fault to the calls without a device, such as nvmlInitWithFlags."""
        placed = self._placed(fault)
        self.faults = (*self.faults, placed)
        return placed

    def clear_faults(self) -> None:
        """Take all faults away, scripted and injected; hanging calls go on. Resets stay resets."""
        self.release_hangs()
        for device in self.devices:
            device.set_faults(tuple(f for f in device.faults if f.kind == "counter_reset"))
        self.faults = ()

    def release_hangs(self) -> None:
        """End the hangs that are active now: blocked calls go on, later calls do not block."""
        self._gate.release((*self.faults, *itertools.chain(*(d.faults for d in self.devices))))

    def hanging_calls(self) -> int:
        """How many calls are blocked at this moment."""
        return self._gate.hanging

    def _placed(self, fault: Fault) -> Fault:
        return dataclasses.replace(fault, at_ns=self.now_ns()) if fault.at_ns is None else fault

    # --- the truth ----------------------------------------------------------------------------

    def truth(self, until_ns: int) -> Truth:
        """Exact integrals from the scenario's start to `until_ns` on the clock (boot time)."""
        return self.truth_between(self.start_boottime_ns, until_ns)

    def truth_between(self, start_ns: int, end_ns: int) -> Truth:
        """Exact integrals over [start, end) on the clock. Errors: InvalidInput (order)."""
        if not self.start_boottime_ns <= start_ns <= end_ns:
            remedy = f"give {self.start_boottime_ns} <= start <= end (boot time of the clock)"
            raise InvalidInput("truth window", (start_ns, end_ns), remedy)
        first, last = start_ns - self.start_boottime_ns, end_ns - self.start_boottime_ns
        gpus = tuple(
            with_instances(
                gpu_truth(device.position, device.gpu, device.schedule, first, last),
                device,
                first,
                last,
            )
            for device in self.devices
        )
        return Truth(start_ns=start_ns, end_ns=end_ns, gpus=gpus)

    # --- processes ----------------------------------------------------------------------------

    def processes(self) -> tuple[SimulatedProcess, ...]:
        """Every process of the scenario, also those not on a GPU now."""
        return tuple(self._processes.values())

    def process(self, pid: int) -> SimulatedProcess | None:
        """The process with this pid, or None when the scenario has none."""
        return self._processes.get(pid)

    def _process(self, process: ScenarioProcess) -> SimulatedProcess:
        created = process.create_time_unix_ns
        if created is None:
            seen = (device.first_seen_ns.get(process.name) for device in self.devices)
            created = self.start_unix_ns + min((at for at in seen if at is not None), default=0)
        return SimulatedProcess(
            name=process.name,
            pid=process.pid,
            create_time_unix_ns=created,
            user=process.user,
            command=process.command,
            parent_pid=process.parent_pid,
            environ=dict(process.environ),
            real=process.real,
        )


def _swap_library(library: object | None, refcount: int) -> None:
    with pynvml.libLoadLock:
        pynvml.nvmlLib = library
        pynvml._nvmlLib_refcount = refcount  # noqa: SLF001  (pynvml offers no way in)
        pynvml._nvmlGetFunctionPointer_cache.clear()  # noqa: SLF001  (it holds the old library's)


def install(scenario: Scenario, clock: Clock) -> SimulatedDriver:
    """Make the driver of a scenario and install it; use as a context manager or uninstall()."""
    return SimulatedDriver(scenario, clock).install()
