"""What was said of work, in one form: by a job to its scheduler, a process, a rule. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.mapping import PLACEHOLDER_PROJECT
from flopledger_agent.attribution.tag_values import Tags, judge
from flopledger_core.activities import UNCLASSIFIED
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import require_id
from flopledger_core.records import Precision, PrecisionOrigin

if TYPE_CHECKING:
    from flopledger_agent.attribution.allocations import Allocation
    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.attribution.mapping import MappingRule

STATED: Final = ("project", "entity", "model", "run", "activity", "precision")


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody said of work; None: nothing of that. Everything in it is checked."""

    project: str | None = None
    entity: str | None = None
    model: str | None = None
    run: str | None = None
    attempt: str | None = None
    activity: str | None = None
    precision: Precision | None = None
    precision_origin: PrecisionOrigin = "unknown"
    flags: tuple[str, ...] = ()
    trouble: str | None = None  # what was refused of it
    is_refused: bool = False  # all of it was: nothing may be guessed in its place


NOTHING: Final = Said()


def stated_by(allocation: Allocation) -> Said:
    """What a job said of itself to its scheduler.

    One id that cannot be one spoils all of it: half an identity would be a lie.
    """
    tags = {name: allocation.tags[name] for name in STATED if allocation.tags.get(name)}
    if not tags:
        return NOTHING
    verdict = judge(Tags(**{"project": PLACEHOLDER_PROJECT, **tags}), None)
    said = Said(flags=verdict.flags, trouble=verdict.trouble)
    if verdict.owner.project is None:
        return msgspec.structs.replace(said, is_refused=True)
    return msgspec.structs.replace(
        said,
        project=verdict.owner.project if "project" in tags else None,
        entity=verdict.owner.entity,
        model=verdict.owner.model,
        run=verdict.owner.run,
        activity=_classified(verdict.owner.activity),
        precision=verdict.precision,
        precision_origin="unknown" if verdict.precision is None else "declared",
    )


def said_by(claim: Claim) -> Said:
    """What a process said, by the claim its tag or environment led to."""
    owner = claim.owner
    if owner.project is None:
        return Said(flags=claim.flags, is_refused="invalid_tag" in claim.flags)
    return Said(
        project=owner.project,
        entity=owner.entity,
        model=owner.model,
        run=owner.run,
        attempt=owner.attempt,
        activity=_classified(owner.activity),
        precision=claim.precision,
        precision_origin=claim.precision_origin,
        flags=claim.flags,
    )


def given_by(rule: MappingRule) -> Said:
    """What a mapping rule gives; it was checked when the configuration was read."""
    return Said(
        project=rule.project,
        entity=rule.entity,
        model=rule.model,
        run=rule.run,
        activity=rule.activity,
        precision=rule.precision,
        precision_origin="unknown" if rule.precision is None else "configured",
    )


def usable_id(text: str | None) -> str | None:
    """`text` if it can be an id in a record, else None."""
    if not text:
        return None
    try:
        return require_id("id", text)
    except InvalidInput:
        return None


def _classified(activity: str) -> str | None:
    return None if activity == UNCLASSIFIED else activity
