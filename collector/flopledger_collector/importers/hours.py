"""From scheduler jobs to records of GPU time: who owns a job, on what, at which utilisation.

Only ended jobs with GPUs become records. A job whose project cannot be told is unattributed work:
it is counted, in the high bound of every project, and never dropped. The import key names the
scheduler's own record, so that importing a file again posts nothing twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from flopledger_core.activities import UNCLASSIFIED
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import RESERVED_PROJECTS, UNATTRIBUTED_OWNER, Owner, require_id
from flopledger_core.records import ImportedHours, Precision
from flopledger_core.units import MS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_collector.importers.sacct import SacctJob, SacctReport

ProjectFrom = Literal["account", "comment"]


class HoursTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What the person who imports knows and the scheduler does not."""

    cluster: str  # of jobs whose line names none
    accelerator: str | None  # a key of the hardware table
    precision: Precision | None
    utilization_per_mille: int | None
    utilization_source: str | None
    project_from: ProjectFrom
    source: str
    at_unix_ms: int
    author: str


def hours_of(report: SacctReport, terms: HoursTerms) -> tuple[ImportedHours, ...]:
    """The records of a report's ended jobs that had GPUs, in file order."""
    return tuple(_record(job, terms) for job in report.jobs if job.gpus)


def _record(job: SacctJob, terms: HoursTerms) -> ImportedHours:
    elapsed_ms = job.elapsed_seconds * MS_PER_SECOND
    cluster = job.cluster or terms.cluster
    return ImportedHours(
        import_key=f"{cluster}/{job.job_id}/{job.start_unix_ms}",
        cluster=cluster,
        owner=_owner(job, terms.project_from),
        accelerator=terms.accelerator,
        gpus=job.gpus,
        start_unix_ms=job.start_unix_ms,
        end_unix_ms=job.start_unix_ms + elapsed_ms,
        gpu_time_ms=job.gpus * elapsed_ms,
        precision=terms.precision,
        utilization_per_mille=terms.utilization_per_mille,
        utilization_source=terms.utilization_source,
        source=terms.source,
        at_unix_ms=terms.at_unix_ms,
        author=terms.author,
    )


def _owner(job: SacctJob, project_from: ProjectFrom) -> Owner:
    """The account or the comment's tag names the project; what is no id names nobody."""
    proposal = job.proposal if project_from == "comment" else None
    if project_from == "comment":
        project = None if proposal is None else proposal.project
    else:
        project = job.account
    if project is None or project in RESERVED_PROJECTS:
        return UNATTRIBUTED_OWNER
    try:
        return Owner(
            kind="attributed",
            project=require_id("project", project),
            job=_job_id(job.job_id),
            activity=UNCLASSIFIED if proposal is None else proposal.activity,
        )
    except InvalidInput:
        return UNATTRIBUTED_OWNER


def _job_id(text: str) -> str | None:
    """The scheduler's id where it can be one of ours; array ranges cannot."""
    try:
        return require_id("job", text)
    except InvalidInput:
        return None
