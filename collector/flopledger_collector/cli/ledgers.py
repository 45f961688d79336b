"""How commands find and open a ledger.

Commands that only read never touch keys, trust or tables, and never found a ledger: a mistyped
path is an error, not an empty answer. Commands that post need the collector's configuration,
because its key signs and its trust list is applied at opening.
"""

from __future__ import annotations

import functools
import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from flopledger_collector.config import CollectorConfig, load_config
from flopledger_collector.errors import ConfigInvalid, StoreError
from flopledger_collector.handle import LedgerHandle, clock_of, open_ledger
from flopledger_collector.ledger.totals import Ledger
from flopledger_collector.status import Rules, load_rules
from flopledger_collector.store.sqlite import SqliteDatabase
from flopledger_core.accelerators import load_table
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from flopledger_collector.clocks import Clock

CONFIG_VARIABLE: Final = "FLOPLEDGER_CONFIG"
SQLITE_PREFIX: Final = "sqlite:///"
UNKNOWN_AUTHOR: Final = "unknown"

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which ledger the person means."""

    config_file: Path | None
    database: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLedger:
    """A ledger opened for reading."""

    ledger: Ledger
    clock: Clock
    rules: Rules
    provenance: tuple[str, ...]  # what the configuration says of the inputs

    def now_unix_ms(self) -> int:
        """The ledger's calendar time."""
        return self.clock.wall_unix_ns() // NS_PER_MS


def config_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--config`: the collector's configuration file."""
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        envvar=CONFIG_VARIABLE,
        help=f"The collector's configuration file; default ${CONFIG_VARIABLE}.",
    )(command)


def reads_ledger(command: Callable[..., R]) -> Callable[..., R]:
    """Add `--config` and `--database`, and hand the command a `source`."""

    @config_option
    @click.option("--database", help="A ledger's SQLite file or URL, instead of --config.")
    @functools.wraps(command)
    def wrapped(
        *args: Any,  # noqa: ANN401 (whatever the command takes)
        config_file: Path | None,
        database: str | None,
        **rest: Any,  # noqa: ANN401
    ) -> R:
        source = Source(config_file=config_file, database=database)
        return command(*args, source=source, **rest)

    return wrapped


def config_of(config_file: Path | None) -> CollectorConfig:
    """The configuration a posting command needs."""
    if config_file is None:
        raise click.UsageError(f"no ledger is named: give --config FILE or set {CONFIG_VARIABLE}")
    return load_config(config_file)


def rules_of(config: CollectorConfig) -> Rules:
    """The packaged rules and those of the configured directories."""
    return load_rules(
        config.policies.adopted,
        policy_directory=config.policies.path,
        instrument_directory=config.instruments.path,
    )


@contextmanager
def writing(config_file: Path | None) -> Iterator[LedgerHandle]:
    """The ledger open for posting; what was posted is folded before it is closed."""
    with open_ledger(config_of(config_file)) as handle:
        yield handle
        handle.folder.fold()


@contextmanager
def reading(source: Source) -> Iterator[ReadLedger]:
    """The ledger open for reading."""
    if source.database is not None:
        config = CollectorConfig()
        url = source.database
        if "://" not in url:
            url = f"{SQLITE_PREFIX}{Path(url).absolute()}"
    elif source.config_file is not None:
        config = load_config(source.config_file)
        url = config.database_url
    else:
        raise click.UsageError(
            f"no ledger is named: give --config FILE, --database FILE or set {CONFIG_VARIABLE}"
        )
    _require_file(url)
    rules = rules_of(config)
    clock, database = clock_of(config), SqliteDatabase(url)
    try:
        ledger = _ledger(database, url, clock)
        yield ReadLedger(
            ledger=ledger, clock=clock, rules=rules, provenance=config.ledger.provenance
        )
    finally:
        database.close()


def _ledger(database: SqliteDatabase, url: str, clock: Clock) -> Ledger:
    try:
        with database.writing() as transaction:
            row = transaction.journal.ledger()
    except StoreError as error:
        raise StoreError(f"database {url}: it holds no ledger this version reads ({error})") from (
            error
        )
    if row is None:
        raise StoreError(f"database {url}: it holds no ledger yet; run `flopledger migrate`")
    return Ledger(database, table=load_table(), clock=clock, identity=row)


def _require_file(url: str) -> None:
    if not url.startswith(SQLITE_PREFIX):
        raise ConfigInvalid("--database", url, "this version reads sqlite:/// ledgers only")
    path = Path(url.removeprefix(SQLITE_PREFIX))
    if not path.is_file():
        raise ConfigInvalid(
            "database",
            str(path),
            "no ledger is there; name another, or begin one with `flopledger migrate --config`",
        )


def author_name() -> str:
    """Who posts, unless they say otherwise: the operating system's user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return UNKNOWN_AUTHOR


def author_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--author`: who stands behind the entry."""
    return click.option(
        "--author", default=author_name, show_default="your user name", help="Who posts this."
    )(command)
