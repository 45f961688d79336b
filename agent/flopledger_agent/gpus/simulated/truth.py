"""What really happened: exact integrals per GPU and per process, to hold metered numbers against.

Owners of a GPU sum exactly to the GPU; time in which no process holds it belongs to the owner None
(idle). Nothing here is ever rounded, and faults (also counter resets) do not touch it. Sums run
over phases, apart from the prefix sums that serve the driver's counters; a property test holds
both against plain Fractions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from flopledger_agent.gpus.simulated.scenario import Gpu
from flopledger_agent.gpus.simulated.schedule import ELAPSED, ENERGY, POSITIONS, Schedule
from flopledger_core.records import PIPES

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.devices import Device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Integrals:
    """Exact amounts: SM-cycles, millijoules, and nanoseconds of GPU time (shares of a device)."""

    gpu_time_ns: Fraction
    elapsed_cycles: Fraction
    sm_active_cycles: Fraction
    active_cycles: Mapping[str, Fraction]  # by pipe
    energy_mj: Fraction

    def __add__(self, other: Integrals) -> Integrals:
        return Integrals(
            gpu_time_ns=self.gpu_time_ns + other.gpu_time_ns,
            elapsed_cycles=self.elapsed_cycles + other.elapsed_cycles,
            sm_active_cycles=self.sm_active_cycles + other.sm_active_cycles,
            active_cycles={
                pipe: cycles + other.active_cycles[pipe]
                for pipe, cycles in self.active_cycles.items()
            },
            energy_mj=self.energy_mj + other.energy_mj,
        )


IDLE: Final = ((None, Fraction(1)),)
NOTHING: Final = Integrals(
    gpu_time_ns=Fraction(0),
    elapsed_cycles=Fraction(0),
    sm_active_cycles=Fraction(0),
    active_cycles=dict.fromkeys(PIPES, Fraction(0)),
    energy_mj=Fraction(0),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstanceTruth:
    """One GPU instance while it existed, whole and by owner; no energy meter shows its energy.

    `gpu_time_ns` is its own time: of the GPU's time it holds its part in slices.
    """

    instance_id: int
    from_ns: int  # since the scenario's start; tells apart instances that followed each other
    whole: Integrals
    owners: Mapping[str | None, Integrals]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuTruth:
    """One GPU's amounts, whole and by owner (a process name; None is idle).

    While MIG is on its cycles are those of `instances` and its energy contains theirs.
    """

    index: int
    uuid: str
    whole: Integrals
    owners: Mapping[str | None, Integrals]
    instances: tuple[InstanceTruth, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """All GPUs over [start, end), in nanoseconds of the driver's clock (boot time)."""

    start_ns: int
    end_ns: int
    gpus: tuple[GpuTruth, ...]

    def owner(self, name: str | None) -> Integrals:
        """One process (None: idle) summed over all GPUs."""
        return sum((gpu.owners.get(name, NOTHING) for gpu in self.gpus), NOTHING)


def gpu_truth(index: int, gpu: Gpu, schedule: Schedule, start_ns: int, end_ns: int) -> GpuTruth:
    """Integrate one GPU over [start, end) of the scenario's own time."""
    stretches = list(schedule.between(start_ns, end_ns))
    # One denominator for all shares: sums stay integers until the end, and owners sum to the whole.
    scale = math.lcm(
        *(share.denominator for segment, _ in stretches for _, share in segment.phase.owners)
    )
    sums: dict[str | None, list[int]] = {}
    for segment, length_ns in stretches:
        gained = [length_ns, *(rate * length_ns for rate in segment.rates)]
        for name, share in segment.phase.owners or IDLE:
            weight = (share * scale).numerator
            owner = sums.setdefault(name, [0] * len(gained))
            sums[name] = [
                so_far + gain * weight for so_far, gain in zip(owner, gained, strict=True)
            ]
    owners = {name: _integrals(amounts, schedule, scale) for name, amounts in sums.items()}
    whole = [sum(column) for column in zip(*sums.values(), strict=True)]
    return GpuTruth(
        index=index,
        uuid=gpu.uuid,
        whole=_integrals(whole, schedule, scale) if whole else NOTHING,
        owners=owners,
    )


def with_instances(truth: GpuTruth, device: Device, start_ns: int, end_ns: int) -> GpuTruth:
    """The GPU's truth with that of its instances, and with their energy in the whole's."""
    instances: list[InstanceTruth] = []
    for placed in device.instances:
        spec = placed.spec
        first = max(start_ns, spec.from_ns)
        last = end_ns if spec.until_ns is None else min(end_ns, spec.until_ns)
        if first < last:
            own = gpu_truth(device.position, placed.device.gpu, placed.device.schedule, first, last)
            instances.append(
                InstanceTruth(
                    instance_id=spec.instance_id,
                    from_ns=spec.from_ns,
                    whole=own.whole,
                    owners=own.owners,
                )
            )
    added = sum((item.whole.energy_mj for item in instances), Fraction(0))
    whole = dataclasses.replace(truth.whole, energy_mj=truth.whole.energy_mj + added)
    return dataclasses.replace(truth, whole=whole, instances=tuple(instances))


def _integrals(amounts: list[int], schedule: Schedule, scale: int) -> Integrals:
    time_ns, *counters = amounts
    cycles = schedule.cycle_denominator * scale
    return Integrals(
        gpu_time_ns=Fraction(time_ns, scale),
        elapsed_cycles=Fraction(counters[ELAPSED], cycles),
        sm_active_cycles=Fraction(counters[POSITIONS["sm_active"]], cycles),
        active_cycles={pipe: Fraction(counters[POSITIONS[pipe]], cycles) for pipe in PIPES},
        energy_mj=Fraction(counters[ENERGY], schedule.energy_denominator * scale),
    )
