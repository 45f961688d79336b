"""The fold: journal entries become rollups, in chunks, never inside an ingest transaction.

Reading and adding up happen on a snapshot; the writing transaction only adds what was found, and
only if no other folder was there first. So any number of folders may run and each entry is folded
exactly once, and agents never wait for a fold longer than one chunk's writes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from flopledger_collector.journal import Changes
from flopledger_collector.ledger.delta import delta_of

if TYPE_CHECKING:
    from flopledger_collector.store.interface import Database

CHUNK_ENTRIES_MAX: Final = 2048  # some 12 MB of journal in memory at once
STOP_TIMEOUT_SECONDS: Final = 60.0


class Folder:
    """Folds the journal: once when told, or on a thread of its own at an interval."""

    def __init__(self, database: Database, *, interval_seconds: float) -> None:
        self._database = database
        self._interval_seconds = interval_seconds
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._one_at_a_time = threading.Lock()
        self.failure: Exception | None = None  # of the last fold on the thread; None: it went well

    def fold(self) -> int:
        """Fold until nothing is left; the number of journal entries folded."""
        folded = 0
        with self._one_at_a_time:
            while True:
                count = self._fold_chunk()
                if count is None:
                    continue  # another process was there first; look again
                folded += count
                if count < CHUNK_ENTRIES_MAX:
                    return folded

    def start(self) -> None:
        """Begin to fold on a thread; `stop` ends it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="folder", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the chunk it is at."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_TIMEOUT_SECONDS)
            self._thread = None

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.fold()
                self.failure = None
            except Exception as error:  # noqa: BLE001 (the loop's one handler; health shows it)
                self.failure = error
            self._stopping.wait(timeout=self._interval_seconds)

    def _fold_chunk(self) -> int | None:
        with self._database.reading() as reading:
            entries = reading.unfolded(CHUNK_ENTRIES_MAX)
        if not entries:
            return 0
        delta = delta_of(entries)
        with self._database.writing() as writing:
            if not writing.projections.add(delta):
                return None
            writing.journal.write(Changes(audits=delta.audits))
            return delta.entries
