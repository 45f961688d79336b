"""`flopledger serve`, `migrate` and `rebuild`: the collector itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from flopledger_collector import app
from flopledger_collector.cli.ledgers import config_of, config_option
from flopledger_collector.config import parse_config
from flopledger_collector.handle import open_ledger

if TYPE_CHECKING:
    from flopledger_collector.handle import LedgerHandle


@click.command()
@config_option
@click.option("--listen", metavar="HOST:PORT", help="Listen here instead.")
def serve(config_file: Path | None, listen: str | None) -> None:
    """Run the collector until SIGINT or SIGTERM.

    Example: flopledger serve --config collector.toml
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for chatty in ("alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    config = config_of(config_file)
    if listen is not None:
        table = msgspec.json.encode(listen).decode()  # a JSON string is a TOML string
        web = parse_config(f"[web]\nlisten_address = {table}\n").web
        config = msgspec.structs.replace(config, web=web)
    app.serve(config, _say_ready)


def _say_ready(url: str, handle: LedgerHandle) -> None:
    kind = ", simulated" if handle.simulated else ""
    click.echo(f"flopledger: ledger {handle.ledger_id}{kind}, serving {url}", err=True)


@click.command()
@config_option
def migrate(config_file: Path | None) -> None:
    """Begin the ledger, or bring its tables to this version.

    Example: flopledger migrate --config collector.toml
    """
    with open_ledger(config_of(config_file)) as handle:
        click.echo(f"ledger {handle.ledger_id} is at this version's tables")


@click.command()
@config_option
def rebuild(config_file: Path | None) -> None:
    """Make every total again from the journal, the only truth.

    Example: flopledger rebuild --config collector.toml
    """
    with open_ledger(config_of(config_file)) as handle:
        entries = handle.rebuild()
        click.echo(f"folded {entries} journal entries again")
