"""GPM answers become exact ratios or whole cycles, and the scale of cycles is never guessed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.gpm import (
    COUNTERS,
    PERCENTAGES,
    Answers,
    GpmMeter,
    classify_scale,
    contradicts,
    count_of,
    ratio_of,
)
from flopledger_agent.gpus.limits import limits_of
from flopledger_core.accelerators import load_table
from flopledger_core.units import INT64_MAX

SECOND_NS = 1_000_000_000
OK = 0
NOT_SUPPORTED = 3


def answers(elapsed: float, active: float, percent: float = 50.0) -> Answers:
    """What a driver with everything would say."""
    counters = dict.fromkeys(COUNTERS.values(), (OK, active))
    ratios = dict.fromkeys(PERCENTAGES.values(), (OK, percent))
    return {**counters, **ratios, COUNTERS["elapsed"]: (OK, elapsed)}


@given(st.floats(min_value=0, max_value=100))
def test_a_percentage_becomes_the_exact_ratio_of_its_double(percent: float) -> None:
    """No rounding happens between the driver and the sum."""
    assert ratio_of(percent) == Fraction(percent) / 100


@given(st.floats())
def test_no_double_is_ever_a_ratio_outside_0_and_1(value: float) -> None:
    """NaN, infinities, sentinels and negatives become reasons."""
    ratio = ratio_of(value)
    assert isinstance(ratio, str) or 0 <= ratio <= 1
    count = count_of(value)
    assert isinstance(count, str) or 0 <= count <= INT64_MAX + 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "not_a_number"), (-1.0, "out_of_range"), (math.inf, "out_of_range")],
)
def test_values_that_are_no_readings_say_why(value: float, reason: str) -> None:
    """Absent is not zero."""
    assert ratio_of(value) == reason
    assert count_of(value) == reason


def test_a_percentage_rounded_above_100_is_full() -> None:
    """100.0001 is full; 250 is a driver's mistake."""
    assert ratio_of(100.0001) == 1
    assert ratio_of(250.0) == "out_of_range"


@given(
    clock_khz=st.integers(min_value=250_000, max_value=3_000_000),
    error=st.fractions(min_value=Fraction(2, 5), max_value=Fraction(5, 2)),
    sm_count=st.integers(min_value=10, max_value=200),
    is_sum=st.booleans(),
)
def test_the_scale_is_found_while_the_clock_reading_is_roughly_right(
    clock_khz: int, error: Fraction, sm_count: int, is_sum: bool
) -> None:
    """A clock off by less than the tolerance never turns one scale into the other."""
    cycles = int(clock_khz * 1000 * error) * (sm_count if is_sum else 1)
    scale = classify_scale(
        cycles=cycles,
        interval_ns=SECOND_NS,
        clocks_khz=(clock_khz, clock_khz),
        sm_count=sm_count,
    )
    assert scale == ("sum" if is_sum else "mean") or (scale is None and sm_count < 24)


@pytest.mark.parametrize("cycles", [0, -5, 1_755_000 * 1000 * 12])
def test_an_unclear_rate_leaves_the_scale_open(cycles: int) -> None:
    """A counter that stands, went back, or fits neither scale proves nothing."""
    assert (
        classify_scale(
            cycles=cycles, interval_ns=SECOND_NS, clocks_khz=(1_755_000, 1_755_000), sm_count=132
        )
        is None
    )


def test_cycles_of_a_mean_counter_are_multiplied_by_the_sms() -> None:
    """What leaves is always summed over SMs."""
    meter = GpmMeter(sm_count=100)
    first = meter.interpret(
        answers(0.0, 0.0), boot_ns=0, sm_clock_khz=1_000_000, since_delivered=False
    )
    assert first.absent["cycles"] == "scale_undetermined"
    meter.interpret(
        answers(1e9, 4e8), boot_ns=SECOND_NS, sm_clock_khz=1_000_000, since_delivered=False
    )
    assert meter.scale is None
    third = meter.interpret(
        answers(2e9, 4e8), boot_ns=2 * SECOND_NS, sm_clock_khz=1_000_000, since_delivered=False
    )
    assert meter.scale == "mean"
    assert third.cycles is not None
    assert (third.cycles.elapsed, third.cycles.hmma) == (200 * 10**9, 40 * 10**9)


def test_without_the_sm_count_cycles_are_absent() -> None:
    """A factor nobody knows is not replaced by one."""
    reading = GpmMeter(sm_count=None).interpret(
        answers(1e9, 4e8), boot_ns=0, sm_clock_khz=1_000_000, since_delivered=True
    )
    assert reading.tier == "gpm_util"
    assert reading.absent["cycles"] == "sm_count_unknown"


def test_a_refused_metric_is_absent_and_the_others_stay() -> None:
    """Each metric carries its own return code."""
    meter = GpmMeter(sm_count=132, scale="sum")
    refused: Answers = {**answers(1e9, 1e8), COUNTERS["dfma"]: (NOT_SUPPORTED, 0.0)}
    reading = meter.interpret(refused, boot_ns=0, sm_clock_khz=None, since_delivered=True)
    assert reading.tier == "gpm_cycles"
    assert reading.cycles is not None
    assert reading.cycles.dfma is None
    assert reading.absent == {"cycles.dfma": "not_supported"}


def test_without_the_elapsed_counter_percentages_serve() -> None:
    """Cycles without their denominator are not used."""
    meter = GpmMeter(sm_count=132, scale="sum")
    refused: Answers = {**answers(1e9, 1e8), 248: (NOT_SUPPORTED, 0.0), 12: (OK, math.nan)}
    reading = meter.interpret(refused, boot_ns=0, sm_clock_khz=None, since_delivered=True)
    assert reading.tier == "gpm_util"
    assert reading.utilization is not None
    assert reading.utilization["hmma"] == Fraction(1, 2)
    assert reading.absent["utilization.fp32"] == "not_a_number"


def test_nothing_usable_is_no_tier() -> None:
    """The caller falls to the next source."""
    nothing: Answers = dict.fromkeys(answers(0, 0), (OK, math.nan))
    reading = GpmMeter(sm_count=132).interpret(
        nothing, boot_ns=0, sm_clock_khz=None, since_delivered=True
    )
    assert reading.tier is None


H100 = load_table().by_key("H100 SXM")
FULL = 1.98e9 * H100.sm_count  # cycles of every SM in a second at the highest clock
LIMITS = limits_of(H100)


def follow(meter: GpmMeter, *elapsed: float, start: int = 0) -> list[str]:
    """Read the counter once a second at the highest clock; what kept cycles absent, each time."""
    whys = []
    for second, value in enumerate(elapsed, start=start):
        reading = meter.interpret(
            answers(value, value / 2),
            boot_ns=second * SECOND_NS,
            sm_clock_khz=1_980_000,
            since_delivered=True,
        )
        whys.append(reading.absent.get("cycles", "counted"))
    return whys


def test_a_device_asleep_for_most_of_an_interval_does_not_teach_the_wrong_scale() -> None:
    """A sum that stood still for 98.5 % of a second looks like a mean; two intervals must agree."""
    meter = GpmMeter(H100.sm_count)  # even where no limit of the device is known
    waking = 0.015 * FULL
    assert follow(meter, 0, waking, waking + FULL) == ["scale_undetermined"] * 3
    assert follow(meter, waking + 2 * FULL, start=3) == ["counted"]
    assert meter.scale == "sum"


def test_an_implied_clock_above_the_devices_own_is_no_scale() -> None:
    """The sleeping sum implies 3.9 GHz for one SM: no interval of that kind teaches anything."""
    meter = GpmMeter(H100.sm_count, limits=LIMITS)
    follow(meter, *(0.015 * FULL * second for second in range(50)))
    assert meter.scale is None


def test_a_scale_learned_wrong_is_contradicted_and_learned_again() -> None:
    """Idleness can deceive for long; the first busy second ends it."""
    meter = GpmMeter(H100.sm_count, limits=LIMITS)
    asleep = [0.008 * FULL * second for second in range(3)]
    assert follow(meter, *asleep)[-1] == "counted"
    assert str(meter.scale) == "mean"
    busy = [asleep[-1] + FULL * second for second in range(1, 5)]
    assert follow(meter, *busy, start=3) == ["scale_contradicted"] * 2 + ["counted"] * 2
    assert str(meter.scale) == "sum"


@given(
    share=st.fractions(min_value=0, max_value=1),
    span_ms=st.integers(min_value=10, max_value=10_000),
    is_sum=st.booleans(),
)
def test_no_possible_rate_contradicts_a_true_scale(
    share: Fraction, span_ms: int, is_sum: bool
) -> None:
    """Awake for any share of any interval, up to the highest clock, with a stale counter."""
    sms = H100.sm_count
    fastest = 1_980_000_000 * (sms if is_sum else 1)
    assert not contradicts(
        "sum" if is_sum else "mean",
        cycles=int(fastest * share * (span_ms + 100) / 1000),
        interval_ns=span_ms * 1_000_000,
        sm_count=sms,
        mean_clock_khz_max=LIMITS.mean_clock_khz,
    )


def test_a_counter_beyond_anything_its_age_allows_is_out_of_range() -> None:
    """And it does not unsettle the scale."""
    meter = GpmMeter(H100.sm_count, scale="sum", limits=LIMITS)
    assert follow(meter, 0, 2.0**62, 2 * FULL) == ["counted", "out_of_range", "counted"]


def test_a_counter_without_a_sane_value_says_so() -> None:
    """It is not the driver's age that is at fault."""
    assert follow(GpmMeter(132, scale="sum"), math.nan, 2.0**70) == ["not_a_number", "out_of_range"]


def test_counting_begins_with_means_for_the_interval_that_ends() -> None:
    """The consumer has nothing to count from: ratios end one interval, cycles begin the next."""
    meter = GpmMeter(sm_count=132, scale="sum")
    reading = meter.interpret(
        answers(1e9, 4e8), boot_ns=0, sm_clock_khz=None, since_delivered=True, hand_over=True
    )
    assert (reading.tier, reading.absent) == ("gpm_util", {})
    assert reading.utilization is not None
    assert reading.cycles is not None
