"""What one reading of one device says: its mean clock, its energy's scope, how exact it is."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_agent.gpus.clock_samples import MISSES_MAX, ClockMean, ClockSamples
from flopledger_agent.gpus.interface import GpuSample
from flopledger_agent.gpus.limits import UNKNOWN_LIMITS, limits_of
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.functions import fields
from flopledger_core.accelerators import load_table
from flopledger_core.records import CYCLE_FIELDS, Cycles
from tests.agent.gpus.nodes import PHASE, Node, node, scenario

R580 = 'driver_version = "580.65.06"'
NO_BUFFER = R580 + '\nmissing_functions = ["nvmlDeviceGetSamples"]'
HIGHEST_KHZ = 3_000_000
# 0.9 s at 1.98 GHz and 0.1 s at 345 MHz, over and over: what both ends of a second see is wrong.
BURSTS = (
    PHASE.replace("1000.0", "0.9").replace("1755", "1980")
    + PHASE.replace("1000.0", "0.1").replace("1755", "345")
) * 40
BURST_MEAN_KHZ = 1_816_500


def clocks(newest: int, *megahertz: int) -> ClockSamples:
    """What the driver's buffer holds."""
    return ClockSamples(newest_unix_us=newest, sm_clocks_khz=tuple(1000 * mhz for mhz in megahertz))


def only(it: Node, seconds: float = 1.0) -> GpuSample:
    """The one device's sample after some time."""
    (sample,) = it.tick(seconds).samples
    return sample


# --- the mean clock ------------------------------------------------------------------------------


def test_each_buffered_sample_counts_once() -> None:
    """The first call learns where the buffer stands; from then on means are of what is newer."""
    mean = ClockMean()
    asked: list[int] = []

    def read(after: int) -> ClockSamples:
        asked.append(after)
        return clocks(after + 10, 1000, 2000)

    assert mean.of_samples(read, HIGHEST_KHZ) is None
    mean.settle(delivered=True)
    assert mean.of_samples(read, HIGHEST_KHZ) == 1_500_000
    mean.settle(delivered=False)
    assert mean.of_samples(read, HIGHEST_KHZ) == 1_500_000
    mean.settle(delivered=True)
    mean.of_samples(read, HIGHEST_KHZ)
    assert asked == [0, 10, 10, 20]


def test_an_empty_buffer_counts_whatever_comes() -> None:
    """A driver that had no sample yet has only new ones next time."""
    mean = ClockMean()
    assert mean.of_samples(lambda _: None, HIGHEST_KHZ) is None
    mean.settle(delivered=True)
    assert mean.of_samples(lambda _: clocks(5, 1500), HIGHEST_KHZ) == 1_500_000


def test_stamps_that_step_back_are_found_again() -> None:
    """The wall clock went back: nothing is newer than the stamp, so the driver is asked anew."""
    mean = ClockMean()
    now = 1000

    def read(after: int) -> ClockSamples | None:
        return clocks(now, 1500) if now > after else None

    mean.of_samples(read, HIGHEST_KHZ)
    now = 100
    found: list[int | None] = []
    for _ in range(MISSES_MAX + 3):
        mean.settle(delivered=True)
        found.append(mean.of_samples(read, HIGHEST_KHZ))
        now += 1
    assert found == [None] * (MISSES_MAX + 1) + [1_500_000] * 2


def test_a_buffer_left_aside_for_a_while_begins_anew() -> None:
    """Samples of time in which another source served belong to no interval of this one."""
    mean = ClockMean()
    mean.of_samples(lambda _: clocks(5, 1500), HIGHEST_KHZ)
    mean.settle(delivered=True)
    mean.settle(delivered=True)  # a delivered sample that did not need the buffer
    assert mean.of_samples(lambda _: clocks(99, 1500), HIGHEST_KHZ) is None


def test_clocks_no_device_has_are_not_in_the_mean() -> None:
    """A mark of absence in the buffer costs itself only."""
    mean = ClockMean()
    mean.of_samples(lambda _: None, HIGHEST_KHZ)
    mean.settle(delivered=True)
    garbled = clocks(9, 1500, 2**32 - 1, 0, -1, 1700)
    assert mean.of_samples(lambda _: garbled, HIGHEST_KHZ) == 1_600_000


def test_the_ends_of_an_interval_are_those_that_were_delivered() -> None:
    """One reading alone is itself; an interval's mean is of its own two ends."""
    mean = ClockMean()
    assert mean.of_ends(1000) == 1000
    mean.settle(delivered=True)
    assert mean.of_ends(3000) == 2000
    mean.settle(delivered=False)
    assert mean.of_ends(2000) == 1500
    mean.settle(delivered=True)
    assert mean.of_ends(None) is None


@pytest.mark.parametrize("model", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
def test_a_clock_that_moves_inside_a_tick_is_averaged_by_the_driver(model: str) -> None:
    """The mean of a second of bursts, not what its ends happen to show."""
    with node(scenario(head=R580, model=model, phase=BURSTS)) as it:
        it.warm()
        sample = only(it)
        assert sample.tier in {"gpm_util", "gpu_util"}
        assert sample.sm_clock_khz == BURST_MEAN_KHZ
        assert "sm_clock_samples" not in sample.absent
        assert only(it, 2.0).sm_clock_khz == BURST_MEAN_KHZ


def test_without_a_buffer_the_clock_is_the_mean_of_both_ends_and_says_so() -> None:
    """Neither the boost clock nor the maximum: what was read."""
    ramp = PHASE.replace("1000.0", "3.0").replace("1755", "1005") + PHASE
    with node(scenario(head=NO_BUFFER, phase=ramp)) as it:
        it.warm()
        only(it)
        sample = only(it)
        assert sample.sm_clock_khz == (1_005_000 + 1_755_000) // 2
        assert sample.absent["sm_clock_samples"] == "function_not_found"
        assert only(it).sm_clock_khz == 1_755_000


def test_a_failed_reading_of_the_clock_does_not_lose_the_mean() -> None:
    """The buffer serves where the call of the moment does not answer."""
    with node(scenario(head=R580)) as it:
        it.warm()
        it.driver.inject(
            Fault(kind="error", code=999, functions=frozenset({"nvmlDeviceGetClockInfo"}))
        )
        sample = only(it)
        assert sample.sm_clock_khz == 1_755_000
        assert "sm_clock_khz" not in sample.absent


def test_counted_cycles_do_not_pay_for_the_buffer() -> None:
    """Where cycles are counted the clock is only shown: no further call of the driver."""
    with node() as it:
        it.warm()
        it.driver.inject(
            Fault(kind="error", code=15, functions=frozenset({"nvmlDeviceGetSamples"}))
        )
        assert only(it).tier == "gpm_cycles"


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(300, 1980)), min_size=1, max_size=12))
def test_the_mean_clock_is_that_of_the_schedule(parts: list[tuple[int, int]]) -> None:
    """Clocks that change at tenths of a second: the buffer's mean is the true one."""
    phases = "".join(
        PHASE.replace("1000.0", f"{tenths / 10}").replace("1755", f"{megahertz}")
        for tenths, megahertz in parts
    )
    with node(scenario(head=R580, phase=phases)) as it:
        it.tick()
        before = only(it)
        after = only(it, 1.5)
        truth = it.driver.truth_between(before.boot_ns, after.boot_ns).gpus[0].whole
        true_khz = truth.elapsed_cycles / 132 * 1_000_000 / (after.boot_ns - before.boot_ns)
        assert after.sm_clock_khz is not None
        assert abs(after.sm_clock_khz - true_khz) <= 1


# --- energy and its scope ------------------------------------------------------------------------

MODULE = "energy_scope = 'module'\nother_power_watts = 150"


def module_row() -> str:
    """A model of the table whose energy counter covers its module."""
    return next(row.names[0] for row in load_table().accelerators if row.energy_scope == "module")


def test_power_of_a_module_is_read_where_its_energy_counter_counts() -> None:
    """Like with like: the cross-check of a Grace part would be wrong by its CPU otherwise."""
    with node(scenario(MODULE, model=module_row())) as it:
        first = it.warm().samples[0]
        sample = only(it, 10.0)
        assert (sample.energy_scope, sample.power_mw) == ("module", 612_500)
        assert sample.energy_mj is not None
        assert first.energy_mj is not None
        assert sample.energy_mj - first.energy_mj == 10 * 612_500
        assert sample.energy_counter_mj == sample.energy_mj


@pytest.mark.parametrize(("field", "expected"), [(185, 612_500), (186, None)])
def test_a_driver_without_average_module_power_gives_that_of_the_instant(
    field: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field 186 where 185 is not offered, and absent with the reason where neither is."""
    left = {} if field == 186 else {186: lambda device, now_ns: device.power_mw(now_ns)}
    monkeypatch.setattr(fields, "_POWERS", left)
    with node(scenario(MODULE, model=module_row())) as it:
        sample = it.warm().samples[0]
        assert sample.power_mw == expected
        if expected is None:
            assert sample.absent["power_mw"] == "not_supported"


def test_power_of_a_gpu_alone_is_its_own() -> None:
    """No Grace part: the counter and the power are the GPU's."""
    with node() as it:
        sample = it.warm().samples[0]
        assert (sample.energy_scope, sample.power_mw) == ("gpu", 612_500)


# --- how exact counters are ----------------------------------------------------------------------


def counted(before: Cycles | None, after: Cycles | None, field: str) -> int:
    """How far one counter advanced."""
    return (getattr(after, field) or 0) - (getattr(before, field) or 0)


@settings(deadline=None, max_examples=25)
@given(
    offset=st.one_of(
        st.integers(2**53 - 10**12, 2**53 + 10**12), st.integers(0, 2**60 - 1), st.just(2**60)
    ),
    scale=st.sampled_from(["sum", "mean"]),
    seconds=st.lists(st.integers(1, 2000), min_size=1, max_size=5),
)
def test_counters_beyond_two_to_the_53_say_how_far_they_may_be_off(
    offset: int, scale: str, seconds: list[int]
) -> None:
    """Doubles: the difference is off by no more than both ends admit; energy stays exact."""
    text = scenario(f"cycles_offset = {offset}\ncycle_scale = '{scale}'")
    with node(text) as it:
        before = it.warm().samples[0]
        for milliseconds in seconds:
            after = only(it, milliseconds / 1000)
            whole = it.driver.truth_between(before.boot_ns, after.boot_ns).gpus[0].whole
            true = {
                "elapsed": whole.elapsed_cycles,
                "sm_active": whole.sm_active_cycles,
                **whole.active_cycles,
            }
            uncertain = before.uncertain_cycles + after.uncertain_cycles
            for field in CYCLE_FIELDS:
                off = abs(counted(before.cycles, after.cycles, field) - true[field])
                # Part cycles of the exact schedule are rounded down by the driver at both ends.
                assert off <= uncertain + 1, field
            energy = (after.energy_mj or 0) - (before.energy_mj or 0)
            assert abs(energy - whole.energy_mj) < 1
            before = after


def test_below_two_to_the_53_counters_are_certain() -> None:
    """And they cross it without a jump."""
    second = 132 * 1_755_000_000
    offset = 2**53 - 3 * second
    with node(scenario(f"cycles_offset = {offset}")) as it:
        samples = [it.warm().samples[0], *(only(it) for _ in range(4))]
        assert [sample.uncertain_cycles for sample in samples] == [0, 1, 1, 1, 1]
        for before, after in itertools.pairwise(samples):
            off = counted(before.cycles, after.cycles, "elapsed") - second
            assert abs(off) <= before.uncertain_cycles + after.uncertain_cycles


# --- what the device is --------------------------------------------------------------------------


def test_limits_of_an_unknown_model_are_those_of_its_architecture() -> None:
    """A stand-in has the extremes of its kin; without one nothing is known, and little refused."""
    table = load_table()
    stand_in = table.resolve("NVIDIA X1", None, "9.0")
    assert stand_in is not None
    kin = [row for row in table.accelerators if row.architecture == "hopper"]
    limits = limits_of(stand_in.accelerator)
    assert limits.power_mw >= max(limits_of(row).power_mw for row in kin)
    assert limits.power_mw < UNKNOWN_LIMITS.power_mw
    assert limits.sm_clock_khz < UNKNOWN_LIMITS.sm_clock_khz
    assert limits_of(None) == UNKNOWN_LIMITS


def test_only_sm_activity_makes_the_tier_sm_active() -> None:
    """A driver whose GPM has no tensor metrics still says how busy the SMs were."""
    tensor = frozenset({5, 6, 7, 8, 9})
    with node(scenario(head=R580)) as it:
        it.driver.inject(Fault(kind="metric_error", code=3, metrics=tensor))
        it.warm()
        sample = only(it)
        assert sample.tier == "sm_active"
        assert sample.utilization is not None
        assert abs(sample.utilization["sm_active"] - Fraction(98, 100)) < Fraction(1, 10**12)
        assert sample.absent["utilization.hmma"] == "not_supported"
