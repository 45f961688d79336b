"""Shipping: oldest first, in order, freed only on a durable answer, never stuck on a refusal."""

from __future__ import annotations

import http.server
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_agent.delivery import HttpCollector
from flopledger_agent.disk import MemoryDisk
from flopledger_agent.errors import CollectorUnreachable
from flopledger_agent.shipper import (
    BATCHES_PER_REQUEST_MAX,
    Answer,
    Answers,
    Shipper,
)
from flopledger_agent.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_agent.spool import SpooledBatch

OLD, NEW = "11" * 16, "22" * 16
SECOND_NS = 1_000_000_000


@pytest.fixture
def spool() -> Spool:
    """Three batches of an old stream and two of the current one."""
    queue = Spool(MemoryDisk(), 2**20)
    for sequence in range(3):
        queue.put(OLD, sequence, b"batch")
    for sequence in range(2):
        queue.put(NEW, sequence, b"batch")
    return queue


def answers(batches: list[SpooledBatch], outcome: str) -> Answers:
    """The same answer for every batch."""
    return Answers(answers=tuple(
        msgspec.convert({"stream_id": batch.stream_id, "sequence": batch.sequence,
                         "outcome": outcome, "message": outcome}, Answer)
        for batch in batches
    ))  # fmt: skip


def test_old_streams_go_first_in_order(spool: Spool) -> None:
    """One request carries one stream's batches, by sequence."""
    shipper = Shipper(spool, lambda: 0.0)
    first = shipper.next_batches(0, NEW)
    shipper.on_answers(0, first, answers(first, "admitted"))
    second = shipper.next_batches(0, NEW)

    assert [(b.stream_id, b.sequence) for b in first] == [(OLD, 0), (OLD, 1), (OLD, 2)]
    assert [(b.stream_id, b.sequence) for b in second] == [(NEW, 0), (NEW, 1)]


@pytest.mark.parametrize("outcome", ["admitted", "duplicate"])
def test_durable_answers_free_the_spool(spool: Spool, outcome: str) -> None:
    """A duplicate is as good as an admission: the collector has it."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    shipper.on_answers(0, sent, answers(sent, outcome))

    assert len(spool) == 2
    assert shipper.shipped == 3


@pytest.mark.parametrize("outcome", ["conflict", "refused", "out_of_order"])
def test_a_refused_stream_waits_and_does_not_block_the_other(spool: Spool, outcome: str) -> None:
    """Nothing is dropped; the current stream goes on; the refusal is shown and retried."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    shipper.on_answers(0, sent, answers(sent, outcome))

    assert len(spool) == 5
    assert shipper.blocked[OLD].outcome == outcome
    assert {batch.stream_id for batch in shipper.next_batches(0, NEW)} == {NEW}
    assert {batch.stream_id for batch in shipper.next_batches(61 * SECOND_NS, NEW)} == {OLD}


def test_an_answer_for_something_never_sent_frees_nothing(spool: Spool) -> None:
    """A confused collector cannot make the agent forget a batch."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    foreign = Answer(stream_id=NEW, sequence=0, outcome="admitted", message="")
    shipper.on_answers(0, sent, Answers(answers=(foreign,)))

    assert len(spool) == 5


def test_silence_for_a_batch_keeps_it(spool: Spool) -> None:
    """Only batches that were answered are freed."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    shipper.on_answers(0, sent, answers(sent[:1], "admitted"))

    assert len(spool) == 4


def test_failures_back_off_with_jitter_up_to_a_limit(spool: Spool) -> None:
    """Waits grow to five minutes and never beyond; a success resets them."""
    shipper = Shipper(spool, lambda: 0.999)
    now_ns, waits = 0, []
    for _ in range(15):
        shipper.on_failure(now_ns, "unreachable", "no route")
        wait_ns = next(t for t in range(0, 400 * SECOND_NS, SECOND_NS // 4)
                       if shipper.next_batches(now_ns + t, NEW))  # fmt: skip
        waits.append(wait_ns / SECOND_NS)
        now_ns += wait_ns

    assert waits[0] <= 1.25
    assert waits == sorted(waits)
    assert 290 < waits[-1] <= 300.25
    assert shipper.failures == {"unreachable": 15}


def test_a_backlog_goes_in_bounded_requests() -> None:
    """However long the outage, one request stays small."""
    queue = Spool(MemoryDisk(), 2**20)
    for sequence in range(BATCHES_PER_REQUEST_MAX + 10):
        queue.put(NEW, sequence, b"x")

    assert len(Shipper(queue, lambda: 0.0).next_batches(0, NEW)) == BATCHES_PER_REQUEST_MAX


class Responder(http.server.BaseHTTPRequestHandler):
    """Answers whatever the test wants."""

    status = 200
    body = b"{}"
    location: str | None = None

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(self.status)
        if self.location:
            self.send_header("Location", self.location)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815 (the base class names it)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (base class)
        """Quiet."""


@pytest.fixture
def responder() -> Iterator[tuple[type[Responder], str]]:
    """A real HTTP server and its URL."""

    class Answering(Responder):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Answering, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, b"oops", "http_500"),
        (403, b'{"error":"no"}', "http_403"),
        (200, b"<html>", "not_a_collector"),
        (200, b"\xff\xfe", "not_a_collector"),
        (200, b'{"answers":3}', "not_a_collector"),
    ],
)
def test_whatever_is_no_answer_is_unreachable(
    responder: tuple[type[Responder], str], status: int, body: bytes, reason: str
) -> None:
    """Errors, pages of a captive portal and rubbish keep the spool."""
    kind, url = responder
    kind.status, kind.body = status, body

    with pytest.raises(CollectorUnreachable) as caught:
        HttpCollector(url, 5.0, "test").send(b"batch\n")
    assert caught.value.reason == reason


def test_a_redirect_is_not_followed(responder: tuple[type[Responder], str]) -> None:
    """Signed batches go only where the operator said."""
    kind, url = responder
    kind.status, kind.location = 302, "http://127.0.0.1:1/elsewhere"

    with pytest.raises(CollectorUnreachable) as caught:
        HttpCollector(url, 5.0, "test").ledger_id()
    assert caught.value.reason == "http_302"


def test_nobody_at_home_is_unreachable() -> None:
    """A refused connection is a sentence, not a crash."""
    with pytest.raises(CollectorUnreachable, match=r"127\.0\.0\.1"):
        HttpCollector("http://127.0.0.1:9", 5.0, "test").send(b"batch\n")


def test_an_answer_for_something_else_backs_off(spool: Spool) -> None:
    """A collector that answers for other batches is as silent as none: no hot loop."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    foreign = Answer(stream_id="00" * 16, sequence=0, outcome="admitted", message="")

    assert not shipper.on_answers(0, sent, Answers(answers=(foreign,)))
    assert shipper.failures == {"unrelated_answer": 1}
    assert not shipper.may_try(0)


def test_a_request_that_cannot_be_told_apart_is_sent_singly(spool: Spool) -> None:
    """A refusal without a name, as for a header nobody can read, finds its batch in the end."""
    shipper = Shipper(spool, lambda: 0.0)
    nameless = msgspec.json.decode(
        b'{"stream_id":null,"sequence":null,"batch_hash":null,"outcome":"refused","message":"no"}',
        type=Answer,
    )
    sent = shipper.next_batches(0, NEW)
    first = answers(sent[:1], "admitted").answers
    shipper.on_answers(0, sent, Answers(answers=(*first, nameless)))
    alone = shipper.next_batches(0, NEW)
    shipper.on_answers(0, alone, Answers(answers=(nameless,)))

    assert [(b.stream_id, b.sequence) for b in alone] == [(OLD, 1)]
    assert (shipper.blocked[OLD].outcome, len(spool)) == ("refused", 4)
    assert [(b.stream_id, b.sequence) for b in shipper.next_batches(0, NEW)] == [(NEW, 0)]


def test_a_nameless_admission_frees_nothing(spool: Spool) -> None:
    """Only a refusal may be taken for a batch that it does not name."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)[:1]
    answer = Answer(stream_id=None, sequence=None, outcome="admitted")

    assert not shipper.on_answers(0, sent, Answers(answers=(answer,)))
    assert len(spool) == 5


def test_the_same_answer_twice_counts_once(spool: Spool) -> None:
    """The page shows batches, not answers."""
    shipper = Shipper(spool, lambda: 0.0)
    sent = shipper.next_batches(0, NEW)
    twice = answers(sent, "admitted").answers * 2
    shipper.on_answers(0, sent, Answers(answers=twice))

    assert (shipper.shipped, len(spool)) == (3, 2)


def test_damage_blocks_its_own_stream_only(spool: Spool) -> None:
    """Batches after a damaged one cannot link: they are kept, shown, and tried again later."""
    shipper = Shipper(spool, lambda: 0.0)
    shipper.on_damage(0, shipper.next_batches(0, NEW)[0], "moved aside")

    assert shipper.blocked[OLD].outcome == "damaged"
    assert {batch.stream_id for batch in shipper.next_batches(0, NEW)} == {NEW}
    assert len(spool) == 5
