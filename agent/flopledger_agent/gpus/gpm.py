"""GPM readings: which metrics we ask for, what their values mean, and the scale of the cycles.

Pure: no driver, no clock. Percentages become exact ratios; cumulative counters become integer
SM-cycles summed over SMs. What the counters count (every SM, or the mean SM) is documented by
nobody, so it is proven: by intervals whose rate the other scale cannot have. Cycles are given only
then, and every later interval is held against it: a wrong scale is wrong by the number of SMs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_agent.gpus.limits import SM_CLOCK_KHZ_MIN, UNKNOWN_LIMITS, Limits
from flopledger_agent.gpus.nvml_errors import meaning_of
from flopledger_core.records import Cycles, Tier
from flopledger_core.units import INT64_MAX, NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Mapping

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

GRAPHICS_UTIL: Final = 1  # share of the time in which any program ran: a witness of being awake
PERCENTAGE_IDS: Final = tuple(PERCENTAGES.values())
ALL_IDS: Final = (*PERCENTAGE_IDS, *COUNTERS.values(), GRAPHICS_UTIL)

NO_TIME: Final = Fraction(0)
# Counters come as doubles, which hold every whole number below this and round those above it.
EXACT_DOUBLES: Final = 2**53
# A percentage a little above 100 is a rounding of the driver and read as 100; more is no reading.
PERCENT_MAX: Final = 101.0
# While it is awake the SM clock may fall below the readings at both ends by this factor. The scales
# differ by the number of SMs, which must exceed its square, or nothing is proven.
SCALE_TOLERANCE: Final = 3

# Intervals in a row that must prove one scale before it is believed: a single one may end with a
# garbled reading.
AGREEING_INTERVALS: Final = 2
# How old the driver's own sample of the counters may be: an interval can hold so much more.
REFRESH_NS: Final = 100_000_000
# Without either of these nothing tells tensor work from any other.
TENSOR_ACTIVITY: Final = frozenset({"any_tensor", "hmma"})
# What a driver answers for a metric it does not have, as against one that fails this time.
LACKING: Final = frozenset({"not_supported", "invalid_argument", "not_found", "not_requested"})

Scale = Literal["sum", "mean"]
SCALES: Final[tuple[Scale, ...]] = ("sum", "mean")
Answers = dict[int, tuple[int, float]]  # metric id -> (NVML return code, value)
NOT_REQUESTED: Final = (-1, 0.0)  # stands where the driver was not asked


class GpmReading(msgspec.Struct, frozen=True, kw_only=True):
    """What one pair of GPM samples tells; `tier` None: nothing usable about the interval.

    Cycles may come with ratios, or without a tier: they begin the next interval.
    """

    tier: Tier | None
    cycles: Cycles | None
    utilization: dict[str, Fraction] | None
    absent: dict[str, str]
    uncertain_cycles: int = 0  # how far any of `cycles` may lie from the truth


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Two readings of the elapsed-cycles counter, and what else is known of the time between."""

    cycles: int  # how far the counter advanced, in its own unit
    interval_ns: int
    active_ratio: Fraction | None  # share of the time in which anything ran; None: not told
    clock_khz: int | None  # the lower SM clock of the two ends; None: not read


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


def uncertainty_of(highest: int, scale: Scale, sm_count: int) -> int:
    """How far counters up to `highest` (in their own unit) lie from the truth at most, in cycles.

    A double beyond 2^53 is the nearest of those there are, so it may be off by half their
    distance; a mean over the SMs has lost up to one cycle of each.
    """
    rounded = 0 if highest < EXACT_DOUBLES else int(math.ulp(float(highest))) // 2
    return (rounded + 1) * sm_count if scale == "mean" else rounded


def proven_scale(
    interval: Interval, *, sm_count: int, mean_clock_khz_max: int = UNKNOWN_LIMITS.mean_clock_khz
) -> Scale | None:
    """What the counter counts, where the interval excludes the other possibility; else None.

    Faster than one SM can be, it counts every SM. Slower than every SM together must be in the
    time in which something ran, it counts the mean SM: a low rate alone proves nothing, because a
    sum over a device that sleeps looks like the mean of one that is awake.
    """
    if interval.cycles <= 0 or interval.interval_ns <= 0:
        return None
    if sm_count <= SCALE_TOLERANCE * SCALE_TOLERANCE:
        return None
    too_fast = {
        scale: contradicts(
            scale,
            cycles=interval.cycles,
            interval_ns=interval.interval_ns,
            sm_count=sm_count,
            mean_clock_khz_max=mean_clock_khz_max,
        )
        for scale in SCALES
    }
    if too_fast["mean"]:
        return None if too_fast["sum"] else "sum"
    slowest = _fewest_cycles(interval)
    is_mean = slowest <= interval.cycles < slowest * sm_count
    return "mean" if is_mean and slowest > 0 else None


def _fewest_cycles(interval: Interval) -> int:
    """What one SM must have counted at least, awake while something ran; 0 where nothing is known.

    The driver's two samples may be older than the readings, so that much of the time is not sure.
    """
    if interval.active_ratio is None:
        return 0
    awake_ns = math.floor(interval.active_ratio * interval.interval_ns) - REFRESH_NS
    clock_khz = max(SM_CLOCK_KHZ_MIN, (interval.clock_khz or 0) // SCALE_TOLERANCE)
    return max(0, awake_ns) * clock_khz * 1000 // NS_PER_SECOND


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

    The scale is believed once two intervals in a row prove it (those that prove nothing do not
    count), and is held against every later interval; contradicted, it is found out anew. Cycles of
    two scales are never subtracted from each other: where it changed, counting begins again.
    """

    def __init__(
        self,
        sm_count: int | None,
        scale: Scale | None = None,
        limits: Limits = UNKNOWN_LIMITS,
        *,
        counted_by: Scale | None = None,
    ) -> None:
        """`counted_by`: the scale of the last delivered cycles, where a meter before gave them."""
        self._sm_count = sm_count
        self._scale: Scale | None = scale
        self._limits = limits
        self._last: tuple[int, int, int | None] | None = None  # elapsed, boot_ns, clock_khz
        self._candidate: Scale | None = None
        self._agreeing = 0
        self._why_unknown = "scale_undetermined"
        self._given: Scale | None = None  # of the newest reading's cycles, if it had any
        self._counted_by: Scale | None = counted_by

    @property
    def scale(self) -> Scale | None:
        """What the cycle counters count; None until it is certain."""
        return self._scale

    @property
    def counted_by(self) -> Scale | None:
        """The scale of the last cycles that were delivered; None: there were none."""
        return self._counted_by

    def learn_device(self, sm_count: int | None, limits: Limits) -> None:
        """Take over what became known of the device since it was opened."""
        self._sm_count, self._limits = sm_count, limits

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous reading."""
        if delivered and self._given is not None:
            self._counted_by = self._given
        self._given = None

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
        counters, missing = _counts(answers)
        self._follow(counters.get("elapsed"), answers, boot_ns, sm_clock_khz)
        cycles = self._cycles(counters, missing, boot_ns)
        absent: dict[str, str] = {}
        counted: Cycles | None = None
        uncertain = 0
        if isinstance(cycles, Cycles):
            counted, uncertain = cycles, self._uncertainty(counters)
            absent = {f"cycles.{name}": reason for name, reason in missing.items()}
            self._given = self._scale
            hand_over = hand_over or self._counted_by not in {None, self._scale}
        else:
            absent["cycles"] = cycles
        if counted is not None and not hand_over:
            tier: Tier | None = "gpm_cycles"
            ratios = None
        elif not since_delivered:
            absent["utilization"] = "first_reading"
            tier, ratios = None if counted is not None else "gpm_util", None
        else:
            tier, ratios = _means(answers, absent)
        return GpmReading(
            tier=tier,
            cycles=counted,
            utilization=ratios,
            absent=absent,
            uncertain_cycles=uncertain,
        )

    def _follow(
        self, elapsed: int | None, answers: Answers, boot_ns: int, clock_khz: int | None
    ) -> None:
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
        found = proven_scale(
            Interval(
                cycles=cycles,
                interval_ns=interval_ns,
                active_ratio=_active_ratio(answers),
                clock_khz=min(filter(None, (last[2], clock_khz)), default=None),
            ),
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
        if "elapsed" not in counters or not TENSOR_ACTIVITY & counters.keys():
            why = missing.get("elapsed") or missing["any_tensor"]
            return "driver_lacks_cycle_counters" if why in LACKING else why
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

    def _uncertainty(self, counters: Mapping[str, int]) -> int:
        if self._scale is None or self._sm_count is None:
            return 0
        return uncertainty_of(max(counters.values()), self._scale, self._sm_count)


def _means(
    answers: Answers, absent: dict[str, str]
) -> tuple[Tier | None, dict[str, Fraction] | None]:
    """The percentages of an interval and the tier they make; what is missing goes to `absent`."""
    ratios, missing = _ratios(answers)
    tier: Tier = "gpm_util" if TENSOR_ACTIVITY & ratios.keys() else "sm_active"
    if tier == "sm_active" and "sm_active" not in ratios:
        # Nothing says how busy the device was: a coarser source knows more.
        absent["utilization"] = missing["sm_active"]
        return None, None
    absent |= {f"utilization.{name}": reason for name, reason in missing.items()}
    return tier, ratios


def _active_ratio(answers: Answers) -> Fraction | None:
    """The share of the pair's time in which anything ran, where the driver tells."""
    code, percent = answers.get(GRAPHICS_UTIL, NOT_REQUESTED)
    ratio = ratio_of(percent)
    return ratio if code == 0 and isinstance(ratio, Fraction) else None


def _counts(answers: Answers) -> tuple[dict[str, int], dict[str, str]]:
    """The counters that have a value, and why each other one has none."""
    counts: dict[str, int] = {}
    missing: dict[str, str] = {}
    for name, metric in COUNTERS.items():
        code, value = answers.get(metric, NOT_REQUESTED)
        # As `count_of` has it, in line: this runs for every counter of every device and tick.
        if code == 0 and 0.0 <= value <= INT64_MAX:
            counts[name] = int(value)
        else:
            missing[name] = _why(code, count_of(value))
    return counts, missing


def _ratios(answers: Answers) -> tuple[dict[str, Fraction], dict[str, str]]:
    """The percentages that have a value, as ratios, and why each other one has none."""
    ratios: dict[str, Fraction] = {}
    missing: dict[str, str] = {}
    for name, metric in PERCENTAGES.items():
        code, percent = answers.get(metric, NOT_REQUESTED)
        ratio = ratio_of(percent)
        if code == 0 and isinstance(ratio, Fraction):
            ratios[name] = ratio
        else:
            missing[name] = _why(code, ratio)
    return ratios, missing


def _why(code: int, value: object) -> str:
    """The reason why a metric has no value: its own error, else what is wrong with the value."""
    if code == NOT_REQUESTED[0]:
        return "not_requested"
    return value if code == 0 and isinstance(value, str) else meaning_of(code).reason
