"""SQLite: the default database. Everything that only SQLite understands is in this file.

Write-ahead log, so that readers and the writer do not wait for each other; synchronous=FULL, so
that a commit that returned survives a power cut; BEGIN IMMEDIATE, so that two writing processes
queue at the busy timeout instead of failing when a read turns into a write.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from flopledger_collector.errors import StoreBusy, StoreError, StoreFull
from flopledger_collector.store import migrations
from flopledger_collector.store.journal_rows import JournalRows
from flopledger_collector.store.projection_rows import ProjectionRows
from flopledger_collector.store.readings import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

BUSY_TIMEOUT_SECONDS: Final = 30  # longer than any group commit or fold; a rebuild may exceed it
POOL_TIMEOUT_SECONDS: Final = 30
READERS_MAX: Final = 16  # web threads; a reader is one file handle and a page cache
AUTOCHECKPOINT_PAGES: Final = 8_000  # 32 MiB of log: a few seconds of full load between copies
CACHE_KIB: Final = 64 * 1024  # the index of a month's journal heads stays in memory
_SQLITE_BUSY: Final = 5
_SQLITE_LOCKED: Final = 6
_SQLITE_FULL: Final = 13
_PRIMARY_CODE: Final = 0xFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteWriting:
    """One BEGIN IMMEDIATE transaction."""

    journal: JournalRows
    projections: ProjectionRows


class SqliteDatabase:
    """The ledger in one SQLite file, with its write-ahead log beside it."""

    def __init__(self, url: str) -> None:
        self._writer = _engine(url, begin="BEGIN IMMEDIATE", pool_size=1, query_only=False)
        self._reader = _engine(url, begin="BEGIN", pool_size=READERS_MAX, query_only=True)

    def migrate(self) -> None:
        """Bring the tables to this program's version."""
        with _translated():
            migrations.migrate(self._writer)

    @contextmanager
    def writing(self) -> Iterator[SqliteWriting]:
        """A transaction no other writer overlaps, in this process or another."""
        with _translated(), self._writer.begin() as connection:
            yield SqliteWriting(
                journal=JournalRows(connection), projections=ProjectionRows(connection)
            )

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """One snapshot; a writer does not wait for it, nor it for a writer."""
        with _translated(), self._reader.begin() as connection:
            yield Reading(connection)

    def close(self) -> None:
        """Let go of every connection."""
        self._reader.dispose()
        self._writer.dispose()


def _engine(url: str, *, begin: str, pool_size: int, query_only: bool) -> Engine:
    """An engine whose transactions begin as told, on connections with our pragmas."""
    engine = create_engine(
        make_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        # The driver must not begin transactions by itself; the listener below does.
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None},
    )

    def connected(connection: Any, _record: object) -> None:  # noqa: ANN401 (a DB-API connection)
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "recursive_triggers=ON",
            f"wal_autocheckpoint={AUTOCHECKPOINT_PAGES}",
            f"cache_size=-{CACHE_KIB}",
            f"query_only={'ON' if query_only else 'OFF'}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def began(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", began)
    return engine


@contextmanager
def _translated() -> Iterator[None]:
    """The driver's errors as the collector's, by SQLite's own result code."""
    try:
        yield
    except PoolTimeout as error:
        raise StoreBusy(
            f"database: this process was busy with it for {POOL_TIMEOUT_SECONDS} s; send again"
        ) from error
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & _PRIMARY_CODE
        if code in {_SQLITE_BUSY, _SQLITE_LOCKED}:
            raise StoreBusy(
                f"database: another process kept it for {BUSY_TIMEOUT_SECONDS} s ({error.orig}); "
                "send again when it is done"
            ) from error
        if code == _SQLITE_FULL:
            raise StoreFull(
                f"database: the disk is full ({error.orig}); free space, nothing was lost"
            ) from error
        kind = "the driver reports" if isinstance(error, OperationalError) else "it refused"
        raise StoreError(f"database: {kind} {error.orig}; see the collector's log") from error
