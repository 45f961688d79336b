"""Metering conserves time and counts, splits by rule, and never fills darkness with numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.interface import DeviceFailure
from flopledger_agent.metering import (
    MeterState,
    close_windows,
    empty_state,
    halt,
    is_due,
    observe,
    records_of,
    resume,
)
from flopledger_agent.windows import shares
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.sampling import (
    BOOT_NS,
    GPU,
    SECOND_NS,
    UNIX_NS,
    claim,
    cycles,
    node,
    resting,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.gpus.interface import GpuSample

ATLAS, BIRCH, IDLE = claim("atlas"), claim("birch"), claim()


def run(ticks: Sequence[tuple[int, GpuSample, tuple[Claim, ...]]], step_ns: int = 0) -> MeterState:
    """Feed ticks of one device and close."""
    state = empty_state("boot-1")
    for at_ns, reading, owners in ticks:
        state, _ = observe(
            state, node(at_ns, reading, step_ns=step_ns), {GPU.key: owners}, tick_ns=SECOND_NS
        )
    return close_windows(state)


def usage_of(state: MeterState) -> list[UsageRecord]:
    """The usage records that closed."""
    return [record for record in records_of(state.closed) if isinstance(record, UsageRecord)]


def test_two_samples_make_one_record() -> None:
    """The record is the difference of the counters, owned by whoever is seen."""
    state = run([
        (0, sample(0, cycles(1000, 100), 5_000), (ATLAS,)),
        (SECOND_NS, sample(SECOND_NS, cycles(3000, 900), 5_700), (ATLAS,)),
    ])  # fmt: skip
    (record,) = usage_of(state)

    assert record.cycles == cycles(2000, 800)
    assert record.energy_mj == 700
    assert record.energy_counter_mj == 5_700
    assert (record.gpu_time_ms, record.window_ms, record.wall_time_ms) == (1000, 1000, 1000)
    assert record.owner.project == "atlas"
    assert record.cycles_origin == "measured"
    assert record.start_unix_ms == UNIX_NS // 1_000_000


def test_windows_split_where_owners_change() -> None:
    """A job that starts is metered from the sample before it was first seen."""
    second = SECOND_NS
    state = run([
        (0, sample(0, cycles(0), 0), (IDLE,)),
        (second, sample(second, resting(10), 1), (IDLE,)),
        (2 * second, sample(2 * second, cycles(30), 4), (ATLAS,)),
        (3 * second, sample(3 * second, cycles(60), 9), (ATLAS,)),
    ])  # fmt: skip
    idle, atlas = usage_of(state)

    assert (idle.owner.kind, idle.cycles.elapsed, idle.energy_mj) == ("idle", 10, 1)
    assert (atlas.owner.project, atlas.cycles.elapsed, atlas.energy_mj) == ("atlas", 50, 8)
    assert idle.end_boot_ms == atlas.start_boot_ms


@given(st.integers(0, 10**18), st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_shares_sum_to_the_whole(total: int, weights: list[int]) -> None:
    """The remainder rule loses nothing and favours nobody by more than one unit."""
    parts = shares(total, weights)

    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - Fraction(total * weight, sum(weights))) < 1


def test_a_shared_device_is_split_once_and_flagged() -> None:
    """Three owners of one device: the parts sum to the device, every one flagged."""
    owners = (ATLAS, BIRCH, claim("cedar"))
    state = run([
        (0, sample(0, cycles(0), 0), owners),
        (SECOND_NS, sample(SECOND_NS, cycles(1000, 500), 100), owners),
    ])  # fmt: skip
    records = usage_of(state)

    assert sum(record.gpu_time_ms for record in records) == 1000
    assert sum(record.cycles.any_tensor or 0 for record in records) == 500
    assert sum(record.energy_mj or 0 for record in records) == 100
    assert all("shared" in record.flags for record in records)
    assert {record.attribution.sharers for record in records} == {3}


def test_a_restarted_counter_gives_an_absent_quantity() -> None:
    """No negative, no guess: the slice has no energy and says why; the next one has again."""
    second = SECOND_NS
    state = run([
        (0, sample(0, cycles(0), 900), (ATLAS,)),
        (second, sample(second, cycles(10), 20), (ATLAS,)),
        (2 * second, sample(2 * second, cycles(20), 50), (ATLAS,)),
    ])  # fmt: skip
    reset, after = usage_of(state)

    assert reset.energy_mj is None
    assert "restarted" in reset.absent["energy"]
    assert "counter_reset" in reset.flags
    assert reset.cycles.elapsed == 10
    assert after.energy_mj == 30
    assert "counter_reset" not in after.flags


def test_absent_counters_never_read_as_zero() -> None:
    """A device that answers nothing leaves a gap, not a record of zeros."""
    state = run([
        (0, sample(0, None, None, absent={"energy": "not supported"}), (ATLAS,)),
        (SECOND_NS, sample(SECOND_NS, None, None, absent={"energy": "not supported"}), (ATLAS,)),
    ])  # fmt: skip
    (gap,) = records_of(state.closed)

    assert isinstance(gap, GapRecord)
    assert gap.gap_ms == 1000
    assert gap.owner.project == "atlas"


def test_dark_time_is_bridged_flagged_and_nobodys() -> None:
    """After a long silence cumulative counters bridge it as one recovered record."""
    later = 600 * SECOND_NS
    state = run([
        (0, sample(0, cycles(0), 0), (ATLAS,)),
        (SECOND_NS, sample(SECOND_NS, cycles(10), 10), (ATLAS,)),
        (later, sample(later, cycles(6000), 6000), (ATLAS,)),
    ])  # fmt: skip
    _, dark = usage_of(state)

    assert dark.flags == ("recovered",)
    assert dark.owner.kind == "unattributed"
    assert (dark.cycles.elapsed, dark.energy_mj) == (5990, 5990)
    assert dark.gpu_time_ms == 599_000


def test_a_reboot_leaves_a_gap_from_the_last_reading() -> None:
    """Counters of another boot bridge nothing."""
    state = empty_state("boot-1")
    state, _ = observe(
        state, node(0, sample(0, cycles(0), 0)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )
    resumed = resume(state, "boot-2", 7 * SECOND_NS, UNIX_NS + 90 * SECOND_NS)
    (gap,) = records_of(resumed.closed)

    assert isinstance(gap, GapRecord)
    assert gap.gap_ms == 90_000
    assert gap.start_boot_ms is None
    assert not bridging(resumed)


def test_a_device_that_never_comes_back_after_a_reboot_is_still_missed() -> None:
    """From the agent's start on it is dark until it answers: no second falls between the two."""
    state = empty_state("boot-1")
    state, _ = observe(
        state, node(0, sample(0, cycles(0), 0)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )
    resumed = resume(state, "boot-2", BOOT_NS + 90 * SECOND_NS, UNIX_NS + 90 * SECOND_NS)
    gone = DeviceFailure(device=GPU, reason="device_missing")
    late, _ = observe(resumed, node(3700 * SECOND_NS, failures=(gone,)), {}, tick_ns=SECOND_NS)
    back, _ = observe(resumed, node(93 * SECOND_NS, sample(93 * SECOND_NS, cycles(5), 9)),
                      {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS)  # fmt: skip
    for state, reason, gap_ms in ((late, "device_missing", 3_610_000), (back, "dark_time", 3_000)):
        _, gap = records_of(close_windows(state).closed)
        assert isinstance(gap, GapRecord)
        assert (gap.reason, gap.gap_ms, gap.owner.kind) == (reason, gap_ms, "unattributed")


def bridging(state: MeterState) -> bool:
    """Whether anything could be counted across to the next sample."""
    return any(
        (device.anchor.cycles, device.anchor.energy_mj, device.anchor.energy_counter_mj)
        != (None, None, None)
        for device in state.devices.values()
    )


def test_a_wall_clock_step_is_flagged_and_durations_keep() -> None:
    """The calendar moves by an hour; the window still lasts one second."""
    state = empty_state("boot-1")
    for at_ns, step_ns in ((0, 0), (SECOND_NS, 3600 * SECOND_NS)):
        state, _ = observe(
            state,
            node(at_ns, sample(at_ns, cycles(at_ns), at_ns), step_ns=step_ns),
            {GPU.key: (ATLAS,)},
            tick_ns=SECOND_NS,
        )
    (record,) = usage_of(close_windows(state))

    assert record.flags == ("clock_stepped",)
    assert record.gpu_time_ms == 1000


def test_windows_are_due_when_their_minute_is_over() -> None:
    """Windows close at UTC minutes, or at tens of minutes when the spool fills."""
    state = empty_state("boot-1")
    for at_ns in (0, SECOND_NS):
        state, _ = observe(
            state,
            node(at_ns, sample(at_ns, cycles(at_ns), at_ns)),
            {GPU.key: (ATLAS,)},
            tick_ns=SECOND_NS,
        )

    assert not is_due(state, UNIX_NS + 59 * SECOND_NS, 1)
    assert is_due(state, UNIX_NS + 60 * SECOND_NS, 1)
    assert not is_due(state, UNIX_NS + 60 * SECOND_NS, 10)


def test_state_survives_its_file() -> None:
    """What is persisted each tick comes back equal."""
    state = run([
        (0, sample(0, cycles(0), 0), (ATLAS, BIRCH)),
        (SECOND_NS, sample(SECOND_NS, cycles(7), 7), (ATLAS, BIRCH)),
    ])  # fmt: skip

    assert msgspec.json.decode(msgspec.json.encode(state), type=MeterState) == state


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, GpuSample, tuple[Claim, ...]]]:
    """Random ticks: owners come and go, counters run, vanish and restart, samples are missed."""
    at_ns, elapsed, energy = 0, 0, 0
    ticks = []
    for _ in range(draw(st.integers(2, 25))):
        owners = draw(st.sampled_from([
            (IDLE,), (ATLAS,), (BIRCH,), (ATLAS, BIRCH),
            (claim("atlas", 3), claim("birch"), claim("cedar", 2)),
        ]))  # fmt: skip
        has_cycles, has_energy = draw(st.booleans()), draw(st.booleans())
        ticks.append((
            at_ns,
            sample(at_ns, cycles(elapsed, elapsed // 3) if has_cycles else None,
                   energy if has_energy else None),
            owners,
        ))  # fmt: skip
        at_ns += draw(st.sampled_from([SECOND_NS, SECOND_NS, 1_003_000_017, 61 * SECOND_NS]))
        restarted = draw(st.integers(0, 9)) == 0
        elapsed = 0 if restarted else elapsed + draw(st.integers(0, 10**12))
        energy = 0 if restarted else energy + draw(st.integers(0, 10**6))
    return ticks


@given(histories())
def test_time_is_conserved_whatever_happens(
    ticks: list[tuple[int, GpuSample, tuple[Claim, ...]]],
) -> None:
    """Per device: windows and gaps tile from first to last sample, shares sum to each window."""
    records = records_of(run(ticks).closed)
    spans: dict[tuple[int, int], int] = {}
    for record in records:
        if isinstance(record, UsageRecord):
            span = (record.start_boot_ms, record.end_boot_ms)
            spans[span] = spans.get(span, 0) + record.gpu_time_ms
        else:
            assert isinstance(record, GapRecord)
            assert record.start_boot_ms is not None
            spans[record.start_boot_ms, record.start_boot_ms + record.gap_ms] = record.gap_ms
    ordered = sorted(spans)

    assert ordered[0][0] == ticks[0][1].boot_ns // 1_000_000
    assert ordered[-1][1] == ticks[-1][1].boot_ns // 1_000_000
    assert all(left[1] == right[0] for left, right in pairwise(ordered))
    assert all(time == end - start for (start, end), time in spans.items())


@given(histories())
def test_counts_are_conserved_whatever_happens(
    ticks: list[tuple[int, GpuSample, tuple[Claim, ...]]],
) -> None:
    """Energy over all records is exactly what the counter counted between readable readings."""
    state = run(ticks)
    expected = 0
    for (_, before, _), (_, after, _) in pairwise(ticks):
        if before.energy_mj is not None and after.energy_mj is not None:
            expected += max(0, after.energy_mj - before.energy_mj)

    assert sum(record.energy_mj or 0 for record in usage_of(state)) == expected


def test_the_first_slice_after_a_restart_is_recovered_however_short() -> None:
    """Nobody watched: not even three seconds are given to whoever is there now."""
    state = empty_state("boot-1")
    for at_ns in (0, SECOND_NS):
        state, _ = observe(
            state, node(at_ns, sample(at_ns, cycles(at_ns), at_ns)), {GPU.key: (ATLAS,)},
            tick_ns=SECOND_NS,
        )  # fmt: skip
    state = resume(state, "boot-1", BOOT_NS + 3 * SECOND_NS, UNIX_NS + 3 * SECOND_NS)
    later = 4 * SECOND_NS
    state, _ = observe(
        state, node(later, sample(later, cycles(later), later)), {GPU.key: (BIRCH,)},
        tick_ns=SECOND_NS,
    )  # fmt: skip
    _, dark = usage_of(close_windows(state))

    assert dark.flags == ("recovered",)
    assert dark.owner.kind == "unattributed"
    assert dark.gpu_time_ms == 3000


@pytest.mark.parametrize(("boot_id", "now_boot_ns"), [("boot-1", 1), ("boot-2", 10**15)])
def test_another_boot_is_never_bridged(boot_id: str, now_boot_ns: int) -> None:
    """A boot time that went back is another boot, whatever its id says."""
    state = empty_state("boot-1")
    state, _ = observe(
        state, node(0, sample(0, cycles(0), 0)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )
    resumed = resume(state, boot_id, now_boot_ns, UNIX_NS + 60 * SECOND_NS)

    assert not bridging(resumed)
    assert [type(record) for record in records_of(resumed.closed)] == [GapRecord]


def test_a_boot_without_an_id_is_never_bridged() -> None:
    """Two unknown boots are not known to be one."""
    state = empty_state("unknown")
    state, _ = observe(
        state, node(0, sample(0, cycles(0), 0)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )

    assert not bridging(resume(state, "unknown", BOOT_NS + SECOND_NS, UNIX_NS + SECOND_NS))


def test_boot_time_that_goes_back_while_running_leaves_a_gap_and_goes_on() -> None:
    """A restored virtual machine is metered again from its first sample."""
    state = run([
        (70 * SECOND_NS, sample(70 * SECOND_NS, cycles(70), 70), (ATLAS,)),
        (71 * SECOND_NS, sample(71 * SECOND_NS, cycles(71), 71), (ATLAS,)),
        (10 * SECOND_NS, sample(10 * SECOND_NS, cycles(10), 10), (ATLAS,)),
        (11 * SECOND_NS, sample(11 * SECOND_NS, cycles(11), 11), (ATLAS,)),
    ])  # fmt: skip

    assert [record.gpu_time_ms for record in usage_of(state)] == [1000, 1000]
    assert any(isinstance(record, GapRecord) for record in records_of(state.closed))


def test_a_device_dark_for_an_hour_is_stated_as_a_gap() -> None:
    """Its time appears while it is missing, and is not counted again when it returns."""
    state = empty_state("boot-1")
    minute = 60 * SECOND_NS
    for at_ns in (0, SECOND_NS):
        state, _ = observe(
            state, node(at_ns, sample(at_ns, cycles(at_ns), at_ns)), {GPU.key: (ATLAS,)},
            tick_ns=SECOND_NS,
        )  # fmt: skip
    lost = (DeviceFailure(device=GPU, reason="gpu_is_lost"),)
    for number in range(1, 151):
        state, _ = observe(state, node(number * minute, failures=lost), {}, tick_ns=SECOND_NS)
    back = 151 * minute
    state, _ = observe(
        state, node(back, sample(back, cycles(back), back)), {GPU.key: (ATLAS,)},
        tick_ns=SECOND_NS,
    )  # fmt: skip
    records = records_of(close_windows(state).closed)
    dark = sum(record.gap_ms for record in records if isinstance(record, GapRecord))
    seen = sum(record.gpu_time_ms for record in records if isinstance(record, UsageRecord))

    assert dark + seen == 151 * 60_000
    assert "gpu_is_lost" in {r.reason for r in records if isinstance(r, GapRecord)}


# --- time that nobody read ---------------------------------------------------------------------


@pytest.mark.parametrize(("owners", "owner"), [((ATLAS,), "atlas"), ((ATLAS, BIRCH), None)])
def test_halted_time_is_a_gap_of_its_sole_holder(
    owners: tuple[Claim, ...], owner: str | None
) -> None:
    """Minute by minute, whatever the counters say afterwards; several holders leave it nobody's."""
    state = empty_state("boot-1")
    paused = (DeviceFailure(device=GPU, reason="paused"),)

    def fold(at: int, *, read: bool) -> None:
        nonlocal state
        at_ns = at * SECOND_NS
        tick = node(at_ns, sample(at_ns, cycles(at), at)) if read else node(at_ns, failures=paused)
        state, _ = observe(state, tick, {GPU.key: owners}, tick_ns=SECOND_NS)
        if is_due(state, tick.unix_ns, 1):
            state = close_windows(state)

    for at in (0, 1, 2):
        fold(at, read=True)
    state = halt(state, "paused")
    for at in range(3, 150):
        fold(at, read=False)
    running = [record for record in records_of(state.closed) if isinstance(record, GapRecord)]
    for at in (150, 151):
        fold(at, read=True)
    records = records_of(close_windows(state).closed)
    gaps = [record for record in records if isinstance(record, GapRecord)]

    assert len(running) == 2  # visible while it lasts
    assert [gap.gap_ms for gap in gaps] == [58_000, 60_000, 30_000]
    assert {gap.reason for gap in gaps} == {"paused"}
    assert {gap.owner.project for gap in gaps} == {owner}
    counted = [record for record in records if isinstance(record, UsageRecord)]
    assert sum(record.cycles.elapsed or 0 for record in counted) == 2 + 1
    assert sum(record.energy_mj or 0 for record in counted) == 2 + 1


def test_a_device_first_met_in_a_pause_begins_with_it() -> None:
    """After a reboot in a pause the time up to the first reading is there, too."""
    state = empty_state("boot-2")
    paused = (DeviceFailure(device=GPU, reason="paused"),)
    for at in (0, 1):
        state, _ = observe(state, node(at * SECOND_NS, failures=paused), {}, tick_ns=SECOND_NS)
    at_ns = 2 * SECOND_NS
    state, _ = observe(
        state, node(at_ns, sample(at_ns, cycles(5), 5)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )
    (gap,) = records_of(close_windows(state).closed)
    assert isinstance(gap, GapRecord)
    assert (gap.gap_ms, gap.reason, gap.owner.kind) == (2000, "paused", "unattributed")


def test_after_a_pause_a_lost_device_has_its_own_reason() -> None:
    """The pause is over: what keeps the device from being read is what the gap says."""
    state = empty_state("boot-1")
    state, _ = observe(
        state, node(0, sample(0, cycles(0), 0)), {GPU.key: (ATLAS,)}, tick_ns=SECOND_NS
    )
    state = halt(state, "paused")
    for at, reason in ((1, "paused"), (2, "gpu_is_lost")):
        failing = (DeviceFailure(device=GPU, reason=reason),)
        state, _ = observe(state, node(at * SECOND_NS, failures=failing), {}, tick_ns=SECOND_NS)
    gaps = [r for r in records_of(close_windows(state).closed) if isinstance(r, GapRecord)]
    assert [(gap.reason, gap.gap_ms) for gap in gaps] == [("paused", 1000), ("gpu_is_lost", 1000)]
