"""A scheduler's word comes first: who holds a device, since when, busy or not, and who does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.mapping import MappingRule, RuleBook, RuleMatch
from flopledger_agent.attribution.precedence import Membership, Site
from flopledger_agent.attribution.scheduled import JoinedMemberships
from flopledger_agent.attribution.services import Services
from flopledger_agent.attribution.slurm_memberships import SlurmMemberships
from flopledger_agent.attribution.tag_values import Tags
from flopledger_core.records import UsageRecord
from tests.agent.attribution.jobs import Cluster, allocation, reading
from tests.agent.attribution.people import process
from tests.agent.attribution.test_owners import only
from tests.agent.sampling import SECOND_NS, UNIX_NS, cycles, sample
from tests.agent.test_metering import run, usage_of

if TYPE_CHECKING:
    from pathlib import Path

ATLAS = {"FLOPLEDGER_PROJECT": "atlas"}
ZEUS = {"FLOPLEDGER_PROJECT": "zeus"}
UNIX_MS = UNIX_NS // 1_000_000


def told(claim: Claim) -> tuple[str, str | None, str]:
    """Account, job and source."""
    return (claim.owner.account, claim.owner.job, claim.source)


def test_without_an_allocation_everything_is_as_it_was() -> None:
    """Tags, environment, idleness, and nothing allocated."""
    cluster = Cluster(process(7, ATLAS))
    assert told(only(cluster.attributor.claims((7,), reading()))) == ("atlas", None, "environment")
    assert told(only(cluster.attributor.claims((), reading()))) == ("idle", None, "idle")
    assert only(cluster.attributor.claims(None, reading())).owner.kind == "unattributed"
    assert only(cluster.attributor.claims((), reading())).allocated is False


def test_a_held_but_idle_device_is_charged_to_its_job() -> None:
    """From the allocation alone; without a project it waits for one under the job's id."""
    cluster = Cluster()
    cluster.source.now = (allocation(tags={"project": "atlas"}, since_unix_ms=4),)
    for listed in ((), None):
        claim = only(cluster.attributor.claims(listed, reading()))
        assert told(claim) == ("atlas", "12", "scheduler")
        assert (claim.allocated, claim.since_unix_ms) == (True, 4)
    cluster.source.now = (allocation(),)
    claim = only(cluster.attributor.claims((), reading()))
    assert told(claim) == ("unattributed", "12", "scheduler")
    assert only(cluster.attributor.claims((), reading(device="GPU-2"))).owner.kind == "idle"


def test_what_a_jobs_processes_said_holds_while_they_are_gone() -> None:
    """An idle GPU between two steps is the same project's; another attempt begins anew."""
    cluster = Cluster(process(7, ATLAS), process(8, ZEUS))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.memberships.put(8, ("slurm", "12"))
    other = allocation(device="GPU-2")
    cluster.source.now = (allocation(), other)
    attributor = cluster.attributor
    assert told(only(attributor.claims((), reading())))[0] == "unattributed"
    assert told(only(attributor.claims((7,), reading()))) == ("atlas", "12", "environment")
    claim = only(attributor.claims((), reading(device="GPU-2")))
    assert told(claim) == ("atlas", "12", "environment")
    assert "as said before: environment of process 7" in (claim.evidence or "")
    cluster.source.now = (allocation(attempt="1"),)
    assert told(only(attributor.claims((), reading())))[0] == "unattributed"
    cluster.source.now = (allocation(),)
    attributor.claims((7,), reading())
    attributor.claims((8,), reading())  # two projects in one job: nothing follows for idle time
    assert told(only(attributor.claims((), reading())))[0] == "unattributed"
    cluster.source.now = ()
    assert told(only(attributor.claims((), reading())))[0] == "idle"


def test_the_nodes_own_processes_teach_a_jobs_project() -> None:
    """A launcher without a device on it tells what its job is, and its CPU time is the job's."""
    cluster = Cluster(process(7, ATLAS), process(8, {}))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(),)
    assert told(only(cluster.attributor.claims((7,)))) == ("atlas", "12", "environment")
    assert told(only(cluster.attributor.claims((), reading()))) == ("atlas", "12", "environment")
    assert told(only(cluster.attributor.claims((8,)))) == ("unattributed", None, "none")


def test_a_job_that_begins_after_the_reading_did_not_hold_the_device_yet() -> None:
    """The source may be quicker than the reading; another clock's future is believed."""
    cluster = Cluster()
    cluster.source.now = (allocation(since_unix_ms=UNIX_MS + 20),)
    assert only(cluster.attributor.claims((), reading())).owner.kind == "idle"
    assert only(cluster.attributor.claims((), reading(SECOND_NS))).owner.job == "12"
    cluster.source.now = (allocation(since_unix_ms=UNIX_MS + 600_000),)
    assert only(cluster.attributor.claims((), reading())).owner.job == "12"


def test_a_process_outside_the_job_is_visible_and_not_the_jobs() -> None:
    """Bob computes on alice's GPU: his part is nobody's, whatever he says, and both are flagged."""
    cluster = Cluster(process(7, ATLAS), process(8, ZEUS, user="bob"))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.memberships.put(8)
    cluster.source.now = (allocation(),)
    mine, other = cluster.attributor.claims((7, 8), reading())
    assert told(mine) == ("atlas", "12", "environment")
    assert told(other) == ("unattributed", None, "none")
    assert (mine.weight, other.weight, other.user, other.allocated) == (1, 1, "bob", False)
    assert mine.flags == ("outside_allocation",)
    assert other.flags == ("outside_allocation", "tag_conflict")
    assert "process 8 of bob used the device outside its allocation" in (mine.evidence or "")
    for word in ("process 8 of bob", "slurm job 12 of alice", "project zeus"):
        assert word in (other.evidence or "")


def test_a_process_of_another_job_waits_under_that_jobs_id() -> None:
    """Job 13 strayed to a GPU of job 12: nothing of it is charged to 12."""
    cluster = Cluster(process(8, {"SLURM_JOB_ID": "12"}))
    cluster.memberships.put(8, ("slurm", "13"))
    cluster.source.now = (allocation(tags={"project": "atlas"}),)
    mine, other = cluster.attributor.claims((8,), reading())
    assert (told(mine), told(other)) == (
        ("atlas", "12", "scheduler"), ("unattributed", "13", "none"),
    )  # fmt: skip


def test_an_outsider_that_uses_nothing_takes_no_part() -> None:
    """A monitor with a context is told of and costs the job nothing, where use can be read."""
    cluster = Cluster(process(8, {}, user="dcgm"))
    cluster.memberships.put(8)
    cluster.source.now = (allocation(tags={"project": "atlas"}),)
    claim = only(cluster.attributor.claims((8,), reading(utilization={})))
    assert (told(claim)[0], claim.flags) == ("atlas", ("outside_allocation",))


@pytest.mark.parametrize(
    ("member", "user", "environ", "inside"),
    [
        ((("slurm", "12"),), "bob", {}, True),  # the kernel's word counts, whoever it is
        ((("kubernetes", "pod"), ("slurm", "12")), "alice", {}, True),  # a job in a pod
        ((), "alice", {"SLURM_JOB_ID": "12"}, True),  # no control groups: her own session
        ((), "bob", {"SLURM_JOB_ID": "12"}, False),  # anybody can write that
        ((), "alice", {}, False),
        ((("docker", "c"),), "root", {}, False),  # a container of a daemon is in no job
        (None, "alice", {}, True),  # not known: whose else could it be
        (None, "root", {}, True),
        (None, "bob", {}, False),
        (None, "bob", {"SLURM_JOB_ID": "12"}, False),
    ],
)
def test_control_groups_decide_then_a_users_own_session(
    member: tuple[tuple[str, str], ...] | None,
    user: str,
    environ: dict[str, str],
    inside: bool,
) -> None:
    """Whether a process is a job's, from what the kernel says, its user, and its environment."""
    cluster = Cluster(process(7, environ, user=user))
    if member is not None:
        cluster.memberships.by_pid[7] = msgspec.convert({"jobs": member}, Membership)
    cluster.source.now = (allocation(),)
    claims = cluster.attributor.claims((7,), reading())
    assert (len(claims) == 1 and not claims[0].flags) == inside


def test_every_form_of_a_jobs_id_is_the_job() -> None:
    """Control groups and the environment carry the raw id of an array's task."""
    cluster = Cluster(process(7, ATLAS), process(8, {**ATLAS, "SLURM_JOB_ID": "127"}))
    cluster.memberships.put(7, ("slurm", "127"))
    cluster.memberships.put(8)
    cluster.source.now = (allocation("123_4", names={"job_id": "127"}),)
    claim = only(cluster.attributor.claims((7, 8), reading()))
    assert told(claim) == ("atlas", "123_4", "environment")


def test_a_process_of_nobody_knows_which_job_is_charged_to_none_in_particular() -> None:
    """Two jobs of one user on a device, and no control groups: the holders share it equally."""
    cluster = Cluster(process(7, ATLAS))
    cluster.source.now = (allocation("12", shared=True), allocation("13", shared=True))
    claims = cluster.attributor.claims((7,), reading())
    assert [(told(claim), claim.weight) for claim in claims] == [
        (("unattributed", "12", "scheduler"), 1), (("unattributed", "13", "scheduler"), 1),
    ]  # fmt: skip


def test_the_innermost_scheduler_holds_the_device() -> None:
    """A job of Slurm in a pod in a container is one holder, never three."""
    cluster = Cluster()
    cluster.source.now = (
        allocation("c" * 64, scheduler="containerd"),
        allocation("pod-uid", scheduler="kubernetes", user=None),
        allocation("12"),
        allocation("12"),
    )
    assert only(cluster.attributor.claims((), reading())).owner.job == "12"
    cluster.source.now = cluster.source.now[:2]
    assert only(cluster.attributor.claims((), reading())).owner.job == "pod-uid"


def test_a_container_names_the_job_and_holds_nothing_back() -> None:
    """Nobody granted it the device: a bare process beside it is no intruder."""
    cluster = Cluster(process(7, {}), process(8, ATLAS, user="bob"), process(9, ZEUS, user="eve"))
    cluster.memberships.put(7, ("docker", "c1"))
    cluster.memberships.put(9, ("docker", "c1"))
    cluster.memberships.put(8)
    cluster.source.now = (allocation("c1", scheduler="docker", names={"image": "train:1"}),)
    claims = cluster.attributor.claims((7, 8, 9), reading())
    assert {told(claim) for claim in claims} == {
        ("unattributed", "c1", "none"), ("atlas", None, "environment"),
        ("zeus", "c1", "environment"),
    }  # fmt: skip
    assert not any(claim.flags or claim.allocated for claim in claims)


def test_rules_know_the_scheduler_names_and_bare_users() -> None:
    """An account for jobs, a user for a process that nobody scheduled."""
    rules = RuleBook(
        [
            MappingRule(match=RuleMatch(account="proj-*"), project="atlas", run="nightly"),
            MappingRule(match=RuleMatch(user="carol"), project="carols"),
        ]
    )
    cluster = Cluster(process(7, {}, user="carol"), site=Site(rules=rules))
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (told(claim), claim.owner.activity) == (("carols", None, "rule"), "unclassified")
    cluster.source.now = (allocation(names={"account": "proj-x"}),)
    claim = only(cluster.attributor.claims((), reading()))
    assert (told(claim), claim.owner.run) == (("atlas", "12", "rule"), "nightly")


def test_removing_a_tag_never_makes_a_device_idle() -> None:
    """With and without a scheduler: the time becomes nobody's, under the job's id."""
    for environ in (ATLAS, {}):
        for jobs in ((), (allocation(),)):
            cluster = Cluster(process(7, environ))
            cluster.source.now = jobs
            claim = only(cluster.attributor.claims((7,), reading()))
            assert claim.owner.kind == ("attributed" if environ else "unattributed")


def test_ten_thousand_processes_are_a_bounded_number_of_owners() -> None:
    """Each with a run of its own: those beyond the limit are nobody's, under the job's id."""
    people = [process(pid, {**ATLAS, "FLOPLEDGER_RUN": f"r{pid}"}) for pid in range(1, 10_001)]
    cluster = Cluster(*people)
    cluster.source.now = (allocation(),)
    claims = cluster.attributor.claims(tuple(range(1, 10_001)), reading())
    assert len(claims) == 128
    assert sum(claim.weight for claim in claims) <= 1_000_000
    assert {claim.owner.job for claim in claims} == {"12"}
    assert "owners beyond" in (claims[-1].evidence or "")


def test_memberships_are_joined_and_sources_are_let_go() -> None:
    """Slurm's groups and a container's: what any knows counts, and unknown stays unknown."""
    worker = process(7, {})
    slurm = Membership(jobs=frozenset({("slurm", "12")}))
    service = Membership(is_service=True)
    both = JoinedMemberships(lambda _one: slurm, lambda _one: None, lambda _one: service)
    assert both.membership(worker) == Membership(jobs=slurm.jobs, is_service=True)
    assert JoinedMemberships(lambda _one: None).membership(worker) is None
    cluster = Cluster(worker)
    assert cluster.attributor.troubles() == ("a trouble", "a ghost")
    cluster.attributor.close()
    assert cluster.source.closed


@pytest.mark.parametrize(
    ("content", "jobs"),
    [
        ("0::/system.slice/slurmstepd.scope/job_127/step_0/user/task_0\n", {("slurm", "127")}),
        ("4:memory:/slurm/uid_1000/job_127/step_batch\n1:name=systemd:/\n", {("slurm", "127")}),
        ("0::/user.slice/user-1000.slice/session-4.scope\n", set()),
        (None, None),
    ],
)
def test_slurms_control_groups_name_the_job(
    content: str | None, jobs: set[tuple[str, str]] | None, tmp_path: Path
) -> None:
    """Under cgroup v1 and v2; another group is no job, and an unreadable one is not known."""
    if content is not None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "cgroup").write_text(content)
    found = SlurmMemberships(tmp_path).membership(process(7, {}))
    assert (None if found is None else set(found.jobs)) == jobs


@pytest.mark.parametrize(
    ("user", "name", "is_service"),
    [
        ("root", "nvidia-cuda-mps\n", True),
        ("bob", "nvidia-cuda-mps\n", False),
        ("root", "python\n", False),
        ("root", None, False),
    ],
)
def test_only_roots_mps_server_is_a_service(
    user: str, name: str | None, is_service: bool, tmp_path: Path
) -> None:
    """Anybody can call a process so; a user's own server is in his job's control group."""
    if name is not None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "comm").write_text(name)
    found = Services(tmp_path).membership(process(7, {}, user=user))
    assert (found == Membership(is_service=True)) == is_service


# --- windows ---------------------------------------------------------------------------------


def windows(cluster: Cluster, ticks: list[tuple[int, tuple[object, ...]]]) -> list[UsageRecord]:
    """The records over ticks of (milliseconds, allocations then)."""
    played = []
    for at_ms, jobs in ticks:
        at_ns = at_ms * 1_000_000
        cluster.source.now = jobs  # type: ignore[assignment]
        claims = cluster.attributor.claims((), reading(at_ns))
        resting = msgspec.structs.replace(cycles(at_ns), sm_active=0)
        played.append((at_ns, sample(at_ns, resting), claims))
    return usage_of(run(played))


def by_owner(records: list[UsageRecord]) -> list[tuple[str, int, int | None]]:
    """Account, device time and allocated time of each record."""
    return [
        (record.owner.job or record.owner.kind, record.gpu_time_ms, record.allocated_time_ms)
        for record in records
    ]


def test_windows_split_where_an_allocation_begins_and_ends() -> None:
    """An edge makes a reading at once: the job has the time from its edge to its edge."""
    job = (allocation(since_unix_ms=UNIX_MS + 1300),)
    records = windows(
        Cluster(), [(0, ()), (1000, ()), (1310, job), (2000, job), (2700, ()), (3000, ())]
    )
    assert by_owner(records) == [("idle", 1310, None), ("12", 1390, 1390), ("idle", 300, None)]
    assert "allocated_time" not in records[1].absent
    assert records[0].absent["allocated_time"] == "no_scheduler_source"


def test_a_requeued_job_is_another_attempt_in_a_window_of_its_own() -> None:
    """Same id, other restart: never one record."""
    one, two = ((allocation(attempt=number),) for number in ("0", "1"))
    records = windows(Cluster(), [(0, one), (1000, one), (2000, two), (3000, two)])
    assert [(record.owner.attempt, record.gpu_time_ms) for record in records] == [
        ("0", 2000), ("1", 1000),
    ]  # fmt: skip


def test_dark_time_is_the_jobs_that_held_the_device_all_along() -> None:
    """After a crash the scheduler still knows; a job that began meanwhile owns none of it."""
    before, after = (
        (allocation(since_unix_ms=UNIX_MS - 5),),
        (allocation("13", since_unix_ms=UNIX_MS + 30_000),),
    )
    (record,) = windows(Cluster(), [(0, before), (60_000, before)])
    assert (record.owner.job, record.flags, record.allocated_time_ms) == (
        "12",
        ("recovered",),
        60_000,
    )
    (record,) = windows(Cluster(), [(0, before), (60_000, after)])
    assert (record.owner.kind, record.owner.job, record.allocated_time_ms) == (
        "unattributed", None, None,
    )  # fmt: skip


def test_a_late_tag_changes_the_project_and_not_the_holder() -> None:
    """From unattributed under the job's id to a project, in two windows of one job."""
    worker = process(7, {})
    cluster = Cluster(worker)
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(),)
    first = only(cluster.attributor.claims((7,), reading()))
    cluster.registry.register(worker, Tags(project="atlas"))
    second = only(cluster.attributor.claims((7,), reading()))
    assert (told(first), told(second)) == (
        ("unattributed", "12", "scheduler"), ("atlas", "12", "tag"),
    )  # fmt: skip
