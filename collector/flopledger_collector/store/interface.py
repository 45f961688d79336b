"""The port of a database: transactions to write in, snapshots to read, and nothing else.

One implementation a file; `tests/contract/test_stores.py` runs one suite over all of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from flopledger_collector.store.journal_rows import JournalRows
from flopledger_collector.store.projection_rows import ProjectionRows
from flopledger_collector.store.readings import Reading


class Writing(Protocol):
    """One writing transaction."""

    @property
    def journal(self) -> JournalRows:
        """The journal and the collector's own state."""
        ...

    @property
    def projections(self) -> ProjectionRows:
        """What is folded from the journal."""
        ...


class Database(Protocol):
    """A place that keeps the ledger."""

    def migrate(self) -> None:
        """Bring the tables to this program's version; does nothing when they are there."""
        ...

    def writing(self) -> AbstractContextManager[Writing]:
        """A transaction no other writer overlaps; committed durably when the block ends well."""
        ...

    def reading(self) -> AbstractContextManager[Reading]:
        """One consistent snapshot, which never waits for a writer."""
        ...

    def close(self) -> None:
        """Let go of every connection."""
        ...
