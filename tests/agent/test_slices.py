"""Slices: integrated power beside the counter, counters that stand still, whose a slice is."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.interface import DeviceFailure
from flopledger_agent.metering import close_windows, empty_state, halt, observe
from flopledger_core.records import GapRecord
from tests.agent.sampling import GPU, SECOND_NS, cycles, node, resting, sample
from tests.agent.test_metering import ATLAS, BIRCH, IDLE, run, usage_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.gpus.interface import GpuSample
    from flopledger_core.records import UsageRecord

# --- power ------------------------------------------------------------------------------------


def powered(
    at_ns: int, power_mw: int | None, energy_mj: int | None = None, **more: object
) -> GpuSample:
    """A reading with power beside the energy counter."""
    return msgspec.structs.replace(
        sample(at_ns, cycles(at_ns), energy_mj), power_mw=power_mw, **more
    )


def of_power(
    readings: Sequence[tuple[int, int | None]], counter: Sequence[int | None], **more: object
) -> list[UsageRecord]:
    """The records of one owner over readings of (seconds, mW) and an energy counter."""
    return usage_of(run([
        (at * SECOND_NS, powered(at * SECOND_NS, power, energy, **more), (ATLAS,))
        for (at, power), energy in zip(readings, counter, strict=True)
    ]))  # fmt: skip


def test_power_is_integrated_beside_the_counter() -> None:
    """The trapezoid under sampled power, in whole millijoules of the window."""
    (record,) = of_power([(0, 100_000), (1, 300_000), (3, 100_001)], [0, 210_000, 600_000])

    assert record.energy_mj == 600_000
    assert record.power_integral_mj == 200_000 + 400_001
    assert (record.energy_origin, record.energy_scope) == ("counter", "gpu")


@given(
    st.lists(st.tuples(st.integers(1, 3 * 10**9), st.integers(0, 2**40)), min_size=2, max_size=20)
)
def test_the_integral_loses_nothing_inside_a_window(steps: list[tuple[int, int]]) -> None:
    """Cut into however many slices, a window's integral is the exact trapezoid, rounded once."""
    at_ns, ticks = 0, []
    for number, (step_ns, power_mw) in enumerate(steps):
        energy = number * 10**7
        ticks.append((at_ns, powered(at_ns, power_mw, energy), (ATLAS, BIRCH)))
        at_ns += step_ns
    exact = sum(
        (Fraction(before[1].power_mw or 0) + (after[1].power_mw or 0)) / 2 * (after[0] - before[0])
        for before, after in pairwise(ticks)
    )
    records = [record for record in usage_of(run(ticks)) if record.absent.get("cycles") is None]
    if ticks[-1][0] >= 1_000_000 and not any("recovered" in record.flags for record in records):
        assert sum(record.power_integral_mj or 0 for record in records) == exact // 10**9


def test_without_a_counter_energy_comes_from_power_and_says_so() -> None:
    """The central value is the integral; the counter is what is absent, with its reason."""
    (record,) = of_power([(0, 500_000), (1, 500_000)], [None, None])

    assert (record.energy_mj, record.energy_origin) == (500_000, "power_integral")
    assert record.power_integral_mj == 500_000
    assert record.absent["energy_counter"] == "not_readable_at_both_ends"
    assert "energy" not in record.absent


def test_power_at_one_end_integrates_to_nothing() -> None:
    """Neither the other end nor dark time is guessed."""
    (record,) = of_power([(0, None), (1, 500_000)], [0, 1_000])
    assert record.power_integral_mj is None
    assert record.absent["power_integral"] == "not_readable_at_both_ends"
    (dark,) = of_power([(0, 400_000), (90, 500_000)], [0, 1_000])
    assert dark.power_integral_mj is None
    assert dark.absent["power_integral"] == "dark_time"


@pytest.mark.parametrize(
    ("power_mw", "seconds", "flagged"),
    [(500_000, 20, False), (549_000, 20, False), (551_000, 20, True), (449_000, 20, True),
     (900_000, 9, False), (900_000, 10, True)],
)  # fmt: skip
def test_peers_row_20_counter_and_power_are_checked_against_each_other(
    power_mw: int, seconds: int, *, flagged: bool
) -> None:
    """More than a tenth apart over ten seconds is flagged, less or shorter is not."""
    (record,) = of_power(
        [(at, power_mw) for at in range(seconds + 1)],
        [at * 500_000 for at in range(seconds + 1)],
    )
    assert ("energy_cross_check" in record.flags) == flagged


def test_a_load_that_ends_is_no_disagreement() -> None:
    """Power is a mean of the second before: a quiet window begins with a second of the old load."""
    (record,) = of_power(
        [(at, 600_000 if at == 0 else 75_000) for at in range(12)],
        [at * 75_000 for at in range(12)],
    )
    assert record.power_integral_mj == 75_000 * 11 + 262_500
    assert record.flags == ()


def test_peers_row_20_a_modules_counter_is_not_checked_against_the_gpus_power() -> None:
    """A Grace module's counter holds CPU and memory, too: the scope is recorded, not flagged."""
    (record,) = of_power(
        [(at, 500_000) for at in range(15)], [at * 900_000 for at in range(15)],
        energy_scope="module",
    )  # fmt: skip
    assert record.energy_scope == "module"
    assert record.flags == ()
    assert record.absent["energy_cross_check"] == "module_counter"


# --- errors and uncertainty -------------------------------------------------------------------


def test_an_xid_flags_its_own_window() -> None:
    """The slice in which the driver reported it stands apart; told by a failure it is kept."""
    ticks = [
        (at * SECOND_NS, msgspec.structs.replace(
            sample(at * SECOND_NS, cycles(at), at), xids=(31,) if at == 2 else ()), (ATLAS,))
        for at in range(5)
    ]  # fmt: skip
    assert [(r.gpu_time_ms, r.flags) for r in usage_of(run(ticks))] == [
        (1000, ()), (1000, ("xid_error",)), (2000, ()),
    ]  # fmt: skip

    state = empty_state("boot-1")
    lost = DeviceFailure(device=GPU, reason="gpu_is_lost", xids=(79,))
    for tick in (
        node(0, sample(0, cycles(0), 0)),
        node(SECOND_NS, failures=(lost,)),
        node(2 * SECOND_NS, sample(2 * SECOND_NS, cycles(2), 2)),
    ):
        state, _ = observe(state, tick, {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS)
    (record,) = usage_of(close_windows(state))
    assert record.flags == ("xid_error",)


def test_the_uncertainty_of_a_sum_is_that_of_its_ends() -> None:
    """Readings in between are added once and subtracted once, so only two of them count."""
    ticks = [
        (at * SECOND_NS, msgspec.structs.replace(
            sample(at * SECOND_NS, cycles(at * 1000), at), uncertain_cycles=10 + at), owners)
        for at, owners in enumerate([(ATLAS,)] * 3 + [(ATLAS, BIRCH)] * 3)
    ]  # fmt: skip
    found = [record.uncertain_cycles for record in usage_of(run(ticks))]
    assert found == [10 + 12, 14, 14]  # (12 + 15) / 2, rounded up, for each of two sharers


# --- counters that stand still ----------------------------------------------------------------


def frozen_ticks() -> Sequence[tuple[int, GpuSample, tuple[Claim, ...]]]:
    """Ten seconds in which the counters of a busy device do not move, from second 3 to 7."""
    ticks = []
    for at in range(11):
        counted = at if at < 3 else max(3, at if at >= 7 else 3)
        reading = msgspec.structs.replace(
            sample(at * SECOND_NS, cycles(counted * 1000), counted * 500),
            sm_clock_khz=1_700_000, power_mw=500_000, processes=(7,),
        )  # fmt: skip
        ticks.append((at * SECOND_NS, reading, (ATLAS,)))
    return ticks


def test_peers_row_8_stale_counters_under_green_health_are_not_idleness() -> None:
    """The driver answers the same again and again: absent with the reason, never zero work."""
    records = usage_of(run(frozen_ticks()))
    untold = [record for record in records if record.absent.get("cycles") == "counter_frozen"]

    assert sum(record.gpu_time_ms for record in untold) == 4000
    assert all(record.cycles.elapsed is None for record in untold)
    assert {record.energy_origin for record in untold} == {"power_integral"}
    assert {record.absent["energy_counter"] for record in untold} == {"counter_frozen"}
    # What came in one jump when the counters moved again is bounded by that time, not counted.
    assert sum(record.cycles.elapsed or 0 for record in records) == (3 + 3) * 1000
    assert sum(record.gpu_time_ms for record in records) == 10_000


def test_a_sleeping_device_counts_nothing_and_is_believed() -> None:
    """Its clock is gated: nobody is on it, and its energy counter shows that the driver lives."""
    ticks = [
        (at * SECOND_NS, msgspec.structs.replace(
            sample(at * SECOND_NS, cycles(5000), at * 70), sm_clock_khz=345_000,
            power_mw=70_000), (IDLE,))
        for at in range(5)
    ]  # fmt: skip
    (record,) = usage_of(run(ticks))
    assert (record.cycles.elapsed, record.energy_mj) == (0, 280)


def test_short_slices_do_not_make_a_counter_frozen() -> None:
    """Counters refresh every 100 ms: an extra reading may see what the one before saw."""
    ticks = []
    for number, counted in enumerate([0, 0, 200, 200, 400]):
        at_ns = number * 100_000_000
        ticks.append((at_ns, msgspec.structs.replace(
            sample(at_ns, cycles(counted), counted), sm_clock_khz=1_700_000, power_mw=500_000,
            processes=(7,)), (ATLAS,)))  # fmt: skip
    records = usage_of(run(ticks))
    assert sum(record.cycles.elapsed or 0 for record in records) == 400
    assert all("cycles" not in record.absent for record in records)


# --- whose a slice is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "ended", "expected"),
    [
        ((), (1,), set(), "birch"),  # whoever is there at the end held it since the reading before
        ((1,), (), {1}, "atlas"),  # the reading was taken for its exit
        ((1,), (2,), {1}, "atlas"),
        ((1, 2), (2,), {1}, "atlas"),
        ((1,), (), set(), "birch"),  # it let go of the device, nobody knows when
        ((1,), (), {7}, "birch"),  # somebody else's exit
        ((1,), (1,), {1}, "birch"),  # the driver still lists it
        ((1,), (1, 2), set(), "birch"),
        (None, (), {1}, "birch"),  # not known who was there
        ((1,), None, {1}, "birch"),
    ],
)
def test_a_slice_that_ends_at_an_exit_belongs_to_who_was_there(
    before: tuple[int, ...] | None, after: tuple[int, ...] | None, ended: set[int], expected: str
) -> None:
    """The process is gone at the reading that its exit was the reason for."""
    state = empty_state("boot-1")
    for at, pids, owner, told in ((0, before, ATLAS, set[int]()), (1, after, BIRCH, ended)):
        at_ns = at * SECOND_NS
        reading = msgspec.structs.replace(sample(at_ns, cycles(at), at), processes=pids)
        state, _ = observe(
            state, node(at_ns, reading), {GPU.key: (owner,)}, tick_ns=SECOND_NS,
            ended=frozenset(told),
        )  # fmt: skip
    (record,) = usage_of(close_windows(state))
    assert record.owner.project == expected


def test_a_suspended_node_is_dark_not_idle() -> None:
    """Boot time counts suspension: an hour asleep is recovered dark time, nobody's, not zeros."""
    ticks = [
        (at, powered(at, 300_000, at // SECOND_NS * 300), (ATLAS,))
        for at in (0, SECOND_NS, 1800 * SECOND_NS, 1801 * SECOND_NS)
    ]
    before, asleep, after = usage_of(run(ticks))
    assert (before.owner.project, after.owner.project) == ("atlas", "atlas")
    assert asleep.flags == ("recovered",)
    assert asleep.owner.kind == "unattributed"
    assert asleep.power_integral_mj is None
    assert asleep.gpu_time_ms == 1_799_000


# --- work that nobody is seen to do ----------------------------------------------------------


@pytest.mark.parametrize(
    ("active", "kind"), [(0, "idle"), (1000, "idle"), (1001, "unattributed"), (1, "idle")]
)
def test_activity_without_a_visible_process_is_not_idleness(active: int, kind: str) -> None:
    """More than a thousandth of the cycles, of any pipe: somebody worked, and nobody knows who."""
    after = msgspec.structs.replace(resting(1_000_000), integer=active)
    state = run([
        (0, sample(0, resting(0), 0), (IDLE,)),
        (SECOND_NS, sample(SECOND_NS, after, 7), (IDLE,)),
    ])  # fmt: skip
    (record,) = usage_of(state)

    assert (record.owner.kind, record.energy_mj, record.cycles.integer) == (kind, 7, active)
    assert (record.attribution.evidence == "activity without a visible process") == (kind != "idle")


@pytest.mark.parametrize(("percent", "kind"), [(0, "idle"), (1, "unattributed")])
def test_the_coarse_tier_sees_work_without_a_process_too(percent: int, kind: str) -> None:
    """One hundredth of utilisation is work."""
    readings = [
        msgspec.structs.replace(
            sample(at_ns, None, at_ns // 10**7), tier="gpu_util", sm_clock_khz=1_000_000,
            utilization={"sm_active": Fraction(percent, 100)},
        )
        for at_ns in (0, SECOND_NS)
    ]  # fmt: skip
    state = run([(n * SECOND_NS, reading, (IDLE,)) for n, reading in enumerate(readings)])
    (record,) = usage_of(state)

    assert (record.owner.kind, record.tier) == (kind, "gpu_util")


def test_a_visible_process_keeps_its_work() -> None:
    """The rule is for devices on which nobody is seen."""
    state = run([
        (0, sample(0, cycles(0), 0), (ATLAS,)),
        (SECOND_NS, sample(SECOND_NS, cycles(1000, 500), 7), (ATLAS,)),
    ])  # fmt: skip
    assert [record.owner.project for record in usage_of(state)] == ["atlas"]


@pytest.mark.parametrize(("claims", "owner"), [((IDLE,), None), ((ATLAS,), "atlas")])
def test_a_pause_hides_no_work_as_idleness(claims: tuple[Claim, ...], owner: str | None) -> None:
    """Nobody was on the device when metering stopped, and somebody wanted it: nobody knows who."""
    state, _ = observe(empty_state("b"), node(0, sample(0, resting(0))), {GPU.key: claims},
                       tick_ns=SECOND_NS)  # fmt: skip
    failure = DeviceFailure(device=GPU, reason="paused")
    state, _ = observe(halt(state, "paused"), node(30 * SECOND_NS, failures=(failure,)), {},
                       tick_ns=SECOND_NS)  # fmt: skip
    (gap,) = [item.record for item in close_windows(state).closed]

    assert isinstance(gap, GapRecord)
    assert (gap.gap_ms, gap.reason, gap.owner.project) == (30_000, "paused", owner)
    assert gap.owner.kind == ("unattributed" if owner is None else "attributed")
