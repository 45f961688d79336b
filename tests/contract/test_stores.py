"""Every database that can keep a ledger keeps the same promises: one suite over all of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import pytest

from flopledger_collector.errors import StoreError
from flopledger_collector.journal import (
    AuditEntry,
    Changes,
    DeviceLease,
    JournalEntry,
    KeyEntry,
    LedgerIdentity,
    StreamState,
)
from flopledger_collector.ledger.delta import delta_of
from flopledger_collector.store.sqlite import SqliteDatabase
from tests.collector.sealing import START_UNIX_MS, StreamSealer, usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flopledger_collector.store.interface import Database

# A new database joins with one line.
STORES: Final[dict[str, Callable[[Path], Database]]] = {
    "sqlite": lambda directory: SqliteDatabase(f"sqlite:///{directory}/ledger.sqlite3"),
    "sqlite-odd-path": lambda directory: SqliteDatabase(f"sqlite:///{directory}/a b%20é.db"),
}
STREAM: Final = "ab" * 16


@pytest.fixture(params=STORES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty, migrated database of each kind."""
    made = STORES[request.param](tmp_path)
    made.migrate()
    yield made
    made.close()


def _state(sequence: int, stream_id: str = STREAM) -> StreamState:
    return StreamState(
        stream_id=stream_id, fingerprint="f", node="n", cluster=None, author="agent",
        simulated=False, head_sequence=sequence, head_hash=f"{sequence:064x}",
        last_received_unix_ms=1, last_window_end_unix_ms=2,
    )  # fmt: skip


def _entry(sequence: int, content: bytes = b"x", stream_id: str = STREAM) -> JournalEntry:
    return JournalEntry(
        stream_id=stream_id, sequence=sequence, batch_hash=f"{sequence:064x}", content=content,
        received_unix_ms=1, findings=(),
    )  # fmt: skip


def test_what_is_written_is_read_back(database: Database) -> None:
    """Every kind of row, new and moved."""
    lease = DeviceLease(
        device_key="GPU-1", stream_id=STREAM, first_start_unix_ms=5, last_end_unix_ms=9
    )
    key = KeyEntry(
        fingerprint="f", public_key="p", node=None, state="trusted", added_unix_ms=3, how="config"
    )
    with database.writing() as writing:
        writing.journal.write(
            Changes(entries=[_entry(0)], streams=[_state(0)], keys=[key], leases=[lease])
        )
    moved = DeviceLease(
        device_key="GPU-1", stream_id=STREAM, first_start_unix_ms=5, last_end_unix_ms=99
    )
    with database.writing() as writing:
        writing.journal.write(Changes(entries=[_entry(1)], streams=[_state(1)], leases=[moved]))

    with database.writing() as writing:
        assert writing.journal.streams([STREAM, "other"]) == {STREAM: _state(1)}
        assert writing.journal.keys(["f", "g"]) == {"f": key}
        assert writing.journal.leases(["GPU-1"]) == [moved]
        assert writing.journal.batch_hash(STREAM, 0) == f"{0:064x}"
        assert writing.journal.batch_hash(STREAM, 2) is None
        assert writing.journal.ledger() is None
        row = LedgerIdentity(ledger_id="c" * 32, created_unix_ms=1, simulated=True)
        writing.journal.found_ledger(row)
        assert writing.journal.ledger() == row
    with database.reading() as reading:
        assert reading.journal_entries() == 2
        assert [entry.sequence for entry in reading.unfolded(10)] == [0, 1]


def test_a_failed_block_leaves_nothing(database: Database) -> None:
    """All of a transaction or none of it."""

    def fail() -> None:
        with database.writing() as writing:
            writing.journal.write(Changes(entries=[_entry(0)], streams=[_state(0)]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.reading() as reading:
        assert reading.journal_entries() == 0


def test_a_place_in_the_journal_is_taken_once(database: Database) -> None:
    """The second row for a place is an error that takes its transaction with it."""
    with database.writing() as writing:
        writing.journal.write(Changes(entries=[_entry(0)], streams=[_state(0)]))
    with pytest.raises(StoreError), database.writing() as writing:
        writing.journal.write(Changes(entries=[_entry(0, b"y")], streams=[_state(7)]))
    with database.reading() as reading:
        assert [entry.content for entry in reading.unfolded(10)] == [b"x"]
        assert reading.journal_entries() == 1


def test_audits_are_kept_once(database: Database) -> None:
    """A sender that repeats itself does not fill the disk."""
    audit = AuditEntry(
        at_unix_ms=1, code="conflict", stream_id=STREAM, sequence=3, batch_hash="h", message="m"
    )
    for _ in range(2):
        with database.writing() as writing:
            writing.journal.write(Changes(audits=[audit, audit]))
    with database.reading() as reading:
        assert reading.audit_counts() == {"conflict": 1}


def test_a_reader_sees_one_snapshot_while_others_write(database: Database) -> None:
    """Totals and the position they name belong together."""
    with database.writing() as writing:
        writing.journal.write(Changes(entries=[_entry(0)], streams=[_state(0)]))
    with database.reading() as reading:
        assert reading.journal_entries() == 1
        with database.writing() as writing:
            writing.journal.write(Changes(entries=[_entry(1)], streams=[_state(1)]))
        assert reading.journal_entries() == 1
    with database.reading() as reading:
        assert reading.journal_entries() == 2


def test_a_delta_is_added_once(database: Database) -> None:
    """The same chunk folded by two is added by the first and turned down for the second."""
    sealer = StreamSealer(stream_id=STREAM)
    for sequence in range(2):
        content = sealer.seal([usage(sequence)])
        with database.writing() as writing:
            writing.journal.write(
                Changes(entries=[_entry(sequence, content)], streams=[_state(sequence)])
            )
    with database.reading() as reading:
        delta = delta_of(reading.unfolded(10))
    with database.writing() as writing:
        assert writing.projections.add(delta)
    with database.writing() as writing:
        assert not writing.projections.add(delta)
    with database.reading() as reading:
        (group,) = reading.rollup(None, None, None, by_job=False)
        assert group.records == 2
        assert group.first_unix_ms == START_UNIX_MS
        assert reading.unfolded(10) == []


def test_writers_queue_instead_of_failing(database: Database) -> None:
    """Threads that each read and then write the same stream lose nothing."""

    def post(stream_id: str) -> None:
        for _ in range(10):
            with database.writing() as writing:
                states = writing.journal.streams([STREAM])
                sequence = states[STREAM].head_sequence + 1 if states else 0
                writing.journal.write(
                    Changes(entries=[_entry(sequence)], streams=[_state(sequence)])
                )

    threads = [threading.Thread(target=post, args=(STREAM,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with database.reading() as reading:
        assert reading.journal_entries() == 40
        assert [entry.sequence for entry in reading.unfolded(100)] == list(range(40))
