"""What the HTTP handlers share: the open ledger, the rules, and evaluations a second old at most.

Handlers run on threads, so everything here may be called from several at once. Statuses of the
whole ledger are kept for a second of real time, because every scraper and every open page asks
for the same one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from flopledger_collector.exposition import Exposition, Snapshot
from flopledger_collector.handle import LedgerHandle
from flopledger_collector.reports.statement import Period, Statement, build_statement
from flopledger_collector.status import (
    LedgerStatus,
    ProjectStatus,
    Rules,
    evaluate_ledger,
    evaluate_project,
)
from flopledger_collector.web.pages import Pages
from flopledger_core.units import NS_PER_MS, NS_PER_SECOND

STATUS_AGE_MAX_NS: Final = NS_PER_SECOND
INGEST_THREADS: Final = 8  # decoding and signatures; more than the cores of a small machine
# Bodies being received or inspected at once; a full request is 64 MiB and most are a few KiB.
BODY_BYTES_IN_FLIGHT_MAX: Final = 256 * 1024 * 1024


class Surface:
    """The state behind the HTTP surface; made once by the composition root."""

    def __init__(
        self, handle: LedgerHandle, rules: Rules, *, monotonic_ns: Callable[[], int]
    ) -> None:
        self.handle = handle
        self.rules = rules
        self.pages = Pages()
        self.exposition = Exposition(self._snapshot, monotonic_ns)
        self.ingest_threads = ThreadPoolExecutor(INGEST_THREADS, thread_name_prefix="ingest")
        self.body_bytes_in_flight = 0  # touched on the event loop only
        self._monotonic_ns = monotonic_ns
        self._lock = threading.Lock()
        self._status: tuple[int, LedgerStatus] | None = None

    def now_unix_ms(self) -> int:
        """The collector's calendar time."""
        return self.handle.clock.wall_unix_ns() // NS_PER_MS

    def ledger_status(self) -> LedgerStatus:
        """Every project's status, a second old at most."""
        with self._lock:
            now_ns = self._monotonic_ns()
            if self._status is None or now_ns - self._status[0] >= STATUS_AGE_MAX_NS:
                self._status = (now_ns, evaluate_ledger(self.handle.ledger, self.rules))
            return self._status[1]

    def project_status(self, project: str) -> ProjectStatus:
        """One project's status, now."""
        return evaluate_project(self.handle.ledger, self.rules, project)

    def statement(self, project: str, policies: tuple[str, ...], period: Period) -> Statement:
        """One project's statement, now."""
        return build_statement(
            self.handle.ledger,
            self.rules,
            project,
            generated_unix_ms=self.now_unix_ms(),
            policies=policies,
            period=period,
            provenance=self.handle.config.ledger.provenance,
        )

    def close(self) -> None:
        """End the threads that decode; the ledger is closed by whoever opened it."""
        self.ingest_threads.shutdown(wait=True, cancel_futures=True)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            status=self.ledger_status(),
            health=self.handle.ledger.health(),
            counts=self.handle.writer.counts(),
            simulated=self.handle.simulated,
        )
