"""GPM readings: which metrics we ask for, what their values mean, and the scale of the cycles.

Pure: no driver, no clock. Percentages become exact ratios; cumulative counters become integer
SM-cycles summed over SMs. What the counters count (every SM, or the mean SM) is documented by
nobody, so it is found out by comparison with the SM clock, cycles are given only once that is
certain, and every later interval is held against it: a wrong scale is wrong by the number of SMs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from flopledger_agent.gpus.limits import SM_CLOCK_KHZ_MIN, UNKNOWN_LIMITS, Limits
from flopledger_agent.gpus.nvml_errors import meaning_of
from flopledger_core.records import Cycles, Tier
from flopledger_core.units import INT64_MAX, NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PERCENTAGES: Final[dict[str, int]] = {
    "sm_active": 2,
    "integer": 4,
    "any_tensor": 5,
    "dfma": 6,
    "hmma": 7,
    "dmma": 8,
    "imma": 9,
    "fp64": 11,
    "fp32": 12,
    "fp16": 13,
}
"""`Cycles` field -> GPM metric id of its percentage over the interval of two samples."""

COUNTERS: Final[dict[str, int]] = {
    "elapsed": 248,
    "sm_active": 249,
    "any_tensor": 250,
    "dmma": 251,
    "hmma": 252,
    "imma": 253,
    "dfma": 254,
    "integer": 257,
    "fp64": 258,
    "fp32": 259,
    "fp16": 260,
}
"""`Cycles` field -> GPM metric id of its cumulative counter (R595 drivers and newer)."""

PERCENTAGE_IDS: Final = tuple(PERCENTAGES.values())
ALL_IDS: Final = PERCENTAGE_IDS + tuple(COUNTERS.values())

NO_TIME: Final = Fraction(0)
# A percentage a little above 100 is a rounding of the driver and read as 100; more is no reading.
PERCENT_MAX: Final = 101.0
# The counter's rate may be off the clock readings at both ends by this factor (the clock moved in
# between); the two candidate scales differ by the number of SMs, which must exceed its square.
SCALE_TOLERANCE: Final = 3.0

# Intervals in a row that must show one scale before it is believed: one alone deceives when the
# device slept for most of it.
AGREEING_INTERVALS: Final = 2
# How old the driver's own sample of the counters may be: an interval can hold so much more.
REFRESH_NS: Final = 100_000_000
# A value that is there but cannot be one, as against a counter the driver does not have.
NO_READING: Final = frozenset({"not_a_number", "out_of_range"})

Scale = Literal["sum", "mean"]
Number = TypeVar("Number", int, Fraction)
Answers = dict[int, tuple[int, float]]  # metric id -> (NVML return code, value)


class GpmReading(msgspec.Struct, frozen=True, kw_only=True):
    """What one pair of GPM samples tells; `tier` None: nothing usable about the interval.

    Cycles may come with ratios, or without a tier: they begin the next interval.
    """

    tier: Tier | None
    cycles: Cycles | None
    utilization: dict[str, Fraction] | None
    absent: dict[str, str]


def ratio_of(percent: float) -> Fraction | str:
    """A percentage as an exact ratio 0..1, or the reason why it is none."""
    if not 0.0 <= percent <= PERCENT_MAX:  # false for what is not a number, too
        return "not_a_number" if math.isnan(percent) else "out_of_range"
    if percent == 0.0:
        return NO_TIME  # most pipes, most of the time
    numerator, denominator = min(percent, 100.0).as_integer_ratio()
    return Fraction(numerator, denominator * 100)


def count_of(value: float) -> int | str:
    """A cumulative counter, given as a double, as an integer, or the reason why it is none."""
    if not 0.0 <= value <= INT64_MAX:  # false for what is not a number, too
        return "not_a_number" if math.isnan(value) else "out_of_range"
    return int(value)


def classify_scale(
    *,
    cycles: int,
    interval_ns: int,
    clocks_khz: tuple[int, int],
    sm_count: int,
    mean_clock_khz_max: int = UNKNOWN_LIMITS.mean_clock_khz,
) -> Scale | None:
    """Whether a counter that advanced by `cycles` counts every SM or the mean SM; None: unclear.

    Compares its rate with the SM clock readings at both ends, by ratio, with a wide tolerance, and
    asks that the clock it implies is one an awake device can have.
    """
    if cycles <= 0 or interval_ns <= 0 or min(clocks_khz) <= 0:
        return None
    if sm_count <= SCALE_TOLERANCE * SCALE_TOLERANCE:
        return None
    rate_khz = cycles * NS_PER_SECOND / interval_ns / 1000
    low = max(SM_CLOCK_KHZ_MIN, min(clocks_khz) / SCALE_TOLERANCE)
    high = min(mean_clock_khz_max, max(clocks_khz) * SCALE_TOLERANCE)
    is_mean = low <= rate_khz <= high
    is_sum = low * sm_count <= rate_khz <= high * sm_count
    if is_mean == is_sum:
        return None
    return "mean" if is_mean else "sum"


def contradicts(
    scale: Scale, *, cycles: int, interval_ns: int, sm_count: int, mean_clock_khz_max: int
) -> bool:
    """Whether a counter of this scale cannot have advanced by `cycles`: too fast for any clock.

    Too slow proves nothing, because the counter of a device that sleeps stands still.
    """
    fastest = mean_clock_khz_max * 1000 * (sm_count if scale == "sum" else 1)
    return cycles * NS_PER_SECOND > fastest * (max(0, interval_ns) + REFRESH_NS)


class GpmMeter:
    """Interprets one device's GPM answers, tick by tick; remembers the counters' scale.

    The scale is believed once two intervals in a row agree on it (those that are unclear do not
    count), and is held against every later interval; contradicted, it is found out anew.
    """

    def __init__(
        self, sm_count: int | None, scale: Scale | None = None, limits: Limits = UNKNOWN_LIMITS
    ) -> None:
        self._sm_count = sm_count
        self._scale: Scale | None = scale
        self._limits = limits
        self._last: tuple[int, int, int | None] | None = None  # elapsed, boot_ns, clock_khz
        self._candidate: Scale | None = None
        self._agreeing = 0
        self._why_unknown = "scale_undetermined"

    @property
    def scale(self) -> Scale | None:
        """What the cycle counters count; None until it is certain."""
        return self._scale

    def learn_device(self, sm_count: int | None, limits: Limits) -> None:
        """Take over what became known of the device since it was opened."""
        self._sm_count, self._limits = sm_count, limits

    def interpret(
        self,
        answers: Answers,
        *,
        boot_ns: int,
        sm_clock_khz: int | None,
        since_delivered: bool,
        hand_over: bool = False,
    ) -> GpmReading:
        """The best reading the answers allow: cycles, else ratios, else nothing, with reasons.

        `since_delivered`: the pair begins at the last delivered sample, so that its percentages
        are means over exactly the interval the consumer sees; counters do not need that.
        `hand_over`: the last delivered sample had no cycles to count from, so the interval that
        ends now is told by ratios, and the cycles given with them begin the next one.
        """
        counters, missing = _read(COUNTERS, answers, count_of)
        self._follow(counters.get("elapsed"), boot_ns, sm_clock_khz)
        cycles = self._cycles(counters, missing, boot_ns)
        absent: dict[str, str] = {}
        counted: Cycles | None = None
        if isinstance(cycles, Cycles):
            counted = cycles
            absent = {f"cycles.{name}": reason for name, reason in missing.items()}
            if not hand_over:
                return GpmReading(
                    tier="gpm_cycles", cycles=counted, utilization=None, absent=absent
                )
        else:
            absent["cycles"] = cycles
        if not since_delivered:
            absent["utilization"] = "first_reading"
            tier: Tier | None = None if counted is not None else "gpm_util"
            return GpmReading(tier=tier, cycles=counted, utilization=None, absent=absent)
        ratios, missing = _read(PERCENTAGES, answers, ratio_of)
        if not ratios:
            absent["utilization"] = next(iter(missing.values()))
            return GpmReading(tier=None, cycles=counted, utilization=None, absent=absent)
        absent |= {f"utilization.{name}": reason for name, reason in missing.items()}
        return GpmReading(tier="gpm_util", cycles=counted, utilization=ratios, absent=absent)

    def _follow(self, elapsed: int | None, boot_ns: int, clock_khz: int | None) -> None:
        """Learn the scale from the interval that ends now, or hold it against the interval."""
        if elapsed is None or self._sm_count is None:
            return
        if elapsed > self._limits.cycles(boot_ns, self._sm_count):
            return  # no reading at all: it says nothing about the scale
        last, self._last = self._last, (elapsed, boot_ns, clock_khz)
        if last is None:
            return
        cycles, interval_ns = elapsed - last[0], boot_ns - last[1]
        if self._scale is not None:
            if contradicts(
                self._scale,
                cycles=cycles,
                interval_ns=interval_ns,
                sm_count=self._sm_count,
                mean_clock_khz_max=self._limits.mean_clock_khz,
            ):
                self._scale, self._candidate, self._agreeing = None, None, 0
                self._why_unknown = "scale_contradicted"
            return
        clocks = [clock for clock in (last[2], clock_khz) if clock is not None]
        if not clocks:
            return
        found = classify_scale(
            cycles=cycles,
            interval_ns=interval_ns,
            clocks_khz=(min(clocks), max(clocks)),
            sm_count=self._sm_count,
            mean_clock_khz_max=self._limits.mean_clock_khz,
        )
        if found is None:
            return
        self._agreeing = self._agreeing + 1 if found == self._candidate else 1
        self._candidate = found
        if self._agreeing >= AGREEING_INTERVALS:
            self._scale, self._why_unknown = found, "scale_undetermined"

    def _cycles(
        self, counters: Mapping[str, int], missing: Mapping[str, str], boot_ns: int
    ) -> Cycles | str:
        if missing.get("elapsed") in NO_READING:
            return missing["elapsed"]
        if "elapsed" not in counters or not {"any_tensor", "hmma"} & counters.keys():
            return "driver_lacks_cycle_counters"
        if self._sm_count is None:
            return "sm_count_unknown"
        if self._scale is None:
            return self._why_unknown
        factor = self._sm_count if self._scale == "mean" else 1
        highest = min(INT64_MAX, self._limits.cycles(boot_ns, self._sm_count))
        if max(counters.values()) * factor > highest:
            return "out_of_range"
        if factor != 1:
            counters = {name: value * factor for name, value in counters.items()}
        return Cycles(**counters)


def _read(
    metrics: Mapping[str, int], answers: Answers, convert: Callable[[float], Number | str]
) -> tuple[dict[str, Number], dict[str, str]]:
    """The fields that have a value, and why each other one has none."""
    values: dict[str, Number] = {}
    missing: dict[str, str] = {}
    for name, metric in metrics.items():
        answer = answers.get(metric)
        if answer is None:
            missing[name] = "not_requested"
        elif answer[0] != 0:
            missing[name] = meaning_of(answer[0]).reason
        else:
            value = convert(answer[1])
            if isinstance(value, str):
                missing[name] = value
            else:
                values[name] = value
    return values, missing
