"""A simulated device as the NVML functions see it: facts, schedule, faults, counter resets.

Readings that a driver samples (clock, power, processes) show the state just before the instant;
counters are exact at the instant. Reset counters restart from zero, the schedule does not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import uuid
from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.instances import Instance
from flopledger_agent.gpus.simulated.scenario import Gpu, ScenarioProcess
from flopledger_agent.gpus.simulated.schedule import COUNTERS, ENERGY, Schedule

FIRST_PCI_BUS = 0x10
NVIDIA_PCI_VENDOR = 0x10DE


class Device:
    """One GPU behind a handle."""

    def __init__(
        self, position: int, gpu: Gpu, processes: Mapping[str, ScenarioProcess], start_unix_ns: int
    ) -> None:
        self.processes = processes
        self._start_unix_ns = start_unix_ns
        self.position = position  # in the scenario; NVML's index can differ once a device vanished
        self.gpu = gpu
        self.schedule = Schedule(gpu)
        self.first_seen_ns: dict[str, int] = {}  # when each process first holds the device
        for segment in self.schedule.segments:
            for name, _share in segment.phase.owners:
                self.first_seen_ns.setdefault(name, segment.start_ns)
        self.pci_bus = FIRST_PCI_BUS + position
        self.pci_bus_id = f"00000000:{self.pci_bus:02X}:00.0"
        # A handle is the address of real memory, so that a caller who follows it does no harm.
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_void_p))
        self.address = ctypes.addressof(self._memory)
        self.cycle_divisor = self.schedule.cycle_denominator * (
            gpu.sm_count if gpu.cycle_scale == "mean" else 1
        )
        # Subtracted from cumulative cycles until the first reset.
        self.before_start = [-gpu.cycles_offset * self.schedule.cycle_denominator] * len(COUNTERS)
        self.faults: tuple[Fault, ...] = ()
        self.gpm_faults: tuple[Fault, ...] = ()
        self._resets: list[int] = []
        self._at_reset: list[list[int]] = []
        self.instances = tuple(PlacedInstance(self, spec) for spec in gpu.mig.instances)
        for placed in self.instances:
            for name, first_ns in placed.device.first_seen_ns.items():
                self.first_seen_ns[name] = min(first_ns, self.first_seen_ns.get(name, first_ns))
        self.set_faults(gpu.faults)

    def set_faults(self, faults: tuple[Fault, ...]) -> None:
        """Take over a new set of faults (injection replaces the whole tuple at once)."""
        resets = sorted({f.at_ns or 0 for f in faults if f.kind == "counter_reset"})
        self._at_reset = [self.schedule.counters(at_ns) for at_ns in resets]
        self._resets = resets
        self.gpm_faults = tuple(f for f in faults if f.kind in ("nan", "metric_error"))
        self.faults = faults
        for placed in self.instances:
            placed.device.set_faults((*faults, *placed.spec.faults))

    def vanished(self, now_ns: int) -> bool:
        """Whether the device is out of the count now."""
        return any(fault.kind == "vanish" and fault.active(now_ns) for fault in self.faults)

    def counters_at_reset(self, now_ns: int) -> list[int] | None:
        """Counter numerators at the last reset up to now; None when there was none."""
        position = bisect_right(self._resets, now_ns) - 1
        return None if position < 0 else self._at_reset[position]

    def energy_mj(self, now_ns: int) -> int:
        """The energy counter: whole millijoules since the start or the last reset."""
        numerator = self.schedule.counter(ENERGY, now_ns)
        if self._resets:
            at_reset = self.counters_at_reset(now_ns)
            if at_reset is not None:
                numerator -= at_reset[ENERGY]
        if self.instances:
            return int(Fraction(numerator, self.schedule.energy_denominator) + self._added(now_ns))
        return numerator // self.schedule.energy_denominator

    def _added(self, now_ns: int) -> Fraction:
        """Energy that the instances caused since the start or the last reset, exactly."""
        position = bisect_right(self._resets, now_ns) - 1
        since_ns = 0 if position < 0 else self._resets[position]
        return sum((placed.energy_mj(since_ns, now_ns) for placed in self.instances), Fraction(0))

    def power_mw(self, now_ns: int) -> int:
        """Power just before now, in whole milliwatts, of what the energy counter covers."""
        own_mw = self.schedule.segment_before(now_ns).power_mw
        if not self.instances:
            return own_mw
        return own_mw + sum(placed.device.power_mw(now_ns) for placed in self.instances)

    def average_power_mw(self, now_ns: int, window_ns: int) -> int:
        """Mean of `power_mw` over the window before now (or since the start, when later)."""
        start_ns = max(0, now_ns - window_ns)
        if start_ns == now_ns:
            return self.power_mw(now_ns)
        gained = self.schedule.counter(ENERGY, now_ns) - self.schedule.counter(ENERGY, start_ns)
        own_mw = gained * 1_000_000_000 // (self.schedule.energy_denominator * (now_ns - start_ns))
        added = (placed.device.average_power_mw(now_ns, window_ns) for placed in self.instances)
        return own_mw + sum(added)

    def of_gpu_alone_mw(self, power_mw: int) -> int:
        """What the GPU itself draws out of a power that covers its whole module."""
        return max(0, power_mw - self.gpu.other_power_watts * 1000)

    def activity_percent(self, position: int, now_ns: int, window_ns: int) -> int:
        """Share of the window before now in which something was active, in whole percents."""
        start_ns = max(0, now_ns - window_ns)
        if start_ns == now_ns:
            return 0
        gained = self.schedule.counter(position, now_ns) - self.schedule.counter(position, start_ns)
        return 100 * gained // (self.schedule.activity_denominator * (now_ns - start_ns))

    def unix_us(self, now_ns: int) -> int:
        """A scenario instant as NVML stamps it: microseconds since 1970."""
        return (self._start_unix_ns + now_ns) // 1000

    def since_unix_us(self, unix_us: int) -> int:
        """The scenario instant of an NVML stamp, not before the start."""
        return max(0, unix_us * 1000 - self._start_unix_ns)


class PlacedInstance:
    """A GPU instance of a simulated GPU: its own counters, and a handle per compute instance."""

    def __init__(self, parent: Device, spec: Instance) -> None:
        self.spec = spec
        alone = dataclasses.replace(
            parent.gpu,
            sm_count=spec.sm_count,
            phases=spec.phases,
            idle=spec.idle,
            faults=(),
            mig=dataclasses.replace(parent.gpu.mig, from_ns=None, instances=()),
        )
        self.device = Device(parent.position, alone, parent.processes, parent.unix_us(0) * 1000)
        self.handles = tuple(
            MigHandle(parent, self, number) for number in range(spec.compute_instance_count)
        )

    def energy_mj(self, start_ns: int, end_ns: int) -> Fraction:
        """What it caused in [start, end), exactly; no meter of the driver shows it."""
        schedule = self.device.schedule
        gained = schedule.counter(ENERGY, end_ns) - schedule.counter(ENERGY, start_ns)
        return Fraction(gained, schedule.energy_denominator)


class MigHandle:
    """What NVML calls a MIG device: a compute instance in a GPU instance."""

    def __init__(self, parent: Device, instance: PlacedInstance, number: int) -> None:
        self.parent = parent
        self.instance = instance
        self.compute_instance = number
        name = f"{parent.gpu.uuid}/{instance.spec.instance_id}/{number}/{instance.spec.from_ns}"
        self.uuid = f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, name)}"
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(ctypes.c_void_p))
        self.address = ctypes.addressof(self._memory)
