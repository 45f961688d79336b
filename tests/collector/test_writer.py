"""The writer: one commit for many, answers only after it, and no one pays for another's failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flopledger_collector import ingest, writer
from flopledger_collector.errors import StoreError, WriterStopped
from flopledger_collector.ingest import IngestRequest
from tests.collector.opened import DAYS_LATER_UNIX_MS, opened, outcomes, send
from tests.collector.sealing import StreamSealer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


def test_many_waiting_submissions_share_a_commit(ledger: LedgerHandle) -> None:
    """Forty agents at once, and fewer disk syncs than that."""
    batches = [StreamSealer(seed, node=f"node-{seed}").minute(0) for seed in range(1, 41)]
    with ledger.database.writing():  # the writer waits for this, and everybody for the writer
        futures = [
            ledger.writer.enqueue([IngestRequest(content=batch, peer_is_loopback=True)])
            for batch in batches
        ]
    answers = [future.result(timeout=30)[0][0] for future in futures]

    assert {answer.outcome for answer in answers} == {"admitted"}
    assert ledger.writer.commits <= 2
    assert ledger.writer.counts().batches["admitted"] == 40
    assert ledger.writer.counts().records == {"clear": 320, "disputed": 0}


def test_a_submission_that_fails_costs_nobody_else_an_answer(
    ledger: LedgerHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that cannot be committed is tried one by one."""
    honest, poison = StreamSealer(1).minute(0), StreamSealer(2, node="poison").minute(0)
    admit = ingest.admit

    def choking(candidates: Any, *arguments: Any, **named: Any) -> Any:
        if any(candidate.header.node == "poison" for candidate in candidates):
            raise StoreError("database: it refused; see the collector's log")
        return admit(candidates, *arguments, **named)

    monkeypatch.setattr(writer, "admit", choking)
    with ledger.database.writing():
        futures = [
            ledger.writer.enqueue([IngestRequest(content=content, peer_is_loopback=True)])
            for content in (poison, honest)
        ]
    with pytest.raises(StoreError):
        futures[0].result(timeout=30)
    assert futures[1].result(timeout=30)[0][0].outcome == "admitted"


def test_a_closed_writer_asks_to_send_again(tmp_path: Path) -> None:
    """Nothing is promised that is not durable."""
    handle = opened(tmp_path)
    outcomes(handle, StreamSealer().minute(0))
    handle.close()

    with pytest.raises(WriterStopped, match="again"):
        send(handle, StreamSealer(2).minute(0))


def test_senders_are_put_off_when_too_much_waits(
    ledger: LedgerHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory has a limit, and it is not the sender's."""
    monkeypatch.setattr(writer, "WAITING_BYTES_MAX", 10)

    with pytest.raises(WriterStopped, match="later"):
        send(ledger, StreamSealer().minute(0))


def test_the_clock_of_receipt_is_the_collectors(ledger: LedgerHandle) -> None:
    """Streams say when they were last heard."""
    outcomes(ledger, StreamSealer().minute(0))
    (stream,) = ledger.ledger.health().streams

    assert stream.last_received_unix_ms == DAYS_LATER_UNIX_MS
    assert stream.node == "node-1"
