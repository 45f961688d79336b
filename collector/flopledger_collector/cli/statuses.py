"""`flopledger status`: running totals against thresholds."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

import click

from flopledger_collector.cli.ledgers import Source, reading, reads_ledger
from flopledger_collector.cli.output import (
    format_option,
    print_gap,
    print_json,
    print_line,
    print_table,
    verdict,
)
from flopledger_collector.cli.program import finding
from flopledger_collector.reports import figures, json_form
from flopledger_collector.reports.measured import energy_label
from flopledger_collector.reports.statement import ENERGY_BOUNDARY
from flopledger_collector.status import evaluate_ledger, evaluate_project
from flopledger_core.units import scientific

if TYPE_CHECKING:
    from rich.text import Text

    from flopledger_collector.instruments.comparison import Ratio
    from flopledger_collector.ledger.position import Position
    from flopledger_collector.status import LedgerStatus, ProjectStatus


REASON_COLUMNS: Final = 78  # a table's width less the indent


@click.command()
@click.argument("project", required=False)
@click.option("--check", is_flag=True, help="Exit 1 when a threshold or a budget is exceeded.")
@format_option("table", "json")
@reads_ledger
@click.pass_context
def status(
    context: click.Context, *, project: str | None, check: bool, form: str, source: Source
) -> None:
    """Show running totals against thresholds, of one PROJECT or of all.

    Example: flopledger status atlas --check
    """
    with reading(source) as opened:
        if project is None:
            found = evaluate_ledger(opened.ledger, opened.rules)
            statuses: tuple[ProjectStatus, ...] = found.projects
            if form == "json":
                print_json(json_form.ledger_document(found))
            else:
                _print_ledger(found)
        else:
            one = evaluate_project(opened.ledger, opened.rules, project)
            statuses = (one,)
            if form == "json":
                print_json(json_form.status_document(one))
            else:
                _print_project(one)
                _print_position(one.position, simulated=one.simulated)
    if check and any(one.exceeded for one in statuses):
        finding(context)


def _print_ledger(found: LedgerStatus) -> None:
    if not found.projects:
        print_line("no project yet; open one with `flopledger project create`")
    for one in found.projects:
        _print_project(one)
    rows = [
        (
            name,
            figures.hours(usage.known("gpu_time_ms", usage.gpu_time_ms)),
            figures.gpu_hours(usage.gap_time_ms),
            figures.energy(usage.known("energy_mj", usage.energy_mj)),
            figures.flop(usage.known("flop", usage.work.flop)),
            figures.seconds(usage.known_cpu_time),
        )
        for name, usage in (("idle", found.idle), ("unattributed", found.unattributed))
    ]
    titles = ("Account", "GPU-hours", "gaps", "kWh (gpu)", "FLOP", "CPU-s")
    print_table(titles, rows, right=titles[1:])
    _print_position(found.position, simulated=found.simulated)


def _print_project(one: ProjectStatus) -> None:
    info, usage = one.info, one.usage
    opened = "" if info.opened else " (not opened by anybody)"
    titles = ("Threshold", "Used", "Limit", "Share", "Verdict")
    rows: list[tuple[str | Text, ...]] = [
        (
            found.name,
            figures.quantity_span(found.quantity, found.used),
            (
                f"{figures.amount(found.quantity, found.limit)} "
                f"{figures.unit(found.quantity, found.currency)}"
            ),
            _share(found.reached),
            verdict(found.verdict),
        )
        for found in one.budgets
    ]
    for assessment in one.assessments:
        instrument, evaluation = assessment.instrument, assessment.evaluation
        compared = evaluation.threshold
        rows.append(
            (
                instrument.id,
                figures.flop(compared.value),
                (
                    f"{instrument.comparator} {scientific(instrument.threshold)} "
                    f"{figures.unit(instrument.quantity)}"
                ),
                _share(compared.ratio),
                verdict(evaluation.verdict),
            )
        )
    print_table(titles, rows, right=("Used", "Limit", "Share"), title=f"{info.project}{opened}")
    flop = figures.flop(usage.known("flop", one.flop))
    energy = figures.energy(usage.known("energy_mj", one.energy_mj))
    hours = figures.hours(usage.known("gpu_time_ms", one.gpu_time_ms))
    print_line(f"  executed FLOP {flop}")
    tensor = figures.flop(usage.known("flop", usage.work.flop_tensor))
    cores = figures.flop(usage.known("flop", usage.work.flop_cores))
    print_line(f"  its own by tensor pipes {tensor}")
    print_line(f"  its own by CUDA cores {cores}")
    print_line(f"  kWh at the GPU {energy}; GPU-hours {hours}")
    for boundary, joules in one.energy_by_boundary.items():
        if boundary != ENERGY_BOUNDARY:
            print_line(f"  {energy_label(boundary)}, never added: {figures.energy(joules)}")
    if one.known_cpu_time is not None:
        print_line(f"  CPU-seconds (metered nodes) {figures.seconds(one.known_cpu_time)}")
    if usage.stand_in_records:
        records = figures.counted(usage.stand_in_records, "record")
        print_line(f"  {records} of devices that the table lacks")
    if usage.model_flop.high:
        print_line(f"  {figures.flop(usage.model_flop)} model FLOP declared, kept apart")
    if usage.disputed_records:
        records = figures.counted(usage.disputed_records, "disputed record")
        print_line(f"  {records}, only in the high bounds")
    if one.shared.records:
        print_line(
            f"  of unknown owner, in the high bounds: {figures.flop(one.shared.work.flop)} FLOP"
        )
    for reason in one.reasons:
        for part in textwrap.wrap(figures.one_line(reason), REASON_COLUMNS):
            print_line(f"  {part}")
    print_gap()


def _share(reached: Ratio | None) -> str:
    return figures.ABSENT if reached is None else figures.per_cent(reached.central)


def _print_position(position: Position, *, simulated: bool) -> None:
    if simulated:
        print_line("simulated data: these figures are no evidence of anything")
    provisional = ""
    if position.provisional_entries:
        provisional = f"; provisional: {position.provisional_entries} entries are not folded yet"
    print_line(
        f"at {position.entries} journal entries, heads root {position.heads_root[:16]}, "
        f"{figures.instant(position.at_unix_ms)}{provisional}"
    )
