"""One order: the scheduler says who, the first that speaks says what; conflicts are visible."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.mapping import MappingRule, RuleBook, RuleMatch
from flopledger_agent.attribution.precedence import Site
from flopledger_agent.attribution.tag_values import EVIDENCE_MAX, Tags
from flopledger_core.identity import require_id
from flopledger_core.records import FLAGS
from tests.agent.attribution.jobs import Cluster, allocation, reading
from tests.agent.attribution.people import process
from tests.agent.attribution.test_owners import HOSTILE, only

PRESENT = (False, True)
RULE = MappingRule(match=RuleMatch(user="alice"), project="by-rule", activity="sft")


def judged(
    *,
    job: bool,
    stated: bool,
    tag: bool,
    environment: bool,
    rule: bool,
    default: bool,
) -> Claim:
    """The only claim on a device with one process, whatever is said of it."""
    site = Site(
        rules=RuleBook([RULE] if rule else []), default_project="by-default" if default else None
    )
    worker = process(7, {"FLOPLEDGER_PROJECT": "by-environment"} if environment else {})
    cluster = Cluster(worker, site=site)
    if tag:
        cluster.registry.register(worker, Tags(project="by-tag"))
    if job:
        cluster.memberships.put(7, ("slurm", "12"))
        tags = {"project": "by-job"} if stated else {}
        cluster.source.now = (allocation(tags=tags, since_unix_ms=5),)
    return only(cluster.attributor.claims((7,), reading()))


@pytest.mark.parametrize(
    ("job", "tag", "environment", "rule", "default"), list(product(PRESENT, repeat=5))
)
def test_the_first_that_speaks_decides_and_the_job_is_the_schedulers(
    *, job: bool, tag: bool, environment: bool, rule: bool, default: bool
) -> None:
    """All 32 combinations: the owner, its source, and evidence that names what decided."""
    claim = judged(
        job=job, stated=False, tag=tag, environment=environment, rule=rule, default=default
    )
    order = [
        (tag, "tag", "by-tag", "tag registered for process 7"),
        (environment, "environment", "by-environment", "environment of process 7"),
        (rule, "rule", "by-rule", "mapping rule 1 (user=alice)"),
        (default, "default", "by-default", "attribution.default_project"),
        (True, "scheduler" if job else "none", None, "no FLOPLEDGER_PROJECT"),
    ]
    _spoke, source, project, told = next(item for item in order if item[0])
    assert (claim.source, claim.owner.project) == (source, project)
    assert claim.owner.kind == ("unattributed" if project is None else "attributed")
    assert told in (claim.evidence or "")
    assert (claim.owner.job, claim.allocated, claim.since_unix_ms) == (
        ("12", True, 5) if job else (None, False, None)
    )
    assert ("slurm job 12 of alice holds the device" in (claim.evidence or "")) == job
    assert claim.flags == ()
    if source == "rule":
        assert claim.owner.activity == "sft"


@pytest.mark.parametrize(
    ("tag", "environment", "rule", "default"), list(product(PRESENT, repeat=4))
)
def test_what_the_job_told_the_scheduler_wins_and_the_conflict_shows(
    *, tag: bool, environment: bool, rule: bool, default: bool
) -> None:
    """A tag of another project loses: the record is flagged, and the evidence names both."""
    claim = judged(
        job=True, stated=True, tag=tag, environment=environment, rule=rule, default=default
    )
    assert (claim.source, claim.owner.project, claim.owner.job) == ("scheduler", "by-job", "12")
    assert claim.flags == (("tag_conflict",) if tag or environment else ())
    for said, name in ((tag, "by-tag"), (environment and not tag, "by-environment")):
        assert (f"process 7 of alice says project {name}" in (claim.evidence or "")) == said
    assert "by-job" in (claim.evidence or "")


def test_another_users_tag_in_a_job_loses() -> None:
    """A process of bob in alice's job cannot say whose work it is."""
    cluster = Cluster(process(7, {"FLOPLEDGER_PROJECT": "bobs"}, user="bob"))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.owner.kind, claim.owner.job, claim.user) == ("unattributed", "12", "alice")
    assert claim.flags == ("tag_conflict",)
    assert "process 7 of bob says project bobs, and is not alice's" in (claim.evidence or "")


def test_root_in_a_job_contradicts_nobody() -> None:
    """An administrator, or a container's init, may tag work in it."""
    cluster = Cluster(process(7, {"FLOPLEDGER_PROJECT": "atlas"}, user="root"))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.owner.project, claim.owner.job, claim.flags) == ("atlas", "12", ())


def test_a_tag_that_agrees_adds_what_the_job_left_open() -> None:
    """Project from the job; run and precision from the process; activity from either."""
    environ = {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_RUN": "r1", "FLOPLEDGER_PRECISION": "fp8"}
    cluster = Cluster(process(7, environ))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (
        allocation(tags={"project": "atlas", "activity": "sft", "run": "r0"}, attempt="2"),
    )
    claim = only(cluster.attributor.claims((7,), reading()))
    owner = claim.owner
    assert (owner.project, owner.run, owner.activity, owner.attempt) == ("atlas", "r1", "sft", "2")
    assert (claim.precision, claim.precision_origin) == ("fp8", "declared")


def test_a_rule_completes_only_the_project_it_speaks_of() -> None:
    """What it gives beside a project is of that project; without one, of any."""
    rules = [
        MappingRule(match=RuleMatch(job_name="sft-*"), activity="sft", precision="bf16"),
        MappingRule(match=RuleMatch(user="alice"), project="zeus", activity="pretrain"),
    ]
    cluster = Cluster(process(7, {"FLOPLEDGER_PROJECT": "atlas"}), site=Site(rules=RuleBook(rules)))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(names={"job_name": "sft-3"}),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.owner.project, claim.owner.activity) == ("atlas", "sft")
    assert (claim.precision, claim.precision_origin) == ("bf16", "configured")
    cluster.source.now = (allocation(names={"job_name": "other"}),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.owner.project, claim.owner.activity) == ("atlas", "unclassified")


@pytest.mark.parametrize("where", ["comment", "environment"])
def test_nothing_is_guessed_in_the_place_of_a_refused_tag(where: str) -> None:
    """Whoever wrote a project that cannot be one meant one: neither rule nor default is it."""
    refused = {"FLOPLEDGER_PROJECT": "a b"} if where == "environment" else {}
    site = Site(rules=RuleBook([RULE]), default_project="by-default")
    cluster = Cluster(process(7, refused), site=site)
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(tags={"project": "a\nb"} if where == "comment" else {}),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.owner.kind, claim.owner.job) == ("unattributed", "12")
    assert claim.flags == ("invalid_tag",)
    assert "project is" in (claim.evidence or "")


def test_a_comment_that_names_only_a_stage_leaves_the_project_to_the_others() -> None:
    """The activity is the job's own word, the project the environment's."""
    cluster = Cluster(process(7, {"FLOPLEDGER_PROJECT": "atlas"}))
    cluster.memberships.put(7, ("slurm", "12"))
    cluster.source.now = (allocation(tags={"activity": "ablation"}),)
    claim = only(cluster.attributor.claims((7,), reading()))
    assert (claim.source, claim.owner.project, claim.owner.activity) == (
        "environment", "atlas", "ablation",
    )  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["project", "run", "activity", "precision", "x"]), HOSTILE),
    st.dictionaries(st.sampled_from(["account", "comment", "job_id"]), HOSTILE),
    HOSTILE,
    HOSTILE,
    st.dictionaries(st.sampled_from(["FLOPLEDGER_PROJECT", "FLOPLEDGER_RUN"]), HOSTILE),
)
def test_whatever_a_scheduler_and_a_process_say_gives_sound_claims(
    tags: dict[str, str], names: dict[str, str], job: str, user: str, environ: dict[str, str]
) -> None:
    """Never an exception, never idle, never an id that is none; the job is whole or flagged."""
    cluster = Cluster(process(7, environ, user=user or "u"))
    cluster.source.now = (allocation(job, tags=tags, names=names, user=user or None),)
    for pids in ((7,), (), None):
        for claim in cluster.attributor.claims(pids, reading()):
            assert claim.owner.kind != "idle"
            for field in ("entity", "project", "model", "run", "attempt", "job"):
                value = getattr(claim.owner, field)
                if value is not None:
                    require_id(field, value)
            assert claim.owner.job == job or "invalid_tag" in claim.flags
            assert set(claim.flags) <= set(FLAGS)
            assert len(claim.evidence or "") <= EVIDENCE_MAX
            assert (claim.evidence or "").isprintable()
            assert msgspec.json.encode(claim.attribution(1, 1))
