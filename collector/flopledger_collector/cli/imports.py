"""`flopledger import`: what schedulers recorded, as GPU time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import cast

import click

from flopledger_collector.cli.ledgers import author_option, config_option, writing
from flopledger_collector.cli.output import format_option, print_json, print_line, print_table
from flopledger_collector.estimates import require_amount
from flopledger_collector.importers.hours import HoursTerms, ProjectFrom, hours_of
from flopledger_collector.importers.sacct import SacctReport, read_sacct
from flopledger_collector.reports.json_form import Document
from flopledger_core.accelerators import PRECISIONS, load_table
from flopledger_core.errors import InvalidInput
from flopledger_core.records import ImportedHours, Precision
from flopledger_core.units import MS_PER_SECOND, NS_PER_MS, gpu_hours


@click.group("import")
def imports() -> None:
    """Import what schedulers recorded."""


@imports.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show what would be posted, and post nothing.")
@click.option("--cluster", default="slurm", show_default=True,
              help="Whose job ids these are; part of what makes a record the same.")  # fmt: skip
@click.option("--accelerator", help="Key of the hardware table; without it FLOP is absent.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="What the jobs ran at.")
@click.option("--utilization", help="Stated share of the peak, 0 to 1, in whole per mille.")
@click.option("--utilization-source", help="Where the utilisation comes from.")
@click.option("--project-from", type=click.Choice(("account", "comment")), default="account",
              show_default=True, help="What names the project.")  # fmt: skip
@click.option("--time-zone", default="UTC", show_default=True, help="The site's zone.")
@author_option
@format_option("table", "json")
@config_option
def sacct(
    *,
    file: Path,
    dry_run: bool,
    cluster: str,
    accelerator: str | None,
    precision: str | None,
    utilization: str | None,
    utilization_source: str | None,
    project_from: str,
    time_zone: str,
    author: str,
    form: str,
    config_file: Path | None,
) -> None:
    """Import the text that `sacct --parsable2` prints, from FILE.

    Example: flopledger import sacct jobs.psv --accelerator "H100 SXM" --precision bf16
    --utilization 0.4 --utilization-source "fleet median" --time-zone Europe/Oslo --dry-run
    """
    if accelerator is not None:
        load_table().by_key(accelerator)
    share = _per_mille(utilization, utilization_source)
    report = read_sacct(file.read_bytes(), time_zone=time_zone)

    def records(at_unix_ms: int) -> tuple[ImportedHours, ...]:
        terms = HoursTerms(
            cluster=cluster,
            accelerator=accelerator,
            precision=cast("Precision | None", precision),
            utilization_per_mille=share,
            utilization_source=utilization_source,
            project_from=cast("ProjectFrom", project_from),
            source=f"sacct {file.name}",
            at_unix_ms=at_unix_ms,
            author=author,
        )
        return hours_of(report, terms)

    if dry_run:
        _print(_document(report, records(0)), report, form)
        return
    if accelerator is None:
        click.echo(
            "flopledger: no --accelerator is given: the FLOP of these hours stays open", err=True
        )
    with writing(config_file) as handle:
        entries = handle.entries.post_many(records(handle.clock.wall_unix_ns() // NS_PER_MS))
    document = _document(report, records(0)) | {
        "posted": sum(entry.posted_records for entry in entries),
        "duplicates": sum(len(entry.duplicates) for entry in entries),
        "differing": [key for entry in entries for key in getattr(entry, "differing", ())],
    }
    _print(document, report, form)


def _per_mille(utilization: str | None, source: str | None) -> int | None:
    if utilization is None:
        return None
    share: Fraction = require_amount("--utilization", utilization) * 1000
    if share.denominator != 1 or share > 1000:
        raise InvalidInput("--utilization", utilization, "give a share from 0 to 1, like 0.425")
    if source is None:
        raise InvalidInput(
            "--utilization-source", None, "say where the utilisation comes from; it is a claim"
        )
    return share.numerator


def _document(report: SacctReport, records: tuple[ImportedHours, ...]) -> Document:
    """The stable JSON document of an import."""
    by_project: dict[str, int] = {}
    for record in records:
        account = record.owner.account
        by_project[account] = by_project.get(account, 0) + record.gpu_time_ms
    return {
        "jobs": len(report.jobs),
        "gpu_jobs": len(records),
        "gpu_seconds": report.gpu_seconds,
        "running": len(report.running),
        "gpu_seconds_running": report.gpu_seconds_running,
        "step_lines": report.step_lines,
        "skipped": [
            {"line": one.line, "job_id": one.job_id, "reason": one.reason} for one in report.skipped
        ],
        "flagged": [
            {"line": job.line, "job_id": job.job_id, "flags": list(job.flags)}
            for job in (*report.jobs, *report.running)
            if job.flags
        ],
        "projects": {
            name: {"gpu_seconds": time_ms // MS_PER_SECOND}
            for name, time_ms in sorted(by_project.items())
        },
        "time_zone": report.time_zone,
    }


def _print(document: Document, report: SacctReport, form: str) -> None:
    if form == "json":
        print_json(document)
        return
    rows = [
        (name, gpu_hours(found["gpu_seconds"] * MS_PER_SECOND))
        for name, found in document["projects"].items()
    ]
    print_table(("Project", "GPU-hours"), rows, right=("GPU-hours",))
    print_line(
        f"{document['jobs']} ended jobs, {document['gpu_jobs']} with GPUs; "
        f"{document['running']} running, not posted; {len(report.skipped)} lines skipped"
    )
    for one in report.skipped:
        print_line(f"  line {one.line}: {one.reason}")
    if "posted" in document:
        print_line(
            f"posted {document['posted']} records, {document['duplicates']} were there already"
        )
        for key in document["differing"]:
            print_line(f"  {key}: posted before with other figures, which stand")
    else:
        print_line("dry run: nothing was posted")
