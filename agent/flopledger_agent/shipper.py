"""Shipping as a state machine without I/O: what to send next, and what an answer means.

Oldest first and in order within a stream; at least once, never at most once. A batch is freed only
after the collector answered that it is durable (`admitted` or `duplicate`). Failures back off with
jitter; a stream that the collector refuses waits for a person and never blocks the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flopledger_agent.spool import Spool, SpooledBatch

BATCHES_PER_REQUEST_MAX: Final = 64  # a relay's or a backlog's worth, about half a megabyte
REQUEST_BYTES_MAX: Final = 8 * 1024 * 1024
BACKOFF_FIRST_SECONDS: Final = 1.0
BACKOFF_MAX_SECONDS: Final = 300.0  # a returning collector is found within five minutes
REFUSED_RETRY_SECONDS: Final = 60.0  # a refusal waits for a person: look again every minute

DURABLE: Final = frozenset({"admitted", "duplicate"})  # the collector holds the batch for good

Outcome = Literal["admitted", "duplicate", "conflict", "out_of_order", "refused"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The collector's word on one batch."""

    stream_id: str
    sequence: int
    outcome: Outcome
    message: str
    batch_hash: str | None = None
    expected_sequence: int | None = None


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """The collector's word on one request."""

    answers: tuple[Answer, ...]


class Blocked(msgspec.Struct, frozen=True, kw_only=True):
    """A stream that the collector does not take."""

    outcome: str
    message: str
    retry_ns: int


class Shipper:
    """Decides; a thread with a connection carries it out."""

    def __init__(self, spool: Spool, random_unit: Callable[[], float]) -> None:
        self._spool = spool
        self._random_unit = random_unit  # 0 <= x < 1: jitter, injected
        self._failures = 0
        self._not_before_ns = 0
        self.blocked: dict[str, Blocked] = {}
        self.shipped = 0
        self.failures: dict[str, int] = {}
        self.last_error: str | None = None

    def may_try(self, now_ns: int) -> bool:
        """False while a failure is being waited out."""
        return now_ns >= self._not_before_ns

    def next_batches(self, now_ns: int, current_stream: str) -> list[SpooledBatch]:
        """The batches to send now, of one stream in order; none while waiting."""
        if not self.may_try(now_ns):
            return []
        chosen: list[SpooledBatch] = []
        size = 0
        for batch in self._spool.batches(current_stream):
            block = self.blocked.get(batch.stream_id)
            if block is not None and now_ns < block.retry_ns:
                continue
            if chosen and (
                batch.stream_id != chosen[0].stream_id
                or len(chosen) == BATCHES_PER_REQUEST_MAX
                or size + batch.size_bytes > REQUEST_BYTES_MAX
            ):
                break
            chosen.append(batch)
            size += batch.size_bytes
        return chosen

    def on_answers(self, now_ns: int, sent: Sequence[SpooledBatch], answers: Answers) -> None:
        """Free what is durable; block a stream at its first batch that is not."""
        self._failures = 0
        expected = {(batch.stream_id, batch.sequence) for batch in sent}
        for answer in answers.answers:
            if (answer.stream_id, answer.sequence) not in expected:
                continue  # not ours: an answer can free only what was sent
            if answer.outcome in DURABLE:
                self._spool.free(answer.stream_id, answer.sequence)
                self.blocked.pop(answer.stream_id, None)
                self.shipped += 1
            else:
                self._block(now_ns, answer)
                break
        else:
            if not answers.answers:
                self.on_failure(now_ns, "empty_answer", "the collector answered for no batch")

    def on_failure(self, now_ns: int, reason: str, message: str) -> None:
        """No durable answer came: wait longer each time, with jitter, and send again."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        self.last_error = message
        ceiling = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(self._failures, 20))
        wait_seconds = ceiling * (0.5 + self._random_unit() / 2)
        self._failures += 1
        self._not_before_ns = now_ns + int(wait_seconds * NS_PER_SECOND)

    def hurry(self) -> None:
        """Forget backoff: the agent is stopping and wants to try once more."""
        self._not_before_ns = 0

    def _block(self, now_ns: int, answer: Answer) -> None:
        self.failures[answer.outcome] = self.failures.get(answer.outcome, 0) + 1
        self.last_error = answer.message
        self.blocked[answer.stream_id] = Blocked(
            outcome=answer.outcome,
            message=answer.message,
            retry_ns=now_ns + int(REFUSED_RETRY_SECONDS * NS_PER_SECOND),
        )
