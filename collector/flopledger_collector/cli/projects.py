"""`flopledger project` and `flopledger job`: who uses, and what each job used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from flopledger_collector.cli.ledgers import (
    Source,
    author_option,
    config_option,
    reading,
    reads_ledger,
    writing,
)
from flopledger_collector.cli.output import format_option, print_json, print_line, print_table
from flopledger_collector.ledger.totals import GPU_BOUNDARY, MODULE_BOUNDARY
from flopledger_collector.reports import figures, json_form
from flopledger_collector.reports.measured import energy_cell
from flopledger_collector.silence import opened_job, said
from flopledger_collector.status import require_project
from flopledger_collector.usage import energies_of, gpu_time_of
from flopledger_core.identity import require_id
from flopledger_core.records import ProjectOpened
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_collector.ledger.totals import JobLine


@click.group()
def project() -> None:
    """Open, list and show projects."""


@project.command()
@click.argument("project_id", metavar="PROJECT")
@click.option("--entity", help="The legal entity that develops it.")
@click.option("--title", help="What it is, for people.")
@author_option
@config_option
def create(
    project_id: str, entity: str | None, title: str | None, author: str, config_file: Path | None
) -> None:
    """Open PROJECT, so that its usage is no longer flagged; again to change its title or entity.

    Example: flopledger project create atlas --title "Atlas 2"
    """
    require_id("project", project_id)
    if entity is not None:
        require_id("entity", entity)
    with writing(config_file) as handle:
        before = {info.project: info for info in handle.ledger.projects()}.get(project_id)
        record = ProjectOpened(
            project=project_id,
            entity=entity,
            title=title,
            at_unix_ms=handle.clock.wall_unix_ns() // NS_PER_MS,
            author=author,
        )
        if (
            before is not None
            and before.opened
            and (before.entity, before.title) == (entity, title)
        ):
            print_line(f"{project_id} is open already")
            return
        handle.entries.post(record)
    print_line(f"{project_id} is open")


@project.command("list")
@format_option("table", "json")
@reads_ledger
def list_projects(form: str, source: Source) -> None:
    """List every project, also those that nobody opened.

    Example: flopledger project list
    """
    with reading(source) as opened:
        found = opened.ledger.projects()
    if form == "json":
        print_json({"projects": [json_form.project_document(info) for info in found]})
        return
    print_table(
        ("Project", "Title", "Entity", "Opened", "Last seen"),
        (
            (
                info.project,
                info.title or figures.ABSENT,
                info.entity or figures.ABSENT,
                figures.instant(info.opened_unix_ms) if info.opened else "no",
                figures.instant(info.last_unix_ms),
            )
            for info in found
        ),
    )


@project.command()
@click.argument("project_id", metavar="PROJECT")
@format_option("table", "json")
@reads_ledger
def show(project_id: str, form: str, source: Source) -> None:
    """Show who PROJECT is and what people declared for it.

    Example: flopledger project show atlas
    """
    with reading(source) as opened:
        info = require_project(opened.ledger, project_id)
        declarations = opened.ledger.declarations(project_id)
        budgets = opened.ledger.budgets(project_id)
    if form == "json":
        print_json(
            {
                "project": json_form.project_document(info),
                "declarations": [msgspec.structs.asdict(one) for one in declarations],
                "budgets": [json_form.budget_record_document(one) for one in budgets],
            }
        )
        return
    rows = [
        ("Project", info.project),
        ("Title", info.title or figures.ABSENT),
        ("Entity", info.entity or figures.ABSENT),
        ("Opened", figures.instant(info.opened_unix_ms) if info.opened else "no"),
        ("First seen", figures.instant(info.first_unix_ms)),
        ("Last seen", figures.instant(info.last_unix_ms)),
        *(
            (f"Declared {figures.instant(one.at_unix_ms)[:10]}", f"{one.activity}: {one.method}")
            for one in declarations
        ),
        *(("Budget", one.name) for one in budgets),
    ]
    print_table(("Field", "Value"), rows)


@click.group()
def job() -> None:
    """What each job used."""


@job.command("list")
@click.argument("project_id", metavar="PROJECT")
@format_option("table", "json")
@reads_ledger
def list_jobs(project_id: str, form: str, source: Source) -> None:
    """List the jobs of PROJECT: FLOP with bounds, energy, GPU-hours, CPU-seconds.

    Example: flopledger job list atlas
    """
    with reading(source) as opened:
        require_project(opened.ledger, project_id)
        lines = tuple(opened_job(line) for line in opened.ledger.jobs(project_id))
    if form == "json":
        print_json({"jobs": [json_form.line_document(line) for line in lines]})
        return
    devices = tuple(line for line in lines if not line.is_host)
    nodes = tuple(line for line in lines if line.is_host)
    titles = ("Job", "Run", "Activity", "Tier", "GPU-hours", "kWh", "FLOP")
    print_table(titles, (_of_devices(line) for line in devices), right=titles[4:])
    if nodes:
        print_table(
            ("Job", "Run", "Activity", "CPU-seconds", "kWh (boundary)"),
            (row for line in nodes for row in _of_node(line)),
            right=("CPU-seconds", "kWh (boundary)"),
            title="Of nodes without their GPUs",
        )


def _work_of(line: JobLine) -> tuple[str, str, str]:
    disputed = " (disputed)" if line.standing == "disputed" else ""
    return line.job or figures.ABSENT, line.run or figures.ABSENT, line.activity + disputed


def _of_devices(line: JobLine) -> tuple[str, ...]:
    """A line of GPUs or declarations; energy of a GPU unless a whole module is named."""
    module = line.energy_boundary == MODULE_BOUNDARY
    energies = energies_of(line)
    return (
        *_work_of(line),
        line.tier,
        figures.hours(said(line, "gpu_time_ms", gpu_time_of(line))),
        energy_cell(energies) if module else figures.energy(energies.get(GPU_BOUNDARY)),
        figures.flop(said(line, "flop", line.work.flop)),
    )


def _of_node(line: JobLine) -> Iterator[tuple[str, ...]]:
    """One row for each boundary; the first has the CPU time."""
    seconds = figures.seconds(said(line, "cpu_time_ms", line.cpu_time_ms))
    cells = [energy_cell({boundary: energy}) for boundary, energy in energies_of(line).items()]
    for index, cell in enumerate(cells or [figures.ABSENT]):
        yield (*_work_of(line), seconds, cell) if index == 0 else (" ", " ", " ", " ", cell)
