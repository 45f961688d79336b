"""The writer: one thread, one transaction for everything that waits, answers after its commit.

Callers decode and verify on their own threads and then wait here, so that a commit's one disk
sync serves many of them. An answer exists only after COMMIT returned: an agent that has one may
forget its copy. When a whole group fails, each submission is tried by itself, so that one bad
submission costs nobody else an answer.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_collector.errors import StoreError, WriterStopped
from flopledger_collector.ingest import OUTCOMES, Answer, Candidate, Rules, admit, inspect
from flopledger_collector.journal import disputed_indexes
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flopledger_collector.clocks import Clock
    from flopledger_collector.ingest import IngestRequest
    from flopledger_collector.journal import Changes, JournalEntry
    from flopledger_collector.store.interface import Database
    from flopledger_core.accelerators import AcceleratorTable

GROUP_BATCHES_MAX: Final = 2048  # one transaction of some 12 MB, far below a second
WAITING_BYTES_MAX: Final = 256 * 1024 * 1024  # what may wait in memory before senders are put off
SUBMIT_TIMEOUT_SECONDS: Final = 60.0  # above the busy timeout; the sender tries again after it
CLOSE_TIMEOUT_SECONDS: Final = 60.0

Answers = tuple[Answer, ...]


class IngestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What this process has answered since it started; for /metrics."""

    batches: dict[str, int]  # by outcome, every outcome present
    records: dict[str, int]  # of admitted batches: clear, disputed


class _Submission:
    """What one caller waits for."""

    __slots__ = ("answers", "future", "inspected", "size_bytes")

    def __init__(self, inspected: Sequence[tuple[Candidate | Answer, ...]]) -> None:
        self.inspected = inspected
        self.size_bytes = sum(len(c.content) for c in self.candidates())
        self.future: Future[list[Answers]] = Future()
        self.answers: list[Answers] = []

    def candidates(self) -> list[Candidate]:
        """What is for the ledger to decide, in order."""
        items = (item for request in self.inspected for item in request)
        return [item for item in items if isinstance(item, Candidate)]

    def settle(self, decided: Iterator[Answer]) -> None:
        """Put the answers about candidates between those that inspection gave already."""
        self.answers = [
            tuple(item if isinstance(item, Answer) else next(decided) for item in request)
            for request in self.inspected
        ]


class Writer:
    """Admits batches. `submit` may be called from any number of threads."""

    def __init__(
        self, database: Database, *, table: AcceleratorTable, rules: Rules, clock: Clock
    ) -> None:
        self._database = database
        self._table = table
        self._rules = rules
        self._clock = clock
        self._waiting: queue.SimpleQueue[_Submission | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._batches: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self._records = {"clear": 0, "disputed": 0}
        self.commits = 0  # transactions that wrote; fewer than submissions when many wait

    def submit(self, requests: Sequence[IngestRequest]) -> list[Answers]:
        """Admit what may be admitted and wait until it is durable: one answer per batch.

        Raises `RequestRefused` for a request out of bounds (then none of `requests` was looked
        at further), `StoreError` or `WriterStopped` when nothing can be promised: send again.
        """
        try:
            return self.enqueue(requests).result(timeout=SUBMIT_TIMEOUT_SECONDS)
        except FutureTimeout as error:
            raise WriterStopped(
                f"ingest: no commit within {SUBMIT_TIMEOUT_SECONDS} s; send the batches again"
            ) from error

    def enqueue(self, requests: Sequence[IngestRequest]) -> Future[list[Answers]]:
        """Inspect here and now, and queue the rest; the future holds what `submit` returns."""
        submission = _Submission([inspect(request, self._table) for request in requests])
        if not submission.candidates():
            submission.settle(iter(()))
            self._count(submission.answers)
            submission.future.set_result(submission.answers)
            return submission.future
        with self._lock:
            if self._closed:
                raise WriterStopped("ingest: the collector is stopping; send the batches again")
            if self._waiting_bytes + submission.size_bytes > WAITING_BYTES_MAX:
                raise WriterStopped("ingest: too many batches are waiting; send them again later")
            self._waiting_bytes += submission.size_bytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
                self._thread.start()
            self._waiting.put(submission)
        return submission.future

    def counts(self) -> IngestCounts:
        """What was answered so far."""
        with self._lock:
            return IngestCounts(batches=dict(self._batches), records=dict(self._records))

    def close(self) -> None:
        """Answer everything that waits, then stop."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._waiting.put(None)
        if thread is not None:
            thread.join(timeout=CLOSE_TIMEOUT_SECONDS)

    # --- the thread ---

    def _run(self) -> None:
        stopping = False
        while not stopping:
            first = self._waiting.get()
            if first is None:
                return
            group, batch_count = [first], len(first.candidates())
            while batch_count < GROUP_BATCHES_MAX:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stopping = True
                    break
                group.append(following)
                batch_count += len(following.candidates())
            self._settle(group)
            with self._lock:
                self._waiting_bytes -= sum(submission.size_bytes for submission in group)

    def _settle(self, group: list[_Submission]) -> None:
        """Commit a group; when that fails, commit or fail each submission by itself."""
        error = self._commit(group)
        if error is None:
            for submission in group:
                submission.future.set_result(submission.answers)
            return
        for submission in group:
            alone = error if len(group) == 1 else self._commit([submission])
            if alone is None:
                submission.future.set_result(submission.answers)
            else:
                submission.future.set_exception(alone)

    def _commit(self, group: list[_Submission]) -> Exception | None:
        candidates = [candidate for submission in group for candidate in submission.candidates()]
        now_unix_ms = self._clock.wall_unix_ns() // NS_PER_MS
        try:
            with self._database.writing() as writing:
                admitted = admit(candidates, writing.journal, self._rules, now_unix_ms=now_unix_ms)
                writing.journal.write(admitted.changes)
        except StoreError as error:
            return error
        except Exception as error:  # noqa: BLE001 (the waiting caller raises it; the thread must live)
            return error
        self.commits += 1
        decided = iter(admitted.answers)
        for submission in group:
            submission.settle(decided)
        self._count([answers for submission in group for answers in submission.answers])
        self._count_records(candidates, admitted.changes)
        return None

    def _count(self, answers: Sequence[Answers]) -> None:
        with self._lock:
            for request in answers:
                for answer in request:
                    self._batches[answer.outcome] += 1

    def _count_records(self, candidates: Sequence[Candidate], changes: Changes) -> None:
        """Records of what was admitted, by standing."""
        sizes = {candidate.batch_hash: candidate.header.record_count for candidate in candidates}
        entries: Sequence[JournalEntry] = changes.entries
        disputed = total = 0
        for entry in entries:
            count = sizes[entry.batch_hash]
            total += count
            disputed += len(disputed_indexes(entry.findings, count)) if entry.findings else 0
        with self._lock:
            self._records["clear"] += total - disputed
            self._records["disputed"] += disputed
