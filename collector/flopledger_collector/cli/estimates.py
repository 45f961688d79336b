"""`flopledger estimate`: the Commission's two methods, offline and with bounds."""

from __future__ import annotations

import click

from flopledger_collector.cli.output import format_option, print_json, print_line, print_table
from flopledger_collector.estimates import (
    PASSES,
    Estimate,
    PeakBasis,
    estimate_architecture,
    estimate_document,
    estimate_hardware,
)
from flopledger_collector.reports import figures
from flopledger_core.accelerators import load_table
from flopledger_core.units import scientific


@click.group()
def estimate() -> None:
    """Estimate training compute from hours or from an architecture."""


@estimate.command()
@click.option("--accelerator", required=True, help="A key of the hardware table: 'H100 SXM'.")
@click.option("--gpu-hours", required=True, help="GPU-hours, as a decimal.")
@click.option("--precision", required=True, help="What the work ran at: bf16, fp8, tf32 ...")
@click.option("--utilization", required=True, help="Share of the peak, from 0 to 1.")
@click.option("--peak-flop-per-second", help="Another peak than the table's as the basis.")
@format_option("table", "json")
def hardware(
    *,
    accelerator: str,
    gpu_hours: str,
    precision: str,
    utilization: str,
    peak_flop_per_second: str | None,
    form: str,
) -> None:
    """Executed FLOP of GPU-hours at a stated utilisation: C = N x L x H x U.

    Example: flopledger estimate hardware --accelerator "H100 SXM" --gpu-hours 370000
    --precision bf16 --utilization 0.5
    """
    found = estimate_hardware(
        load_table(),
        accelerator,
        gpu_hours,
        precision,
        utilization,
        peak_flop_per_second=peak_flop_per_second,
    )
    _print(found, form)


@estimate.command()
@click.option("--parameters", required=True, help="Parameters; the active ones of a mixture.")
@click.option("--tokens", required=True, help="Tokens seen, once for each epoch.")
@click.option("--passes", type=click.Choice(tuple(PASSES)), default="training", show_default=True,
              help="Training (6ND), or forward passes only (2ND).")  # fmt: skip
@format_option("table", "json")
def architecture(parameters: str, tokens: str, passes: str, form: str) -> None:
    """Model FLOP of a dense transformer: C = 6 x parameters x tokens.

    Example: flopledger estimate architecture --parameters 405e9 --tokens 15.6e12
    """
    _print(estimate_architecture(parameters, tokens, passes), form)


def _print(found: Estimate, form: str) -> None:
    document = estimate_document(found)
    if form == "json":
        print_json(document)
        return
    rows = [
        (f"{found.basis} FLOP", figures.flop(found.flop)),
        ("Method", found.method),
        *((name.replace("_", " "), value) for name, value in found.inputs.items()),
        *([] if found.peak_basis is None else _peak_rows(found.peak_basis)),
    ]
    print_table(("Estimate", "Value"), rows)
    for assumption in found.assumptions:
        print_line(f"- {assumption}")


def _peak_rows(peak: PeakBasis) -> list[tuple[str, str]]:
    """The peak that the utilisation is a share of, how it was made, and its source."""
    made = "stated"
    if peak.flop_per_cycle_per_sm is not None:
        made = (
            f"{peak.sparsity}: {peak.sm_count} SMs x {peak.flop_per_cycle_per_sm} FLOP a cycle "
            f"x {peak.clock_mhz} MHz ({peak.pipe})"
        )
    return [
        ("peak, FLOP/s", scientific(int(peak.flop_per_second))),
        ("peak basis", made),
        ("datasheet, TFLOP/s", peak.datasheet_teraflop_per_second or figures.ABSENT),
        ("source", peak.source),
        ("hardware table", peak.table_version),
    ]
