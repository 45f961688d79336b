"""SQLite: durable by its settings, and its failures are ours by name."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from flopledger_collector.errors import StoreBusy, StoreFull
from flopledger_collector.store import sqlite
from flopledger_collector.store.sqlite import SqliteDatabase
from tests.collector.opened import opened, outcomes, send
from tests.collector.sealing import StreamSealer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_commit_survives_a_power_cut_by_its_settings(tmp_path: Path) -> None:
    """Write-ahead log, synchronous=FULL, on the connection that writes."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/x")
    with database._writer.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers")
        }
    database.close()
    assert pragmas == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "recursive_triggers": 1,
    }  # fmt: skip


def test_a_full_disk_acknowledges_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """The sender is told to send again, and can once there is space."""
    sealer = StreamSealer()
    with opened(tmp_path) as handle:
        outcomes(handle, sealer.minute(0))
        refused = [sealer.minute(minute) for minute in range(1, 40)]
        writer = handle.database._writer  # type: ignore[attr-defined]
        with writer.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreFull, match="disk is full"):
            send(handle, *refused)
        assert handle.ledger.position().provisional_entries == 1

        with writer.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert set(outcomes(handle, *refused)) == {"admitted"}


def test_a_database_that_stays_locked_is_busy_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the busy timeout the caller may try again."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0)
    with opened(tmp_path) as handle:
        other = sqlite3.connect(tmp_path / "ledger.sqlite3", timeout=5, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy, match="send again"):
            send(handle, StreamSealer().minute(0))
        other.execute("ROLLBACK")
        other.close()
        assert outcomes(handle, StreamSealer().minute(0)) == ["admitted"]
