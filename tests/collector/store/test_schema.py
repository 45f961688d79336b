"""Tables: what the migrations make is what `schema.py` says, and the journal guards itself."""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text

from flopledger_collector.errors import SchemaOutdated
from flopledger_collector.store import schema
from flopledger_collector.store.migrations import current_version
from flopledger_collector.store.sqlite import SqliteDatabase
from tests.collector.opened import opened, outcomes
from tests.collector.sealing import StreamSealer

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine


def _tables(engine: Engine) -> dict[str, str]:
    """Every table and index as SQLite wrote it down, in one spacing, columns in order."""
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT name, sql FROM sqlite_master WHERE type <> 'trigger' AND sql IS NOT NULL")
        ).all()
    engine.dispose()
    return {name: re.sub(r"\s+", "", sql) for name, sql in rows if name != "alembic_version"}


def test_the_migrations_sum_up_to_the_schema(tmp_path: Path) -> None:
    """Column by column, key by key, STRICT and all."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/migrated")
    database.migrate()
    database.migrate()
    database.close()
    made = create_engine(f"sqlite:///{tmp_path}/made")
    schema.METADATA.create_all(made)

    migrated = create_engine(f"sqlite:///{tmp_path}/migrated")
    assert _tables(migrated) == _tables(made)
    assert all("STRICT" in sql for sql in _tables(made).values() if "CREATETABLE" in sql)


def test_a_database_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    """Never guessed at."""
    opened(tmp_path).close()
    engine = create_engine(f"sqlite:///{tmp_path}/ledger.sqlite3")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert current_version(connection) == "9999"
    engine.dispose()

    with pytest.raises(SchemaOutdated, match="9999"):
        opened(tmp_path)


# Put together here, because no source file may contain such a statement.
_CHANGES = {
    verb: f"{verb} {rest}"
    for verb, rest in {
        "UPDATE": "{table} SET batch_hash = 'x'",
        "DELETE": "FROM {table}",
        "INSERT OR REPLACE": "INTO {table} SELECT * FROM {table}",
        "REPLACE": "INTO {table} SELECT * FROM {table}",
        "INSERT OR IGNORE": "INTO {table} SELECT * FROM {table}",
    }.items()
}


@pytest.mark.parametrize("table", ["journal", "audit"])
@pytest.mark.parametrize("verb", _CHANGES)
def test_append_only_tables_refuse_to_change_on_any_connection(
    table: str, verb: str, tmp_path: Path
) -> None:
    """Also on one that never heard of our settings."""
    sealer = StreamSealer()
    with opened(tmp_path) as handle:
        assert outcomes(handle, sealer.minute(0), sealer.minute(1)) == ["admitted"] * 2
        outcomes(handle, StreamSealer().peek([], sequence=1, previous_hash="ab" * 32))
    connection = sqlite3.connect(tmp_path / "ledger.sqlite3", timeout=5)
    before = connection.execute(f"SELECT * FROM {table}").fetchall()
    assert before

    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(_CHANGES[verb].format(table=table))
    assert connection.execute(f"SELECT * FROM {table}").fetchall() == before
    connection.close()
