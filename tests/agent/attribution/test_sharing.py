"""Shared devices: split by use where it is told, else equally, exactly, and nobody twice.

That one GPU has at most one stream at an instant is the collector's to see:
tests/collector/test_ingest.py, `test_a_device_in_two_streams_at_once_is_disputed_in_the_second`,
and tests/collector/ledger/test_devices.py for a GPU in parts.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_agent.attribution.splitting import WEIGHTS_MAX, integer_weights
from flopledger_agent.metering import close_windows, empty_state, observe, records_of, resume
from flopledger_agent.windows import shares
from flopledger_core.identity import Owner
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.attribution.jobs import Cluster, allocation, reading
from tests.agent.attribution.people import process
from tests.agent.sampling import BOOT_NS, GPU, SECOND_NS, UNIX_NS, cycles, node, sample
from tests.agent.test_metering import run, usage_of

if TYPE_CHECKING:
    from flopledger_agent.attribution.allocations import Allocation
    from flopledger_agent.metering import MeterState

TWO = (allocation("12", shared=True), allocation("13", user="bob", shared=True))
MS = 1_000_000


def two_jobs() -> Cluster:
    """Processes 7 and 8 are job 12's, 9 is job 13's."""
    cluster = Cluster(process(7, {}), process(8, {}), process(9, {}, user="bob"))
    for pid, job in ((7, "12"), (8, "12"), (9, "13")):
        cluster.memberships.put(pid, ("slurm", job))
    cluster.source.now = TWO
    return cluster


def records(
    cluster: Cluster, ticks: list[tuple[tuple[int, ...], dict[int, int] | None]]
) -> list[UsageRecord]:
    """One reading a second, with the processes then and their use since the one before."""
    played = []
    for second, (pids, used) in enumerate(ticks):
        at_ns = second * SECOND_NS
        claims = cluster.attributor.claims(pids, reading(at_ns, utilization=used))
        played.append((at_ns, sample(at_ns, cycles(at_ns, at_ns // 2), second * 1000), claims))
    return sorted(usage_of(run(played)), key=lambda record: record.owner.job or "")


def test_use_decides_where_the_driver_tells_it() -> None:
    """Over the whole window: 10 + 20 of job 12 against 90 + 0 of job 13."""
    one, two = records(two_jobs(), [
        ((7, 8, 9), {}), ((7, 8, 9), {7: 10, 9: 90}), ((7, 8, 9), {8: 20}),
    ])  # fmt: skip
    assert (one.gpu_time_ms, two.gpu_time_ms) == (500, 1500)
    assert (one.cycles.elapsed, two.cycles.elapsed) == (SECOND_NS // 2, SECOND_NS * 3 // 2)
    assert (one.energy_mj, two.energy_mj) == (500, 1500)
    assert {record.flags for record in (one, two)} == {("shared",)}
    assert {record.attribution.sharers for record in (one, two)} == {2}
    assert one.attribution.weights == two.attribution.weights <= WEIGHTS_MAX
    assert (one.attribution.evidence or "").startswith("split by use of the SMs; ")


def test_allocated_time_overlaps_and_device_time_does_not() -> None:
    """Each holder had the whole window; together they had the device once."""
    one, two = records(two_jobs(), [((7, 9), None), ((7, 9), None)])
    assert (one.allocated_time_ms, two.allocated_time_ms) == (1000, 1000)
    assert one.gpu_time_ms + two.gpu_time_ms == one.wall_time_ms == 1000


def test_without_use_holders_are_equal_whatever_they_run() -> None:
    """A job of many processes is no more of a holder than one that runs nothing."""
    for pids, used in (((7, 8, 9), None), ((7, 8), None), ((7, 8, 9), {}), ((), {})):
        one, two = records(two_jobs(), [(pids, used), (pids, used)])
        assert (one.gpu_time_ms, two.gpu_time_ms) == (500, 500)
        assert (one.attribution.evidence or "").startswith("split equally; ")


def test_one_window_however_use_changes() -> None:
    """Use that differs at each reading splits no window: records stay one an owner and minute."""
    ticks: list[tuple[tuple[int, ...], dict[int, int] | None]] = [
        ((7, 9), {7: second % 7, 9: second % 5}) for second in range(50)
    ]
    assert len(records(two_jobs(), ticks)) == 2


def test_a_job_that_used_nothing_beside_a_busy_one_keeps_its_record() -> None:
    """It held the device all the time, used none of it, and nothing is charged twice."""
    one, two = records(two_jobs(), [((7, 9), {}), ((7, 9), {7: 80}), ((7, 9), {7: 80})])
    assert (one.gpu_time_ms + two.gpu_time_ms, two.allocated_time_ms) == (2000, 2000)
    assert two.gpu_time_ms <= 1


def test_two_projects_in_one_job_share_that_jobs_part() -> None:
    """Job 12's half is cut by its processes; job 13's half is its own."""
    cluster = two_jobs()
    for pid, project in ((7, "atlas"), (8, "zeus")):
        cluster.table.processes[pid] = process(pid, {"FLOPLEDGER_PROJECT": project})
    claims = cluster.attributor.claims((7, 8, 9), reading())
    assert {claim.owner.account: claim.weight for claim in claims} == {
        "atlas": 1, "zeus": 1, "unattributed": 2,
    }  # fmt: skip


def test_the_server_of_mps_is_nobody() -> None:
    """It works for its clients: neither an intruder nor a holder."""
    cluster = two_jobs()
    cluster.table.processes[5] = process(5, {}, user="root")
    cluster.memberships.put(5, is_service=True)
    claims = cluster.attributor.claims((5, 7, 9), reading(utilization={5: 90}))
    assert [(claim.owner.job, claim.used_percent, claim.flags) for claim in claims] == [
        ("12", 0, ()), ("13", 0, ()),
    ]  # fmt: skip
    cluster.source.now = ()
    claims = cluster.attributor.claims((5, 7, 9), reading())
    assert sum(claim.weight for claim in claims) == 2


def test_bare_processes_are_split_by_use_too() -> None:
    """Without a scheduler: by use where it is told, else one part a process."""
    people = [
        process(pid, {"FLOPLEDGER_PROJECT": name}) for pid, name in ((7, "a"), (8, "a"), (9, "b"))
    ]
    for used, parts in (({7: 10, 8: 20, 9: 10}, (750, 250)), (None, (666, 334)), ({}, (666, 334))):
        found = sorted(
            records(Cluster(*people), [((7, 8, 9), used), ((7, 8, 9), used)]),
            key=lambda record: record.owner.project or "",
        )
        assert tuple(record.gpu_time_ms for record in found) == parts


def test_one_job_twice_on_a_device_is_charged_once() -> None:
    """Two replicas of a time-sliced GPU in one pod, and two sources that tell the same."""
    cluster = Cluster()
    pod = allocation("pod", scheduler="kubernetes", user=None, shared=True)
    cluster.source.now = (pod, pod, allocation("pod2", scheduler="kubernetes", user=None))
    claims = cluster.attributor.claims((), reading())
    assert [(claim.owner.job, claim.weight) for claim in claims] == [("pod", 1), ("pod2", 1)]


@given(
    st.lists(st.fractions(min_value=0, max_value=10**9, max_denominator=10**6), min_size=2,
             max_size=128),
    st.integers(0, 10**15),
)  # fmt: skip
def test_weights_are_small_positive_integers_and_shares_are_exact(
    units: list[Fraction], total: int
) -> None:
    """As a record may carry them, near their proportions, and the parts sum to the whole."""
    weights = integer_weights(units)
    assert all(weight >= 1 for weight in weights)
    assert sum(weights) <= WEIGHTS_MAX
    assert sum(shares(total, weights)) == total
    if sum(units):
        for weight, unit in zip(weights, units, strict=True):
            exact = unit / sum(units)
            assert abs(Fraction(weight, sum(weights)) - exact) <= Fraction(len(units) + 1, 10**5)


# --- conservation ----------------------------------------------------------------------------

PIDS = st.frozensets(st.sampled_from([7, 8, 9, 10]), max_size=4)
JOBS = st.frozensets(st.sampled_from(["12", "13", "14"]), max_size=3)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What happens until the next reading."""

    step_ms: int
    pids: frozenset[int] | None
    jobs: frozenset[str]
    granted_by_pod: bool
    used: dict[int, int] | None
    tagged: frozenset[int]
    restarts: bool
    ended: frozenset[int]


EVENTS = st.lists(
    st.builds(
        Event,
        step_ms=st.sampled_from([1, 37, 100, 1000, 1000, 1000, 4999, 5001, 61_000]),
        pids=st.none() | PIDS,
        jobs=JOBS,
        granted_by_pod=st.booleans(),
        used=st.none() | st.dictionaries(st.sampled_from([7, 8, 9, 10, 99]), st.integers(0, 100)),
        tagged=PIDS,
        restarts=st.integers(0, 9).map(lambda number: number == 0),
        ended=PIDS,
    ),
    min_size=2,
    max_size=25,
)


def jobs_of(event: Event, at_ns: int) -> tuple[Allocation, ...]:
    """The allocations of an event, from now on or from before."""
    more = (allocation("pod", scheduler="kubernetes"),) if event.granted_by_pod else ()
    since = (UNIX_NS + at_ns) // MS - (event.step_ms if "14" in event.jobs else 30)
    return (*(allocation(job, since_unix_ms=since) for job in sorted(event.jobs)), *more)


def churned(events: list[Event]) -> tuple[MeterState, int, Cluster]:
    """One device through all of it, closed at the end; and the time it took."""
    cluster = Cluster(
        *(process(pid, {}, user="bob" if pid == 10 else "alice") for pid in (7, 8, 9, 10))
    )
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.memberships.put(8, ("slurm", "13"))
    cluster.memberships.put(10)
    state, at_ns = empty_state("boot-1"), 0
    for event in events:
        for pid in (7, 8, 9, 10):
            tags = {"FLOPLEDGER_PROJECT": f"p{pid % 2}"} if pid in event.tagged else {}
            user = "bob" if pid == 10 else "alice"
            cluster.table.processes[pid] = process(pid, tags, user=user)
        cluster.source.now = jobs_of(event, at_ns)
        pids = None if event.pids is None else tuple(sorted(event.pids))
        if event.restarts:
            state = resume(state, "boot-1", BOOT_NS + at_ns, UNIX_NS + at_ns)
        taken = msgspec.structs.replace(
            sample(at_ns, cycles(at_ns // 1000, at_ns // 3000), at_ns // MS),
            processes=pids, process_utilization=event.used,
        )  # fmt: skip
        claims = cluster.attributor.claims(pids, reading(at_ns, utilization=event.used))
        state, _ = observe(
            state, node(at_ns, taken), {GPU.key: claims}, tick_ns=SECOND_NS, ended=event.ended
        )
        at_ns += event.step_ms * MS
    return close_windows(state), at_ns - events[-1].step_ms * MS, cluster


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_time_over_owners_and_gaps_is_wall_time_whatever_happens(events: list[Event]) -> None:
    """Processes, jobs, overlaps, tags and restarts at random: not a millisecond lost or doubled."""
    state, took_ns, _cluster = churned(events)
    found = records_of(state.closed)
    usage = [record for record in found if isinstance(record, UsageRecord)]
    gaps = [record for record in found if isinstance(record, GapRecord)]
    assert (
        sum(record.gpu_time_ms for record in usage) + sum(gap.gap_ms for gap in gaps)
        == took_ns // MS
    )
    assert sum(record.energy_mj or 0 for record in usage) == took_ns // MS
    windows: dict[tuple[int, int], list[UsageRecord]] = {}
    for record in usage:
        windows.setdefault((record.start_boot_ms, record.end_boot_ms), []).append(record)
    for (start_ms, end_ms), together in windows.items():
        assert sum(record.gpu_time_ms for record in together) == end_ms - start_ms
        jobs = [record.owner.job for record in together if record.allocated_time_ms is not None]
        for record in together:
            assert record.allocated_time_ms in {None, end_ms - start_ms}
        if jobs:
            assert None not in jobs


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_removing_every_tag_never_moves_time_to_idle(events: list[Event]) -> None:
    """The same history without tags: what was somebody's is nobody's or the job's, never idle."""

    def idle_ms(history: list[Event]) -> int:
        state, _took_ns, _cluster = churned(history)
        return sum(
            record.gpu_time_ms
            for record in records_of(state.closed)
            if isinstance(record, UsageRecord) and record.owner.kind == "idle"
        )

    untagged = [msgspec.structs.replace(event, tagged=frozenset()) for event in events]
    assert idle_ms(untagged) == idle_ms(events)


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_tags_never_change_which_job_holds_a_device(events: list[Event]) -> None:
    """Scheduler truth: time by job is the same with and without anybody's tags."""

    def by_job(history: list[Event]) -> set[tuple[str | None, int, int]]:
        state, _took_ns, _cluster = churned(history)
        return {
            (record.owner.job, start, start + record.wall_time_ms)
            for record in records_of(state.closed)
            if isinstance(record, UsageRecord) and record.allocated_time_ms is not None
            for start in [record.start_boot_ms]
        }

    def covered(found: set[tuple[str | None, int, int]]) -> dict[str | None, int]:
        """Milliseconds that each job held, windows that split for a tag counted once."""
        spent: dict[str | None, int] = {}
        for job, start, end in found:
            spent[job] = spent.get(job, 0) + end - start
        return spent

    untagged = [msgspec.structs.replace(event, tagged=frozenset()) for event in events]
    assert covered(by_job(untagged)) == covered(by_job(events))


def test_an_owner_is_one_record_of_a_window() -> None:
    """Many processes of one owner, in and out of a job: one record each, never two."""
    cluster = two_jobs()
    found = records(cluster, [((7, 8, 9), {7: 1}), ((7, 8, 9), {7: 1, 8: 2, 9: 3})])
    owners: list[Owner] = [record.owner for record in found]
    assert len(owners) == len({repr(owner) for owner in owners}) == 2
