"""GPM answers become exact ratios or whole cycles, and the scale of cycles is never guessed."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.gpm import (
    COUNTERS,
    EXACT_DOUBLES,
    GRAPHICS_UTIL,
    PERCENTAGES,
    Answers,
    GpmMeter,
    Interval,
    Scale,
    contradicts,
    count_of,
    proven_scale,
    ratio_of,
    uncertainty_of,
)
from flopledger_agent.gpus.limits import limits_of
from flopledger_core.accelerators import load_table
from flopledger_core.units import INT64_MAX

SECOND_NS = 1_000_000_000
OK = 0
NOT_SUPPORTED = 3
H100 = load_table().by_key("H100 SXM")
FULL = 1.98e9 * H100.sm_count  # cycles of every SM in a second at the highest clock
LIMITS = limits_of(H100)


def answers(
    elapsed: float, active: float, percent: float = 50.0, graphics: float = 100.0
) -> Answers:
    """What a driver with everything would say; `graphics`: how much of the time anything ran."""
    counters = dict.fromkeys(COUNTERS.values(), (OK, active))
    ratios = dict.fromkeys(PERCENTAGES.values(), (OK, percent))
    return {
        **counters,
        **ratios,
        COUNTERS["elapsed"]: (OK, elapsed),
        GRAPHICS_UTIL: (OK, graphics),
    }


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


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[tuple[int, int, bool]], bool, int]:
    """Some seconds of a device: per stretch its length, its clock when awake, and if it works."""
    parts = draw(
        st.lists(
            st.tuples(
                st.integers(1, 1000),  # ms
                st.one_of(st.just(0), st.integers(300_000, 1_980_000)),  # kHz; 0: asleep
                st.booleans(),
            ),
            min_size=1,
            max_size=6,
        )
    )
    return parts, draw(st.booleans()), draw(st.integers(10, 200))


@given(
    stretches(), st.integers(0, 100), st.one_of(st.none(), st.sampled_from([0, -1])), st.booleans()
)
def test_nothing_a_device_does_proves_the_wrong_scale(
    stretched: tuple[list[tuple[int, int, bool]], bool, int],
    stale_ms: int,
    clock_end: int | None,
    told: bool,
) -> None:
    """Awake, asleep, idle and busy for any share of an interval, with counters up to 100 ms old."""
    parts, is_sum, sm_count = stretched
    parts = [(ms, khz, works and khz > 0) for ms, khz, works in parts]
    awake = [khz for _, khz, _ in parts if khz]
    span_ms = sum(ms for ms, _, _ in parts)
    counted = sum(ms * khz for ms, khz, _ in parts)
    counted = max(0, counted - stale_ms * (awake[0] if awake else 0))
    active = Fraction(sum(ms for ms, _, works in parts if works), span_ms)
    # A clock that fell below a third of both readings while it worked is not claimed to be known.
    clock = None if clock_end is None or not awake else min(awake)
    found = proven_scale(
        Interval(
            cycles=counted * (sm_count if is_sum else 1),
            interval_ns=span_ms * 1_000_000,
            active_ratio=active if told else None,
            clock_khz=clock,
        ),
        sm_count=sm_count,
        mean_clock_khz_max=LIMITS.mean_clock_khz,
    )
    assert found in {None, "sum" if is_sum else "mean"}


@pytest.mark.parametrize("sm_count", [16, 132])
@pytest.mark.parametrize("is_sum", [True, False])
def test_a_busy_second_proves_the_scale(sm_count: int, *, is_sum: bool) -> None:
    """Whatever the counters count, work shows it, on a whole GPU as on a small instance."""
    found = proven_scale(
        Interval(
            cycles=1_755_000_000 * (sm_count if is_sum else 1),
            interval_ns=SECOND_NS,
            active_ratio=Fraction(9, 10),
            clock_khz=1_755_000,
        ),
        sm_count=sm_count,
        mean_clock_khz_max=LIMITS.mean_clock_khz,
    )
    assert found == ("sum" if is_sum else "mean")


@pytest.mark.parametrize("cycles", [0, -5, 10_000, 1_980_000_000 * 1000])
def test_a_rate_that_fits_no_scale_proves_none(cycles: int) -> None:
    """A counter that stands, went back, crawls under full load or races is no evidence."""
    interval = Interval(
        cycles=cycles, interval_ns=SECOND_NS, active_ratio=Fraction(1), clock_khz=1_755_000
    )
    assert proven_scale(interval, sm_count=132, mean_clock_khz_max=LIMITS.mean_clock_khz) is None


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


def follow(meter: GpmMeter, *elapsed: float, start: int = 0, graphics: float = 100.0) -> list[str]:
    """Read the counter once a second at the highest clock; what kept cycles absent, each time."""
    whys = []
    for second, value in enumerate(elapsed, start=start):
        reading = meter.interpret(
            answers(value, value / 2, graphics=graphics),
            boot_ns=second * SECOND_NS,
            sm_clock_khz=1_980_000,
            since_delivered=True,
        )
        whys.append(reading.absent.get("cycles", "counted"))
    return whys


def test_a_device_asleep_for_most_of_the_time_never_teaches_the_wrong_scale() -> None:
    """A sum that stands still for 99.2 % of every second looks like the mean of an awake device.

    Once it was believed after two such seconds, and a hundred times too much was counted until the
    first busy one.
    """
    meter = GpmMeter(H100.sm_count, limits=LIMITS)
    asleep = [0.008 * FULL * second for second in range(50)]
    assert set(follow(meter, *asleep, graphics=0.8)) == {"scale_undetermined"}
    busy = [asleep[-1] + FULL * second for second in range(1, 4)]
    assert follow(meter, *busy, start=50) == ["scale_undetermined", "counted", "counted"]
    assert meter.scale == "sum"


def test_an_idle_mean_is_believed_when_it_works() -> None:
    """Idleness cannot tell it from a sleeping sum: percentages serve until work proves it."""
    meter = GpmMeter(H100.sm_count, limits=LIMITS)
    idle = [0.345e9 * second for second in range(10)]
    assert set(follow(meter, *idle, graphics=0.0)) == {"scale_undetermined"}
    busy = [idle[-1] + 1.98e9 * second for second in range(1, 3)]
    assert follow(meter, *busy, start=10) == ["scale_undetermined", "counted"]
    assert meter.scale == "mean"


def test_one_garbled_reading_does_not_teach_a_scale() -> None:
    """Two intervals in a row must agree."""
    meter = GpmMeter(H100.sm_count)
    waking = 0.5 * FULL
    assert follow(meter, 0, waking, waking + 1.98e9) == ["scale_undetermined"] * 3
    assert meter.scale is None


def test_a_driver_that_does_not_tell_activity_proves_no_mean() -> None:
    """Without a witness of being awake a low rate stays unclear; nothing is counted by a guess."""
    meter = GpmMeter(H100.sm_count, limits=LIMITS)
    busy = [1.98e9 * second for second in range(20)]
    assert set(follow(meter, *busy, graphics=math.nan)) == {"scale_undetermined"}


def test_a_scale_that_cannot_be_is_contradicted_and_found_anew() -> None:
    """A scale handed over from before is held against every interval."""
    meter = GpmMeter(H100.sm_count, "mean", LIMITS)
    busy = [FULL * second for second in range(5)]
    assert follow(meter, *busy) == ["counted", *["scale_contradicted"] * 2, *["counted"] * 2]
    assert str(meter.scale) == "sum"


def test_cycles_of_two_scales_are_never_subtracted() -> None:
    """Where the scale changed, ratios end the interval and counting begins again."""
    meter = GpmMeter(H100.sm_count, "mean", LIMITS)
    hands: list[tuple[str | None, bool]] = []
    for second in range(6):
        reading = meter.interpret(
            answers(FULL * second, 0.5 * FULL * second),
            boot_ns=second * SECOND_NS,
            sm_clock_khz=1_980_000,
            since_delivered=True,
        )
        hands.append((reading.tier, reading.cycles is not None))
        # The two readings without a scale never reach the consumer, who still holds a mean.
        meter.settle(delivered=second not in {1, 2})
    assert hands == [
        ("gpm_cycles", True),
        ("gpm_util", False),
        ("gpm_util", False),
        ("gpm_util", True),
        ("gpm_cycles", True),
        ("gpm_cycles", True),
    ]


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


def test_only_sm_activity_is_a_tier_of_its_own() -> None:
    """Without tensor metrics, how busy the SMs were still bounds the work; it says no more."""
    known = {PERCENTAGES["sm_active"], PERCENTAGES["fp32"]}
    coarse: Answers = {
        metric: (OK, 50.0) if metric in known else (NOT_SUPPORTED, 0.0)
        for metric in answers(0.0, 0.0)
    }
    reading = GpmMeter(sm_count=132).interpret(
        coarse, boot_ns=0, sm_clock_khz=None, since_delivered=True
    )
    assert reading.tier == "sm_active"
    assert reading.utilization == {"sm_active": Fraction(1, 2), "fp32": Fraction(1, 2)}
    assert reading.absent["utilization.hmma"] == "not_supported"


def test_a_pipe_alone_is_no_tier() -> None:
    """Neither tensor work nor how busy the SMs were: the caller has a better source."""
    lone: Answers = {PERCENTAGES["fp32"]: (OK, 50.0), PERCENTAGES["sm_active"]: (OK, math.nan)}
    reading = GpmMeter(sm_count=132).interpret(
        lone, boot_ns=0, sm_clock_khz=None, since_delivered=True
    )
    assert (reading.tier, reading.utilization) == (None, None)
    assert reading.absent["utilization"] == "not_a_number"


@given(
    before=st.integers(0, 2**62),
    work=st.integers(0, 2**60),
    is_sum=st.booleans(),
    sm_count=st.integers(10, 200),
)
def test_what_doubles_hide_is_within_the_uncertainty(
    before: int, work: int, is_sum: bool, sm_count: int
) -> None:
    """Counted cycles differ from the true ones by at most the uncertainty of both readings."""
    scale: Scale = "sum" if is_sum else "mean"
    divisor = 1 if is_sum else sm_count
    ends = [float(total // divisor) for total in (before, before + work)]
    factor = sm_count // (sm_count if is_sum else 1)
    counted = (int(ends[1]) - int(ends[0])) * factor
    uncertain = sum(uncertainty_of(int(end), scale, sm_count) for end in ends)
    assert abs(counted - work) <= uncertain


def test_exact_readings_are_certain() -> None:
    """Whole numbers below 2^53 lose nothing; from there on half the distance of doubles."""
    assert uncertainty_of(EXACT_DOUBLES - 1, "sum", 132) == 0
    assert uncertainty_of(EXACT_DOUBLES, "sum", 132) == 1
    assert uncertainty_of(2**60, "sum", 132) == 128
    assert uncertainty_of(1, "mean", 132) == 132
    assert uncertainty_of(2**60, "mean", 132) == 129 * 132
    reading = GpmMeter(132, "sum").interpret(
        answers(2.0**60, 2.0**59), boot_ns=0, sm_clock_khz=None, since_delivered=True
    )
    assert reading.uncertain_cycles == 128
