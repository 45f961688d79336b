"""Tables: what the migrations make is what `schema.py` says, and the journal guards itself."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from typing import TYPE_CHECKING

import msgspec
import pytest
from sqlalchemy import create_engine, text

from flopledger_collector.errors import SchemaOutdated
from flopledger_collector.store import schema
from flopledger_collector.store.migrations import current_version, step_back
from flopledger_collector.store.sqlite import SqliteDatabase
from tests.collector.ledger.test_fold import projections
from tests.collector.opened import folded, opened, opening, outcomes
from tests.collector.sealing import StreamSealer, first_estimate, gap, hosts, hours, usage

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Engine

    from flopledger_collector.handle import LedgerHandle
    from flopledger_core.records import Record


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


def _old_history(handle: LedgerHandle) -> None:
    """What a ledger of the older tables held: no node's usage, no estimate, GPUs' energy alone."""
    handle.entries.post(opening())
    handle.entries.post(hours("w:1"))
    sealer = StreamSealer()
    outcomes(handle, sealer.minute(0), sealer.minute(1441), sealer.seal([gap(1442)]))


def _stepped_back(directory: Path, version: str) -> list[str]:
    """Take a closed ledger back; the older group's columns."""
    engine = create_engine(f"sqlite:///{directory}/ledger.sqlite3")
    step_back(engine, version)
    with engine.connect() as connection:
        assert current_version(connection) == version
        rows = connection.execute(text("SELECT name FROM pragma_table_info('rollup_group')"))
        names = [row[0] for row in rows]
    engine.dispose()
    return names


def test_old_data_is_kept_both_ways(tmp_path: Path) -> None:
    """Down and up again: every projection is as it was, and as a rebuild makes it."""
    with opened(tmp_path) as handle:
        _old_history(handle)
        before = folded(handle)
    live = projections(tmp_path)
    names = _stepped_back(tmp_path, "0002")
    assert "energy_scope" not in names
    assert projections_of_version_two(tmp_path) == len(live["rollup_group"])

    with opened(tmp_path) as handle:
        assert projections(tmp_path) == live
        assert handle.ledger.totals().lines == before.lines
        outcomes(handle, StreamSealer(2, node="node-2").minute(0))
        folded(handle)
        grown = projections(tmp_path)
        handle.rebuild()
        assert projections(tmp_path) == grown


def projections_of_version_two(directory: Path) -> int:
    """How many groups of the older tables have the id that the older program gives them."""
    engine = create_engine(f"sqlite:///{directory}/ledger.sqlite3")
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM rollup_group")).all()
    engine.dispose()
    digests = [hashlib.sha256(msgspec.json.encode(tuple(row[1:15]))).hexdigest() for row in rows]
    assert digests == [row[0] for row in rows]
    return len(rows)


def test_what_the_older_tables_cannot_hold_comes_back_by_a_rebuild(tmp_path: Path) -> None:
    """Nodes' usage leaves, groups fall together with their sums; the journal has it all."""
    big = 10**18
    with opened(tmp_path) as handle:
        records: list[Record] = [
            usage(0, 0, energy_mj=big, estimate=first_estimate(5)),
            usage(0, 1, energy_mj=big + 1),
            *hosts(0),
        ]
        outcomes(handle, StreamSealer().seal(records))
        before = folded(handle)
        live = projections(tmp_path)
    _stepped_back(tmp_path, "0002")
    assert projections_of_version_two(tmp_path) == 1  # two became one; both are disputed
    with opened(tmp_path) as handle:
        lines = handle.ledger.totals("atlas").lines
        assert sum(line.sums["energy_mj"] for line in lines) == 2 * big + 1
        handle.rebuild()
        assert projections(tmp_path) == live
        assert handle.ledger.totals().lines == before.lines


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
