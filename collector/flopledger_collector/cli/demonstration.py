"""`flopledger demo`: a small simulated cluster, metered live."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--seconds", type=click.IntRange(1, 86_400), help="End after this long; default two minutes."
)
@click.option("--nodes", type=click.IntRange(1, 16), default=4, show_default=True,
              help="Simulated nodes of eight GPUs.")  # fmt: skip
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("flopledger-demo"),
    show_default=True,
    help="Where the ledger and the statements go.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another day of the cluster.")
@click.pass_context
def demo(context: click.Context, seconds: int | None, nodes: int, output: Path, seed: int) -> None:
    """Show a small cluster with simulated GPUs, metered by real agents.

    Example: flopledger demo --seconds 60
    """
    from flopledger_collector.demo.run import run  # noqa: PLC0415 - nobody else needs the demo

    context.exit(run(seconds, nodes, output, seed))
