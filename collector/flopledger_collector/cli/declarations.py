"""`flopledger declare`: what meters cannot see, stated by a person with evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from flopledger_collector.cli.amounts import (
    CURRENCY,
    DAY,
    FLOP,
    GPU_HOURS,
    KILOWATT_HOURS,
    MONEY,
    OPERATIONS,
)
from flopledger_collector.cli.ledgers import author_option, config_option, writing
from flopledger_collector.cli.output import print_line
from flopledger_core.activities import UNCLASSIFIED, require_activity
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import require_id
from flopledger_core.records import Declaration
from flopledger_core.units import NS_PER_MS


@click.group()
def declare() -> None:
    """State what meters cannot see."""


@declare.command()
@click.argument("project_id", metavar="PROJECT")
@click.option("--flop", type=FLOP, help="Executed FLOP, where it is known exactly.")
@click.option(
    "--flop-bounds", type=FLOP, nargs=3, metavar="LOW CENTRAL HIGH", help="Executed FLOP, bounded."
)
@click.option(
    "--model-flop", is_flag=True, help="The FLOP are of a model's architecture (6ND), not executed."
)
@click.option(
    "--integer-operations", type=OPERATIONS, help="Integer operations; 0 where there were none."
)
@click.option("--energy-kwh", type=KILOWATT_HOURS, help="Energy at the GPU.")
@click.option("--gpu-hours", type=GPU_HOURS, help="GPU time.")
@click.option("--cost", type=MONEY, help="Cost, with --currency.")
@click.option("--currency", type=CURRENCY, help="Currency of the cost.")
@click.option(
    "--activity", default=UNCLASSIFIED, show_default=True, help="What kind of work it was."
)
@click.option("--model", help="The model it was for.")
@click.option("--run", help="The run it was.")
@click.option("--from", "start", type=DAY, required=True, help="First UTC day of the work.")
@click.option("--to", "end", type=DAY, required=True, help="First UTC day after the work.")
@click.option("--method", required=True, help="How the amounts were established.")
@click.option("--evidence", help="Where the proof is.")
@author_option
@config_option
def usage(
    *,
    project_id: str,
    flop: int | None,
    flop_bounds: tuple[int, int, int] | None,
    model_flop: bool,
    integer_operations: int | None,
    energy_kwh: int | None,
    gpu_hours: int | None,
    cost: int | None,
    currency: str | None,
    activity: str,
    model: str | None,
    run: str | None,
    start: int,
    end: int,
    method: str,
    evidence: str | None,
    author: str,
    config_file: Path | None,
) -> None:
    """Declare usage of PROJECT that no meter saw. It stays a declaration for ever.

    Example: flopledger declare usage atlas --flop-bounds 9e24 9.5e24 9.9e24
    --activity pretrain --from 2024-01-01 --to 2024-07-01 --method "opening balance, 6ND"
    """
    require_id("project", project_id)
    require_activity(activity, "--activity")
    for field, value in (("--model", model), ("--run", run)):
        if value is not None:
            require_id(field, value)
    bounds = _bounds(flop, flop_bounds)
    if (cost is None) != (currency is None):
        raise click.UsageError("--cost and --currency go together")
    if all(one is None for one in (bounds, integer_operations, energy_kwh, gpu_hours, cost)):
        raise click.UsageError(
            "nothing is declared; give --flop, --energy-kwh, --gpu-hours, --cost"
        )
    if model_flop and bounds is None:
        raise click.UsageError("--model-flop says what --flop is; give --flop or --flop-bounds")
    basis: Literal["executed", "model"] = "model" if model_flop else "executed"
    with writing(config_file) as handle:
        record = Declaration(
            project=project_id,
            model=model,
            run=run,
            activity=activity,
            start_unix_ms=start,
            end_unix_ms=end,
            flop_low=None if bounds is None else str(bounds[0]),
            flop_central=None if bounds is None else str(bounds[1]),
            flop_high=None if bounds is None else str(bounds[2]),
            flop_basis=basis,
            integer_operations=_text(integer_operations),
            energy_mj=_text(energy_kwh),
            gpu_time_ms=_text(gpu_hours),
            cost_cents=_text(cost),
            currency=currency,
            method=method,
            evidence=evidence,
            at_unix_ms=handle.clock.wall_unix_ns() // NS_PER_MS,
            author=author,
        )
        posted = handle.entries.post(record)
    print_line(f"declared for {project_id}: entry {posted.sequence} of stream {posted.stream_id}")


def _bounds(
    flop: int | None, flop_bounds: tuple[int, int, int] | None
) -> tuple[int, int, int] | None:
    if flop is not None and flop_bounds is not None:
        raise click.UsageError("give --flop or --flop-bounds, not both")
    if flop is not None:
        return (flop, flop, flop)
    if flop_bounds is not None and not flop_bounds[0] <= flop_bounds[1] <= flop_bounds[2]:
        raise InvalidInput("--flop-bounds", flop_bounds, "give them in order: LOW CENTRAL HIGH")
    return flop_bounds


def _text(amount: int | None) -> str | None:
    return None if amount is None else str(amount)
