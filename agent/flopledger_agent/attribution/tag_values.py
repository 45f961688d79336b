"""What a tag may say, and how what it says becomes an owner; the same for every way a tag comes in.

Values come from job environments and may be hostile. An id is kept whole or refused: one invalid id
makes the work unattributed with the field named, never attributed to half an identity. Only the
variables listed here are ever kept of anybody's environment.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, cast, get_args

import msgspec

from flopledger_core.activities import IDLE, UNATTRIBUTED, UNCLASSIFIED, require_activity
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import UNATTRIBUTED_OWNER, Owner, require_id
from flopledger_core.records import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

VARIABLE_PREFIX: Final = "FLOPLEDGER_"
FIELDS: Final = ("project", "entity", "model", "run", "attempt", "job", "activity", "precision")
VARIABLES: Final = {field: VARIABLE_PREFIX + field.upper() for field in FIELDS}
"""Tag field -> environment variable."""

# Where a scheduler says which job this is; the first one set counts, and only as the job's id.
SCHEDULER_JOB_VARIABLES: Final = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
KEPT_VARIABLES: Final = frozenset({*VARIABLES.values(), *SCHEDULER_JOB_VARIABLES})
"""Everything that may be remembered of a process's environment; the rest may hold secrets."""

EVIDENCE_MAX: Final = 256  # records.Attribution.evidence
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)


class Tags(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What somebody said about a process; nothing in it is checked yet."""

    project: str
    entity: str | None = None
    model: str | None = None
    run: str | None = None
    attempt: str | None = None
    job: str | None = None
    activity: str | None = None
    precision: str | None = None

    def environment(self) -> dict[str, str]:
        """The same tags as environment variables."""
        values = {VARIABLES[field]: getattr(self, field) for field in FIELDS}
        return {name: value for name, value in values.items() if value}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The owner that tags lead to; `trouble` says in a sentence what was refused of them."""

    owner: Owner
    precision: Precision | None
    flags: tuple[str, ...]
    trouble: str | None


def tags_in(environ: Mapping[str, str]) -> Tags | None:
    """The tags in an environment; None when it names no project. Empty variables are not set."""
    values = {field: environ.get(variable) or None for field, variable in VARIABLES.items()}
    return None if values["project"] is None else msgspec.convert(values, Tags)


def scheduler_job(environ: Mapping[str, str]) -> str | None:
    """The id the scheduler gave to the job of an environment."""
    return next((environ[name] for name in SCHEDULER_JOB_VARIABLES if environ.get(name)), None)


def judge(tags: Tags, job: str | None) -> Verdict:
    """The owner of work tagged so; `job` is the scheduler's id, used where the tags give none."""
    troubles: list[str] = []
    try:
        ids = _ids(tags)
    except InvalidInput as error:
        return Verdict(
            owner=UNATTRIBUTED_OWNER, precision=None, flags=("invalid_tag",), trouble=str(error)
        )
    if ids["job"] is None and job is not None:
        ids["job"] = _kept(partial(require_id, "scheduler job", job), troubles)
    activity = _kept(partial(_activity, tags.activity), troubles)
    precision: Precision | None = _kept(partial(_precision, tags.precision), troubles)
    return Verdict(
        owner=Owner(
            kind="attributed",
            entity=ids["entity"],
            project=ids["project"],
            model=ids["model"],
            run=ids["run"],
            attempt=ids["attempt"],
            job=ids["job"],
            activity=activity or UNCLASSIFIED,
        ),
        precision=precision,
        flags=("invalid_tag",) if troubles else (),
        trouble="; ".join(troubles) or None,
    )


def require_tags(tags: Tags) -> Tags:
    """`tags` if all of them can be used as they are. Errors: InvalidInput names the field."""
    _ids(tags)
    _activity(tags.activity)
    _precision(tags.precision)
    return tags


def evidence(text: str) -> str:
    """`text` as a record may carry it: one line, short, nothing unprintable."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= EVIDENCE_MAX else clean[: EVIDENCE_MAX - 1] + "…"


def _ids(tags: Tags) -> dict[str, str | None]:
    ids: dict[str, str | None] = {}
    for field in ("project", "entity", "model", "run", "attempt", "job"):
        value = getattr(tags, field) or None
        ids[field] = None if value is None else require_id(field, value)
    if ids["project"] is None:
        raise InvalidInput("project", tags.project, "name the project")
    Owner(kind="attributed", project=ids["project"])  # refuses the ledger's own names
    return ids


def _activity(name: str | None) -> str | None:
    if not name:
        return None
    if name in {IDLE, UNATTRIBUTED}:
        raise InvalidInput("activity", name, "this is an account of the ledger itself")
    return require_activity(name)


def _precision(name: str | None) -> Precision | None:
    if not name:
        return None
    if name not in PRECISIONS:
        raise InvalidInput("precision", name, f"use one of: {', '.join(PRECISIONS)}")
    return cast("Precision", name)


def _kept(check: Callable[[], T | None], troubles: list[str]) -> T | None:
    """What `check` gives, or None with its complaint noted."""
    try:
        return check()
    except InvalidInput as error:
        troubles.append(str(error))
        return None
