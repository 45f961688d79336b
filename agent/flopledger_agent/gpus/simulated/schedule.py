"""A GPU's cumulative counters as exact functions of time, cheap enough to ask thousands of times.

A phase's rates are constant, so a counter is a prefix at the phase's start plus rate x time. All
rates of a schedule are brought to common denominators once; from then on only integers are added,
multiplied and compared, and no value is ever rounded. The invariant (a property test holds it
against plain Fractions): numerator / denominator is the exact integral. Times are nanoseconds
since the scenario's start.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Final, Protocol

from flopledger_agent.gpus.simulated.phases import Phase
from flopledger_core.records import PIPES

BYTES_PER_MIB: Final = 1024 * 1024
# Order of the counters. All SM-cycle counters share one denominator, so ratios need none.
CYCLE_COUNTERS: Final = ("elapsed", "sm_active", "sm_occupancy", *PIPES)
COUNTERS: Final = (*CYCLE_COUNTERS, "energy", "gpu_active", "dram_active")
ELAPSED: Final = 0
ENERGY: Final = len(CYCLE_COUNTERS)
GPU_ACTIVE: Final = ENERGY + 1
DRAM_ACTIVE: Final = ENERGY + 2
POSITIONS: Final = {name: position for position, name in enumerate(COUNTERS)}


class Scheduled(Protocol):
    """What has phases: a GPU, or an instance of one."""

    @property
    def sm_count(self) -> int:
        """SMs whose cycles are counted."""
        ...

    @property
    def phases(self) -> tuple[Phase, ...]:
        """From second 0 on."""
        ...

    @property
    def idle(self) -> Phase:
        """What goes on after the last phase."""
        ...


def phase_rates(gpu: Scheduled, phase: Phase) -> tuple[Fraction, ...]:
    """What every counter gains per nanosecond: SM-cycles, mJ, and nanoseconds of activity."""
    elapsed = Fraction(gpu.sm_count * phase.sm_clock_mhz, 1000)  # MHz = 1000 cycles per 10^6 ns
    shares = (
        Fraction(1),
        phase.sm_active,
        phase.sm_occupancy,
        *(phase.pipes[pipe] for pipe in PIPES),
    )
    energy = phase.power_watts / 1_000_000  # 1 W is 10^3 mJ per 10^9 ns
    return (*(share * elapsed for share in shares), energy, phase.gpu_active, phase.dram_active)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A phase placed in time; counters are numerators over the schedule's denominators."""

    start_ns: int
    end_ns: int | None  # None: the idle segment after the last phase
    phase: Phase
    prefix: tuple[int, ...]
    rates: tuple[int, ...]
    power_mw: int  # as handed out: whole milliwatts
    holders: tuple[tuple[str, int], ...]  # processes and the bytes of memory each holds


class Schedule:
    """All counters of one GPU, or GPU instance, over time."""

    def __init__(self, gpu: Scheduled) -> None:
        phases = [*gpu.phases, gpu.idle]
        exact = [phase_rates(gpu, phase) for phase in phases]
        cycles = _common_denominator(rate for rates in exact for rate in rates[:ENERGY])
        energy = _common_denominator(rates[ENERGY] for rates in exact)
        activity = _common_denominator(rate for rates in exact for rate in rates[ENERGY + 1 :])
        self.cycle_denominator = cycles
        self.energy_denominator = energy
        self.activity_denominator = activity
        denominators = (*(cycles for _ in CYCLE_COUNTERS), energy, activity, activity)
        self.segments = _segments(phases, exact, denominators)
        self._starts = [segment.start_ns for segment in self.segments]

    def counters(self, at_ns: int) -> list[int]:
        """Every counter's numerator at an instant >= 0, in the order of COUNTERS."""
        segment = self.segments[bisect_right(self._starts, at_ns) - 1]
        elapsed_ns = at_ns - segment.start_ns
        return [
            before + rate * elapsed_ns
            for before, rate in zip(segment.prefix, segment.rates, strict=True)
        ]

    def counter(self, position: int, at_ns: int) -> int:
        """One counter's numerator at an instant >= 0."""
        segment = self.segments[bisect_right(self._starts, at_ns) - 1]
        return segment.prefix[position] + segment.rates[position] * (at_ns - segment.start_ns)

    def segment_before(self, at_ns: int) -> Segment:
        """The segment just before an instant; before the scenario the GPU is idle."""
        # At 0 the position is -1, which is the trailing idle segment: idle before as after.
        return self.segments[bisect_left(self._starts, at_ns) - 1]

    def state_before(self, at_ns: int) -> Phase:
        """What was going on just before an instant."""
        return self.segments[bisect_left(self._starts, at_ns) - 1].phase

    def between(self, start_ns: int, end_ns: int) -> Iterator[tuple[Segment, int]]:
        """The segments of [start, end) with their length inside it, in order."""
        position = bisect_right(self._starts, start_ns) - 1
        while start_ns < end_ns:
            segment = self.segments[position]
            stop_ns = end_ns if segment.end_ns is None else min(end_ns, segment.end_ns)
            yield segment, stop_ns - start_ns
            start_ns = stop_ns
            position += 1


def _common_denominator(values: Iterable[Fraction]) -> int:
    return math.lcm(*(value.denominator for value in values))


def _segments(
    phases: list[Phase], exact: list[tuple[Fraction, ...]], denominators: tuple[int, ...]
) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start_ns = 0
    prefix = (0,) * len(COUNTERS)
    for phase, fractions in zip(phases, exact, strict=True):
        rates = tuple(
            (rate * denominator).numerator
            for rate, denominator in zip(fractions, denominators, strict=True)
        )
        last = len(segments) == len(phases) - 1
        end_ns = start_ns + phase.duration_ns
        segments.append(
            Segment(
                start_ns=start_ns,
                end_ns=None if last else end_ns,
                phase=phase,
                prefix=prefix,
                rates=rates,
                power_mw=int(phase.power_watts * 1000),
                holders=tuple(
                    (name, int(share * phase.memory_used_mib * BYTES_PER_MIB))
                    for name, share in phase.owners
                ),
            )
        )
        prefix = tuple(
            before + rate * phase.duration_ns for before, rate in zip(prefix, rates, strict=True)
        )
        start_ns = end_ns
    return tuple(segments)
