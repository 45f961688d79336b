"""`flopledger budget`: thresholds of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from flopledger_collector.cli.amounts import CURRENCY, FLOP, GPU_HOURS, KILOWATT_HOURS, MONEY
from flopledger_collector.cli.ledgers import (
    Source,
    author_option,
    config_option,
    reading,
    reads_ledger,
    writing,
)
from flopledger_collector.cli.output import format_option, print_json, print_line, print_table
from flopledger_collector.reports import figures, json_form
from flopledger_core.identity import require_id
from flopledger_core.records import BudgetSet
from flopledger_core.units import NS_PER_MS

Quantity = Literal["flop", "energy_mj", "cost_cents", "gpu_time_ms"]


@click.group()
def budget() -> None:
    """Set and list thresholds of one's own."""


@budget.command("set")
@click.argument("project_id", metavar="PROJECT")
@click.option("--name", help="What the budget is called; default: its quantity.")
@click.option("--flop", type=FLOP, help="At most this many executed FLOP.")
@click.option(
    "--energy", "--energy-kwh", "energy", type=KILOWATT_HOURS, help="At most this many kWh."
)
@click.option("--gpu-hours", type=GPU_HOURS, help="At most this much GPU time.")
@click.option("--cost", type=MONEY, help="At most this cost, with --currency.")
@click.option("--currency", type=CURRENCY, help="Currency of the cost.")
@author_option
@config_option
def set_budget(
    *,
    project_id: str,
    name: str | None,
    flop: int | None,
    energy: int | None,
    gpu_hours: int | None,
    cost: int | None,
    currency: str | None,
    author: str,
    config_file: Path | None,
) -> None:
    """Set a budget of PROJECT; one of the same name is replaced.

    Example: flopledger budget set atlas --name spring --flop 1e20
    """
    require_id("project", project_id)
    given: list[tuple[Quantity, str, int]] = []
    if flop is not None:
        given.append(("flop", "compute", flop))
    if energy is not None:
        given.append(("energy_mj", "energy", energy))
    if gpu_hours is not None:
        given.append(("gpu_time_ms", "gpu-hours", gpu_hours))
    if cost is not None:
        given.append(("cost_cents", "cost", cost))
    if len(given) != 1:
        raise click.UsageError(
            "a budget limits one quantity; give --flop, --energy, --gpu-hours or --cost"
        )
    quantity, default_name, limit = given[0]
    if (quantity == "cost_cents") != (currency is not None):
        raise click.UsageError("--cost and --currency go together")
    with writing(config_file) as handle:
        record = BudgetSet(
            project=project_id,
            name=name or default_name,
            quantity=quantity,
            currency=currency,
            limit=str(limit),
            at_unix_ms=handle.clock.wall_unix_ns() // NS_PER_MS,
            author=author,
        )
        handle.entries.post(record)
    print_line(
        f"budget {record.name} of {project_id}: {figures.amount(quantity, limit)} "
        f"{figures.unit(quantity, currency)}"
    )


@budget.command("list")
@click.argument("project_id", metavar="[PROJECT]", required=False)
@format_option("table", "json")
@reads_ledger
def list_budgets(project_id: str | None, form: str, source: Source) -> None:
    """List the budgets in effect, of one PROJECT or of all.

    Example: flopledger budget list atlas
    """
    with reading(source) as opened:
        found = opened.ledger.budgets(project_id)
    if form == "json":
        print_json({"budgets": [json_form.budget_record_document(one) for one in found]})
        return
    print_table(
        ("Project", "Budget", "Limit", "Author", "Set at"),
        (
            (
                one.project,
                one.name,
                (
                    f"{figures.amount(one.quantity, int(one.limit))} "
                    f"{figures.unit(one.quantity, one.currency)}"
                ),
                one.author,
                figures.instant(one.at_unix_ms),
            )
            for one in found
        ),
        right=("Limit",),
    )
