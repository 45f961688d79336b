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
    count_of,
    ratio_of,
)
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
    clock_khz=st.integers(min_value=100_000, max_value=3_000_000),
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
    second = meter.interpret(
        answers(1e9, 4e8), boot_ns=SECOND_NS, sm_clock_khz=1_000_000, since_delivered=False
    )
    assert meter.scale == "mean"
    assert second.cycles is not None
    assert (second.cycles.elapsed, second.cycles.hmma) == (100 * 10**9, 40 * 10**9)


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
