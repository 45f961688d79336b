"""Host metering: CPU time and energy are conserved exactly, and no counter is believed blindly."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.host.interface import HostReadError
from flopledger_agent.host.metering import (
    EMPTY_HOST,
    HostState,
    close,
    energy_between,
    is_due,
    observe,
    resume,
)
from flopledger_agent.host.windows import OWNERS_MAX
from flopledger_core.basis import basis
from flopledger_core.energy import HOST_POWER_LIMIT_WATTS
from flopledger_core.records import HostRecord, Record
from flopledger_core.units import MS_PER_SECOND
from tests.agent.host.trees import RANGE_UJ, host_sample, reading
from tests.agent.sampling import BOOT_NS, SECOND_NS, UNIX_NS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flopledger_agent.host.interface import EnergyReading, HostSample
    from flopledger_agent.windows import Closed

SPAN = 10 * SECOND_NS


def records(closed: Iterable[Closed]) -> list[HostRecord]:
    """The records, each as the wire will carry it."""
    found: list[HostRecord] = []
    for item in closed:
        assert isinstance(item.record, HostRecord)
        content = msgspec.json.encode(item.record)
        assert msgspec.json.encode(msgspec.json.decode(content, type=Record)) == content
        found.append(item.record)
    return found


def metered(*samples: HostSample, state: HostState = EMPTY_HOST) -> list[HostRecord]:
    """Everything that closes over samples and a last close."""
    found: list[Closed] = []
    for sample in samples:
        state, _piece, closed = observe(state, sample)
        found += closed
    _state, closed = close(state)
    return records([*found, *closed])


def by_owner(found: Iterable[HostRecord]) -> dict[str, int | None]:
    """CPU time by account."""
    return {record.owner.account: record.cpu_time_ms for record in found}


def test_cpu_time_goes_to_its_owner_and_the_rest_is_accounted() -> None:
    """Of two CPUs over ten seconds: six seconds a job's, one nobody's, thirteen idle."""
    found = metered(host_sample(0), host_sample(SPAN, 7 * SECOND_NS, ("atlas", 6 * SECOND_NS)))

    assert by_owner(found) == {"atlas": 6_000, "unattributed": 1_000, "idle": 13_000}
    assert {record.cpu_count for record in found} == {2}
    assert all(record.absent["flop"] == "cpu_flop_not_counted" for record in found)
    assert {record.owner.account: record.attribution.source for record in found} == {
        "atlas": "environment",
        "unattributed": "none",
        "idle": "idle",
    }


@given(
    data=st.lists(
        st.tuples(
            st.integers(1, 10**11),  # span
            st.integers(0, 2 * 10**11),  # busy
            st.lists(st.integers(0, 10**11), max_size=4),  # by owner
            st.integers(0, 10**9),  # energy
        ),
        min_size=1,
        max_size=8,
    ),
    cpus=st.integers(1, 400),
)
def test_cpu_time_and_energy_are_conserved(
    data: list[tuple[int, int, list[int], int]], cpus: int
) -> None:
    """Whatever was read: owners sum to the CPUs times the window, energy to its counter."""
    at = busy = energy = 0
    samples = [host_sample(0, 0, cpu_count=cpus, energy={"cpu_package": reading(0, None)})]
    for span, more_busy, owners, more_energy in data:
        at, busy, energy = at + span, busy + more_busy, energy + more_energy
        named = [(f"p{index}", used) for index, used in enumerate(owners)]
        samples.append(
            host_sample(at, busy, *named, cpu_count=cpus,
                        energy={"cpu_package": reading(energy, None, limit_watts=10**9)})
        )  # fmt: skip
    found = metered(*samples)
    windows: dict[tuple[int | None, int], list[HostRecord]] = {}
    for record in found:
        windows.setdefault((record.start_boot_ms, record.window_ms), []).append(record)

    for (_start, window_ms), parts in windows.items():
        assert sum(part.cpu_time_ms or 0 for part in parts) == cpus * window_ms
    end_ms = (BOOT_NS + at) // 10**6 - BOOT_NS // 10**6
    assert sum(window_ms for _start, window_ms in windows) == end_ms
    if end_ms:
        assert sum(record.energy_mj["cpu_package"] for record in found) == energy // 1_000


@given(rests=st.lists(st.integers(0, 5_000), min_size=2, max_size=30))
def test_no_microjoule_is_lost_between_windows(rests: list[int]) -> None:
    """What is below a millijoule in one window is in the next one."""
    state, energy, total = EMPTY_HOST, 0, 0
    for number, rest in enumerate(rests):
        energy += rest
        sample = host_sample(number * SPAN, 0, energy={"dram": reading(energy)})
        state, _piece, _closed = observe(state, sample)
        state, closed = close(state)
        total += sum(record.energy_mj["dram"] for record in records(closed))

    assert total == (energy - rests[0]) // 1_000


def test_energy_is_cut_by_cpu_time_with_the_idle_part_for_idle() -> None:
    """A job with a quarter of all CPU time has a quarter of the energy; the cut is flagged."""
    found = metered(
        host_sample(0, energy={"cpu_package": reading(0)}),
        host_sample(SPAN, 5 * SECOND_NS, ("atlas", 5 * SECOND_NS),
                    energy={"cpu_package": reading(2_000_000_000)}),
    )  # fmt: skip

    assert {record.owner.account: record.energy_mj["cpu_package"] for record in found} == {
        "atlas": 500_000,
        "idle": 1_500_000,
    }
    assert all(record.flags == ("apportioned",) for record in found)
    assert all(record.energy_sources == {"cpu_package": "rapl"} for record in found)
    assert {record.absent["energy.node"] for record in found} == {"not_configured"}


def test_processes_read_late_never_use_more_than_the_node() -> None:
    """Owners that used more than the node was busy share what it was busy."""
    found = metered(
        host_sample(0),
        host_sample(SPAN, 9 * SECOND_NS, ("atlas", 6 * SECOND_NS), ("zeus", 6 * SECOND_NS)),
    )
    assert by_owner(found) == {"atlas": 4_500, "zeus": 4_500, "idle": 11_000}


def test_slices_of_a_minute_are_one_window_whoever_comes_and_goes() -> None:
    """CPU time is measured for each owner, so nothing needs to be split."""
    found = metered(
        host_sample(0),
        host_sample(SPAN, 1 * SECOND_NS, ("atlas", SECOND_NS)),
        host_sample(2 * SPAN, 3 * SECOND_NS, ("atlas", SECOND_NS), ("zeus", SECOND_NS)),
        host_sample(3 * SPAN, 4 * SECOND_NS, ("zeus", SECOND_NS)),
    )
    assert by_owner(found) == {"atlas": 2_000, "zeus": 2_000, "idle": 56_000}
    assert {record.window_ms for record in found} == {30_000}


def test_a_job_that_used_nothing_still_appears() -> None:
    """Seen once, with the zero that was read."""
    found = metered(host_sample(0), host_sample(SPAN, 0, ("atlas", 0)))
    assert by_owner(found) == {"atlas": 0, "idle": 20_000}


# --- counters ---------------------------------------------------------------------------------


@given(before=st.integers(0, RANGE_UJ), watts=st.integers(0, 900), seconds=st.integers(1, 120))
def test_a_wrap_is_seen_through(before: int, watts: int, seconds: int) -> None:
    """Below the power limit the energy is exact, wherever the counter wrapped."""
    energy = watts * seconds * 10**6
    after = (before + energy) % (RANGE_UJ + 1)
    between = energy_between(reading(before), reading(after), seconds * SECOND_NS)
    assert between == energy


@given(
    before=st.integers(0, RANGE_UJ), after=st.integers(0, RANGE_UJ), seconds=st.integers(1, 10**6)
)
def test_an_energy_is_within_the_limit_or_absent(before: int, after: int, seconds: int) -> None:
    """Never negative, never more than the limit, never one of several possible amounts."""
    between = None
    reason = ""
    try:
        between = energy_between(reading(before), reading(after), seconds * SECOND_NS)
    except HostReadError as error:
        reason = error.reason
    if between is None:
        assert reason in {"counter_restarted", "wraps_unknown"}
    else:
        assert 0 <= between <= 1_000 * (seconds + 1) * 10**6
        assert between + RANGE_UJ + 1 > 1_000 * (seconds + 1) * 10**6
        assert (before + between - after) % (RANGE_UJ + 1) == 0


@pytest.mark.parametrize(
    ("before", "after", "seconds", "reason"),
    [
        (reading(RANGE_UJ // 2), reading(5), 10, "counter_restarted"),
        (reading(0), reading(5), 600, "wraps_unknown"),
        (reading(5), reading(6, name="package-1"), 10, "first_reading"),
        (reading(500, None), reading(499, None), 10, "counter_restarted"),
        (reading(0, None), reading(10**15, None), 10, "counter_restarted"),
    ],
)
def test_what_cannot_be_told_is_absent(
    before: EnergyReading, after: EnergyReading, seconds: int, reason: str
) -> None:
    """A driver reload, more than one possible wrap, another counter, a jump."""
    with pytest.raises(HostReadError) as caught:
        energy_between(before, after, seconds * SECOND_NS)
    assert caught.value.reason == reason


def test_an_absent_energy_leaves_cpu_time_and_other_boundaries() -> None:
    """One counter that restarted costs its own quantity, flagged; the rest stays metered."""
    found = metered(
        host_sample(0, energy={"cpu_package": reading(RANGE_UJ // 2), "dram": reading(0)}),
        host_sample(SPAN, 0, energy={"cpu_package": reading(1), "dram": reading(9_000)}),
    )
    [idle] = found
    assert idle.energy_mj == {"dram": 9}
    assert idle.absent["energy.cpu_package"] == "counter_restarted"
    assert idle.flags == ("counter_reset",)
    assert idle.cpu_time_ms == 20_000


def test_unread_cpu_time_is_absent_and_energy_is_nobodys() -> None:
    """Without /proc the energy of the node is still known, but not whose it is."""
    [only] = metered(
        host_sample(0, None, energy={"cpu_package": reading(0)}),
        host_sample(SPAN, None, energy={"cpu_package": reading(5_000)}),
    )
    assert only.cpu_time_ms is None
    assert only.absent["cpu_time"] == "proc_not_readable"
    assert only.owner.account == "unattributed"
    assert only.energy_mj == {"cpu_package": 5}


def test_cpu_counters_that_go_back_are_absent() -> None:
    """A restored container, say: no negative busy time."""
    [only] = metered(host_sample(0, 9 * SECOND_NS), host_sample(SPAN, 8 * SECOND_NS))
    assert only.cpu_time_ms is None
    assert only.absent["cpu_time"] == "counter_restarted"


def test_stepped_wall_time_is_flagged_and_stands_alone() -> None:
    """Durations come from boot time."""
    found = metered(
        host_sample(0),
        host_sample(SPAN),
        host_sample(2 * SPAN, step_ns=3_600 * SECOND_NS),
        host_sample(3 * SPAN, step_ns=3_600 * SECOND_NS),
    )
    assert [record.flags for record in found] == [(), ("clock_stepped",), ()]
    assert {record.window_ms for record in found} == {10_000}


# --- restarts ---------------------------------------------------------------------------------


def after_restart(boot_id: str, dark_seconds: int) -> tuple[list[HostRecord], HostState]:
    """An agent that metered ten seconds, was gone, and came back."""
    state, _piece, _closed = observe(EMPTY_HOST, host_sample(0, energy={"dram": reading(0)}))
    state, _piece, _closed = observe(
        state, host_sample(SPAN, SECOND_NS, energy={"dram": reading(1_000)})
    )
    state = msgspec.json.decode(msgspec.json.encode(state), type=HostState)
    dark_ns = SPAN + dark_seconds * SECOND_NS
    state, closed = resume(
        state,
        before_boot_id="one",
        boot_id=boot_id,
        now_boot_ns=BOOT_NS + dark_ns,
        now_unix_ns=UNIX_NS + dark_ns,
    )
    return records(closed), state


def test_dark_time_in_one_boot_is_bridged_by_the_counters() -> None:
    """Flagged, nobody's, and without a hole."""
    before, state = after_restart("one", 60)
    at = SPAN + 60 * SECOND_NS
    found = metered(
        host_sample(at, 31 * SECOND_NS, energy={"dram": reading(31_000)}),
        host_sample(at + SPAN, 33 * SECOND_NS, ("atlas", 2 * SECOND_NS),
                    energy={"dram": reading(40_000)}),
        state=state,
    )  # fmt: skip
    dark, watched = found[:2], found[2:]

    assert by_owner(before) == {"unattributed": 1_000, "idle": 19_000}
    assert by_owner(dark) == {"unattributed": 30_000, "idle": 90_000}
    assert all("recovered" in record.flags for record in dark)
    assert sum(record.energy_mj["dram"] for record in dark) == 30
    assert by_owner(watched) == {"atlas": 2_000, "idle": 18_000}
    assert all("recovered" not in record.flags for record in watched)


def test_a_reboot_leaves_absent_quantities_and_never_a_negative() -> None:
    """The time between two boots is a record of its own, and the new boot begins afresh."""
    found, state = after_restart("two", 300)
    dark = found[-1]

    assert dark.window_ms == 300 * MS_PER_SECOND
    assert dark.start_boot_ms is None
    assert (dark.cpu_time_ms, dark.energy_mj) == (None, {})
    assert set(dark.absent.values()) == {"node_restarted", "cpu_flop_not_counted"}
    assert state == EMPTY_HOST


def test_boot_time_that_went_back_is_another_boot() -> None:
    """A boot without an id, say: never a negative window."""
    found = metered(host_sample(5 * SPAN), host_sample(SPAN), host_sample(2 * SPAN, SECOND_NS))
    assert found[0].absent["cpu_time"] == "node_restarted"
    assert found[0].window_ms == 0
    assert found[0].flags == ("clock_stepped",)
    assert by_owner(found[1:]) == {"unattributed": 1_000, "idle": 19_000}


def test_windows_are_due_with_their_minute() -> None:
    """As a GPU's, also where they are wider."""
    state, _piece, _closed = observe(EMPTY_HOST, host_sample(0))
    assert not is_due(state, UNIX_NS + 600 * SECOND_NS, 1)
    state, _piece, _closed = observe(state, host_sample(SPAN))
    assert not is_due(state, UNIX_NS + 59 * SECOND_NS, 1)
    assert is_due(state, UNIX_NS + 60 * SECOND_NS, 1)
    assert not is_due(state, UNIX_NS + 60 * SECOND_NS, 10)


# --- bounds -----------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10_000),  # milliseconds of the slice
            st.integers(0, 1000),  # busy per mille of the CPUs
            st.lists(st.integers(0, 1000), min_size=3, max_size=3),  # of it each job's, in turn
            st.integers(0, 400_000_000),  # microjoules a second
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1, 2, 192]),
)
def test_every_owners_bounds_reach_from_nothing_to_the_nodes_energy(
    steps: list[tuple[int, int, list[int], int]], cpu_count: int
) -> None:
    """No meter tells owners apart: a job that took all energy, or none, is within its bounds."""
    at_ns = busy_ns = energy_uj = 0
    samples = [host_sample(0, 0, energy={"cpu_package": reading(0, None)}, cpu_count=cpu_count)]
    for span_ms, per_mille, parts, rate in steps:
        at_ns += span_ms * 1_000_000
        slice_ns = span_ms * 1_000_000 * cpu_count * per_mille // 1000
        busy_ns += slice_ns
        energy_uj += rate * span_ms // 1000
        owners = [(f"p{n}", slice_ns * part // 3000) for n, part in enumerate(parts)]
        samples.append(
            host_sample(at_ns, busy_ns, *owners, cpu_count=cpu_count,
                        energy={"cpu_package": reading(energy_uj, None)})
        )  # fmt: skip
    found = metered(*samples)
    whole_mj = sum(record.energy_mj["cpu_package"] for record in found)

    assert energy_uj // 1000 == whole_mj
    assert sum(record.cpu_time_ms or 0 for record in found) == cpu_count * at_ns // 1_000_000
    for project in ("p0", "p1", "p2"):
        mine = [record for record in found if record.owner.project == project]
        sums: dict[str, int] = defaultdict(int)
        for record in mine:
            for name, amount in basis(record).items():
                assert amount >= 0, name
                sums[name] += amount
        central = sums["host_energy_mj_cpu_package"]
        assert len(mine) == 1
        assert central - sums["host_energy_deficit_mj_cpu_package"] == 0
        assert central + sums["host_energy_excess_mj_cpu_package"] >= min(
            whole_mj, HOST_POWER_LIMIT_WATTS["cpu_package"] * mine[0].window_ms
        )


def test_a_flood_of_names_fills_no_window() -> None:
    """Beyond a few hundred owners in a minute the rest is nobody's; CPU time stays conserved."""
    samples = [host_sample(0, 0, cpu_count=64)]
    for number in range(1, 7):
        names = [(f"n{number}-{name}", SECOND_NS // 1000) for name in range(1000)]
        samples.append(host_sample(number * SPAN, number * SECOND_NS, *names, cpu_count=64))
    found = metered(*samples)
    named = sum(record.cpu_time_ms or 0 for record in found if record.owner.kind == "attributed")

    assert len(found) <= OWNERS_MAX + 2
    assert sum(record.cpu_time_ms or 0 for record in found) == 64 * 6 * SPAN // 1_000_000
    assert 0 < named < by_owner(found)["unattributed"]  # type: ignore[operator] # it is not None
