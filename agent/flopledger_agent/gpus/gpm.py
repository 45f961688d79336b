"""GPM readings: which metrics we ask for, what their values mean, and the scale of the cycles.

Pure: no driver, no clock. Percentages become exact ratios; cumulative counters become integer
SM-cycles summed over SMs. What the counters count (every SM, or the mean SM) is documented by
nobody, so it is found out by comparison with the SM clock, and cycles are given only once that is
certain: a wrong scale would be wrong by the number of SMs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

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

Scale = Literal["sum", "mean"]
Number = TypeVar("Number", int, Fraction)
Answers = dict[int, tuple[int, float]]  # metric id -> (NVML return code, value)


class GpmReading(msgspec.Struct, frozen=True, kw_only=True):
    """What one pair of GPM samples tells; `tier` None: nothing usable."""

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
    *, cycles: int, interval_ns: int, clocks_khz: tuple[int, int], sm_count: int
) -> Scale | None:
    """Whether a counter that advanced by `cycles` counts every SM or the mean SM; None: unclear.

    Compares its rate with the SM clock readings at both ends, by ratio, with a wide tolerance.
    """
    if cycles <= 0 or interval_ns <= 0 or min(clocks_khz) <= 0:
        return None
    if sm_count <= SCALE_TOLERANCE * SCALE_TOLERANCE:
        return None
    rate_khz = cycles * NS_PER_SECOND / interval_ns / 1000
    low = min(clocks_khz) / SCALE_TOLERANCE
    high = max(clocks_khz) * SCALE_TOLERANCE
    is_mean = low <= rate_khz <= high
    is_sum = low * sm_count <= rate_khz <= high * sm_count
    if is_mean == is_sum:
        return None
    return "mean" if is_mean else "sum"


class GpmMeter:
    """Interprets one device's GPM answers, tick by tick; remembers the counters' scale."""

    def __init__(self, sm_count: int | None, scale: Scale | None = None) -> None:
        self._sm_count = sm_count
        self._scale: Scale | None = scale
        self._last: tuple[int, int, int | None] | None = None  # elapsed, boot_ns, clock_khz

    @property
    def scale(self) -> Scale | None:
        """What the cycle counters count; None until it is certain."""
        return self._scale

    def interpret(
        self, answers: Answers, *, boot_ns: int, sm_clock_khz: int | None, since_delivered: bool
    ) -> GpmReading:
        """The best reading the answers allow: cycles, else ratios, else nothing, with reasons.

        `since_delivered`: the pair begins at the last delivered sample, so that its percentages
        are means over exactly the interval the consumer sees; counters do not need that.
        """
        counters, missing = _read(COUNTERS, answers, count_of)
        self._learn_scale(counters.get("elapsed"), boot_ns, sm_clock_khz)
        cycles = self._cycles(counters)
        if isinstance(cycles, Cycles):
            return GpmReading(
                tier="gpm_cycles",
                cycles=cycles,
                utilization=None,
                absent={f"cycles.{name}": reason for name, reason in missing.items()},
            )
        absent = {"cycles": cycles}
        if not since_delivered:
            absent["utilization"] = "first_reading"
            return GpmReading(tier="gpm_util", cycles=None, utilization=None, absent=absent)
        ratios, missing = _read(PERCENTAGES, answers, ratio_of)
        if not ratios:
            absent["utilization"] = next(iter(missing.values()))
            return GpmReading(tier=None, cycles=None, utilization=None, absent=absent)
        absent |= {f"utilization.{name}": reason for name, reason in missing.items()}
        return GpmReading(tier="gpm_util", cycles=None, utilization=ratios, absent=absent)

    def _learn_scale(self, elapsed: int | None, boot_ns: int, clock_khz: int | None) -> None:
        if self._scale is not None or elapsed is None or self._sm_count is None:
            return
        last, self._last = self._last, (elapsed, boot_ns, clock_khz)
        if last is None:
            return
        clocks = [clock for clock in (last[2], clock_khz) if clock is not None]
        if not clocks:
            return
        self._scale = classify_scale(
            cycles=elapsed - last[0],
            interval_ns=boot_ns - last[1],
            clocks_khz=(min(clocks), max(clocks)),
            sm_count=self._sm_count,
        )

    def _cycles(self, counters: Mapping[str, int]) -> Cycles | str:
        if "elapsed" not in counters or len(counters) == 1:
            return "driver_lacks_cycle_counters"
        if "any_tensor" not in counters and "hmma" not in counters:
            return "driver_lacks_cycle_counters"
        if self._sm_count is None:
            return "sm_count_unknown"
        if self._scale is None:
            return "scale_undetermined"
        factor = self._sm_count if self._scale == "mean" else 1
        if max(counters.values()) * factor > INT64_MAX:
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
