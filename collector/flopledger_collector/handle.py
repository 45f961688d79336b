"""Opening a ledger: the one place where its parts are put together.

The server, every command and the tests open it this way: tables migrated, hardware table and key
loaded, the configuration's keys brought in. Threads begin when they are needed: the writer's at
the first batch, the folder's when it is started.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from flopledger_collector.clocks import ScaledClock, SystemClock
from flopledger_collector.entries import Entries
from flopledger_collector.errors import ConfigInvalid
from flopledger_collector.ingest import Rules
from flopledger_collector.journal import Changes, LedgerIdentity
from flopledger_collector.keys import load_or_create_key
from flopledger_collector.ledger.fold import Folder
from flopledger_collector.ledger.rebuild import rebuild
from flopledger_collector.ledger.totals import Ledger
from flopledger_collector.store.sqlite import SqliteDatabase
from flopledger_collector.trust import is_loopback, plan_keys
from flopledger_collector.writer import Writer
from flopledger_core.accelerators import AcceleratorTable, load_table
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from types import TracebackType

    from flopledger_collector.clocks import Clock
    from flopledger_collector.config import CollectorConfig
    from flopledger_collector.store.interface import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHandle:
    """An open ledger. Close it, or use it as a context manager."""

    config: CollectorConfig
    clock: Clock
    table: AcceleratorTable
    ledger_id: str
    simulated: bool
    public_key: str  # the collector's own
    database: Database
    writer: Writer
    ledger: Ledger
    entries: Entries
    folder: Folder

    def rebuild(self) -> int:
        """Make every projection again from the journal; the number of entries folded."""
        return rebuild(self.database)

    def close(self) -> None:
        """Answer what waits, end the threads, fold nothing more, let go of the database."""
        self.writer.close()
        self.folder.stop()
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def clock_of(config: CollectorConfig) -> Clock:
    """The clock the configuration asks for: the machine's, or a demonstration's faster one."""
    return SystemClock() if config.clock is None else ScaledClock(config.clock)


def open_ledger(
    config: CollectorConfig, clock: Clock | None = None, table: AcceleratorTable | None = None
) -> LedgerHandle:
    """Open the ledger of a configuration; founds it, key and tables included, at first use.

    Without a hardware table the packaged one is used. Totals follow the table; the journal does
    not change with it.
    """
    clock = clock_of(config) if clock is None else clock
    try:
        config.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigInvalid(
            "state.directory", config.state.directory, f"name a directory to write in ({error})"
        ) from error
    key = load_or_create_key(config.key_file)
    table = load_table() if table is None else table
    database = SqliteDatabase(config.database_url)
    try:
        database.migrate()
        row = _founded(database, config, key.public_key, clock.wall_unix_ns() // NS_PER_MS)
    except BaseException:
        database.close()
        raise
    rules = Rules(
        ledger_id=row.ledger_id,
        simulated=row.simulated,
        first_use=config.trust.first_use == "loopback" and is_loopback(config.web.listen_address),
    )
    return LedgerHandle(
        config=config,
        clock=clock,
        table=table,
        ledger_id=row.ledger_id,
        simulated=row.simulated,
        public_key=key.public_key,
        database=database,
        writer=Writer(database, table=table, rules=rules, clock=clock),
        ledger=Ledger(database, table=table, clock=clock, identity=row),
        entries=Entries(database, key=key, table=table, clock=clock, identity=row),
        folder=Folder(database, interval_seconds=float(config.fold.interval_seconds)),
    )


def _founded(
    database: Database, config: CollectorConfig, collector_key: str, now_unix_ms: int
) -> LedgerIdentity:
    """The ledger's row, written at first use, and the keys as the configuration wants them."""
    with database.writing() as writing:
        row = writing.journal.ledger()
        if row is None:
            row = LedgerIdentity(
                ledger_id=secrets.token_hex(16),
                created_unix_ms=now_unix_ms,
                simulated=config.ledger.simulated,
            )
            writing.journal.found_ledger(row)
        if row.simulated != config.ledger.simulated:
            raise ConfigInvalid(
                "ledger.simulated",
                config.ledger.simulated,
                f"this ledger was founded with {row.simulated}; use another state directory",
            )
        known = {key.fingerprint: key for key in writing.journal.all_keys()}
        plan = plan_keys(
            config.trust.keys, known, collector_key=collector_key, now_unix_ms=now_unix_ms
        )
        writing.journal.write(Changes(keys=plan.added))
        for key in plan.changed:
            writing.journal.change_key(key)
    return row
