"""Owners follow from processes and tags; nothing is guessed, nothing hostile gets through."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.owners import (
    OWNERS_MAX,
    EnvironmentAttributor,
    describe_claims,
)
from flopledger_agent.attribution.processes import PsutilProcessTable
from flopledger_agent.attribution.tag_values import EVIDENCE_MAX, FIELDS, VARIABLES, Tags
from flopledger_agent.attribution.tags import TagRegistry
from flopledger_core.identity import Owner, require_id
from flopledger_core.records import FLAGS
from tests.agent.attribution.people import FakeProcessTable, process, running, until

HOSTILE = st.one_of(
    st.text(max_size=200),
    st.sampled_from(
        ["idle", "unattributed", "a\nb", "x" * 10_240, "../../etc", " a", "a b", "ä", "\udc80", "0"]
    ),
)


def attributor(*processes: msgspec.Struct) -> EnvironmentAttributor:
    """An attributor over made-up processes, without registered tags."""
    table = FakeProcessTable(*processes)  # type: ignore[arg-type]
    return EnvironmentAttributor(table, TagRegistry(table))


def only(claims: tuple[Claim, ...]) -> Claim:
    """The single claim."""
    assert len(claims) == 1
    return claims[0]


def test_a_device_without_processes_is_idle() -> None:
    """Idleness is an account of its own."""
    claim = only(attributor().claims(()))
    assert (claim.owner.kind, claim.source, claim.weight) == ("idle", "idle", 1)


def test_processes_that_cannot_be_listed_are_unattributed() -> None:
    """Not idle: nobody knows."""
    claim = only(attributor().claims(None))
    assert (claim.owner.kind, claim.source) == ("unattributed", "none")
    assert claim.evidence is not None
    assert "listed" in claim.evidence


def test_every_tag_of_the_environment_reaches_the_owner() -> None:
    """Project, entity, model, run, attempt, job, activity and precision."""
    values = dict.fromkeys(FIELDS, "x") | {"activity": "pretrain", "precision": "bf16"}
    environ = {VARIABLES[field]: value for field, value in values.items()}
    claim = only(attributor(process(7, environ)).claims((7,)))
    assert claim.owner == Owner(
        kind="attributed", project="x", entity="x", model="x", run="x", attempt="x", job="x",
        activity="pretrain",
    )  # fmt: skip
    assert (claim.source, claim.precision, claim.precision_origin) == (
        "environment", "bf16", "declared",
    )  # fmt: skip
    assert (claim.user, claim.flags) == ("alice", ())


def test_the_scheduler_gives_the_job_only_where_no_tag_does() -> None:
    """And never a project."""
    slurm = {"SLURM_JOB_ID": "4711"}
    project = {"FLOPLEDGER_PROJECT": "atlas"}
    untagged = only(attributor(process(7, slurm)).claims((7,)))
    assert (untagged.owner.kind, untagged.owner.job) == ("unattributed", "4711")
    tagged = only(attributor(process(7, slurm | project)).claims((7,)))
    assert (tagged.owner.project, tagged.owner.job) == ("atlas", "4711")
    named = slurm | project | {"FLOPLEDGER_JOB": "mine"}
    assert only(attributor(process(7, named)).claims((7,))).owner.job == "mine"
    odd = only(attributor(process(7, project | {"PBS_JOBID": "1[].server"})).claims((7,)))
    assert (odd.owner.project, odd.owner.job, odd.flags) == ("atlas", None, ("invalid_tag",))


@pytest.mark.parametrize("field", ["project", "entity", "model", "run", "attempt", "job"])
@pytest.mark.parametrize("value", ["a\nb", "x" * 10_240, "-rf", "a b", "\udc80"])
def test_one_invalid_id_makes_the_work_unattributed(field: str, value: str) -> None:
    """Half an identity would be a lie; the evidence names the field."""
    environ = {"FLOPLEDGER_PROJECT": "atlas", VARIABLES[field]: value}
    claim = only(attributor(process(7, environ)).claims((7,)))
    assert (claim.owner.kind, claim.flags) == ("unattributed", ("invalid_tag",))
    assert claim.owner.project is None
    assert claim.evidence is not None
    assert f"{field} is" in claim.evidence
    assert "\n" not in claim.evidence


@pytest.mark.parametrize("name", ["idle", "unattributed"])
def test_the_ledgers_own_accounts_cannot_be_claimed(name: str) -> None:
    """Neither as a project nor as an activity."""
    claim = only(attributor(process(7, {"FLOPLEDGER_PROJECT": name})).claims((7,)))
    assert (claim.owner.kind, claim.flags) == ("unattributed", ("invalid_tag",))
    environ = {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_ACTIVITY": name}
    claim = only(attributor(process(7, environ)).claims((7,)))
    assert (claim.owner.activity, claim.flags) == ("unclassified", ("invalid_tag",))


def test_an_unknown_activity_or_precision_is_left_out_and_flagged() -> None:
    """The project keeps its work; what it is stays open."""
    environ = {
        "FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_ACTIVITY": "magic",
        "FLOPLEDGER_PRECISION": "fp7",
    }  # fmt: skip
    claim = only(attributor(process(7, environ)).claims((7,)))
    assert (claim.owner.project, claim.owner.activity) == ("atlas", "unclassified")
    assert (claim.precision, claim.precision_origin) == (None, "unknown")
    assert claim.flags == ("invalid_tag",)
    assert claim.evidence is not None
    assert "magic" in claim.evidence


def test_empty_variables_are_not_set() -> None:
    """A script that exports an empty run has no run."""
    environ = {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_RUN": "", "FLOPLEDGER_ACTIVITY": ""}
    claim = only(attributor(process(7, environ)).claims((7,)))
    assert (claim.owner.run, claim.owner.activity, claim.flags) == (None, "unclassified", ())
    nothing = only(attributor(process(7, {"FLOPLEDGER_PROJECT": ""})).claims((7,)))
    assert (nothing.owner.kind, nothing.flags) == ("unattributed", ())


@given(st.dictionaries(st.sampled_from(list(VARIABLES.values())), HOSTILE))
def test_whatever_stands_in_an_environment_gives_one_sound_claim(environ: dict[str, str]) -> None:
    """Never an exception, never an id that is none, always something a record can carry."""
    claim = only(attributor(process(7, environ)).claims((7,)))
    for field in ("entity", "project", "model", "run", "attempt", "job"):
        value = getattr(claim.owner, field)
        if value is not None:
            require_id(field, value)
            assert environ[VARIABLES[field]] == value
    assert set(claim.flags) <= set(FLAGS)
    assert claim.evidence is not None
    assert len(claim.evidence) <= EVIDENCE_MAX
    assert msgspec.json.encode(claim.attribution(1, 1))
    assert msgspec.json.encode(claim.owner)


def test_an_unreadable_environment_is_unattributed_with_the_reason() -> None:
    """Another user's job that did not register."""
    claim = only(attributor(process(7, None, reason="no permission")).claims((7,)))
    assert claim.owner.kind == "unattributed"
    assert claim.evidence == "process 7: environment not readable: no permission"


def test_a_process_that_is_gone_is_unattributed() -> None:
    """It was there when the driver was asked."""
    claim = only(attributor().claims((7,)))
    assert (claim.owner.kind, claim.source) == ("unattributed", "none")


def test_processes_of_one_owner_are_one_claim_with_their_number_as_weight() -> None:
    """Two owners split by processes, in an order that never changes."""
    atlas, zeus = {"FLOPLEDGER_PROJECT": "atlas"}, {"FLOPLEDGER_PROJECT": "zeus"}
    people = attributor(process(1, zeus), process(2, atlas), process(3, zeus), process(4, {}))
    claims = people.claims((4, 3, 2, 1))
    assert [(claim.owner.account, claim.weight) for claim in claims] == [
        ("atlas", 1), ("zeus", 2), ("unattributed", 1),
    ]  # fmt: skip
    assert people.claims((1, 2, 3, 4, 1)) == claims
    told = describe_claims(claims)
    assert told[0] == ("atlas, unclassified, share 1 of 4, user alice: environment of process 2")
    assert len(told) == 3


def test_a_registered_tag_comes_before_the_environment() -> None:
    """The explicit statement wins, also for descendants, the nearest first."""
    child = process(9, {"FLOPLEDGER_PROJECT": "env"}, ancestors=((8, 5), (1, 1)))
    launcher = process(8, {})
    table = FakeProcessTable(child, launcher)
    registry = TagRegistry(table)
    people = EnvironmentAttributor(table, registry)
    assert only(people.claims((9,))).owner.project == "env"
    registry.register(process(1, create_time_ms=1), Tags(project="far"))
    assert only(people.claims((9,))).owner.project == "far"
    registry.register(launcher, Tags(project="near", precision="fp8"))
    claim = only(people.claims((9,)))
    assert (claim.owner.project, claim.source, claim.precision) == ("near", "tag", "fp8")
    assert claim.evidence == "tag registered for process 8"


def test_a_reused_pid_is_never_the_old_job() -> None:
    """Same pid, other create time: the tag does not apply, and nothing remembered does."""
    old = process(9, {}, create_time_ms=5)
    table = FakeProcessTable(old)
    registry = TagRegistry(table)
    people = EnvironmentAttributor(table, registry)
    registry.register(old, Tags(project="old"))
    assert only(people.claims((9,))).owner.project == "old"
    table.processes[9] = process(9, {"FLOPLEDGER_PROJECT": "new"}, create_time_ms=6)
    assert only(people.claims((9,))).owner.project == "new"
    grandchild = process(10, {}, ancestors=((9, 6),))
    table.processes[10] = grandchild
    assert only(people.claims((10,))).owner.kind == "unattributed"
    people.close()


def test_real_processes_are_attributed_by_their_environment() -> None:
    """Through psutil and the kernel."""
    table = PsutilProcessTable()
    people = EnvironmentAttributor(table, TagRegistry(table))
    with running({"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_RUN": "r1"}) as one, running() as two:
        until(lambda: people.claims((one.pid,))[0].owner.project == "atlas", "exec")
        claims = people.claims((one.pid, two.pid))
        assert [claim.owner.account for claim in claims] == ["atlas", "unattributed"]
        assert claims[0].owner.run == "r1"


def test_a_flood_of_owners_on_one_device_ends_in_nobody() -> None:
    """Ten thousand processes with a project each: a few owners, the rest nobody's, none lost."""
    people = [process(pid, {"FLOPLEDGER_PROJECT": f"p{pid}"}) for pid in range(1, 10_001)]
    claims = attributor(*people).claims(tuple(range(1, 10_001)))

    assert len(claims) == OWNERS_MAX + 1
    assert sum(claim.weight for claim in claims) == 10_000
    assert claims[-1].owner.kind == "unattributed"
    claims[0].attribution(len(claims), 10_000)
