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
    from collections.abc import Callable, Mapping, Sequence

    from flopledger_agent.spool import Spool, SpooledBatch

BATCHES_PER_REQUEST_MAX: Final = 64  # a relay's or a backlog's worth, about half a megabyte
REQUEST_BYTES_MAX: Final = 8 * 1024 * 1024
BACKOFF_FIRST_SECONDS: Final = 1.0
BACKOFF_MAX_SECONDS: Final = 300.0  # a returning collector is found within five minutes
REFUSED_RETRY_SECONDS: Final = 60.0  # a refusal waits for a person: look again every minute

DURABLE: Final = frozenset({"admitted", "duplicate"})  # the collector holds the batch for good

# After these a stream's later batches cannot link to anything the collector has.
UNLINKABLE: Final = frozenset({"damaged", "conflict"})

Outcome = Literal["admitted", "duplicate", "conflict", "out_of_order", "refused"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The collector's word on one batch; its names are None where it could not read the header."""

    stream_id: str | None
    sequence: int | None
    outcome: Outcome
    message: str = ""
    batch_hash: str | None = None
    expected_sequence: int | None = None


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """The collector's word on one request."""

    answers: tuple[Answer, ...]


class Blocked(msgspec.Struct, frozen=True, kw_only=True):
    """A stream that waits for a person: the collector does not take it, or it is damaged here."""

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
        self._singly_left = 0  # requests to send with one batch each, after a muddled answer
        self.blocked: dict[str, Blocked] = {}
        self.shipped = 0
        self.failures: dict[str, int] = {}
        self.last_error: str | None = None

    def is_broken(self, stream_id: str) -> bool:
        """True when later batches of the stream can never link, whatever a person does."""
        block = self.blocked.get(stream_id)
        return block is not None and block.outcome in UNLINKABLE

    def may_try(self, now_ns: int) -> bool:
        """False while a failure is being waited out."""
        return now_ns >= self._not_before_ns

    def next_batches(self, now_ns: int, current_stream: str) -> list[SpooledBatch]:
        """The batches to send now, of one stream in order; none while waiting."""
        if not self.may_try(now_ns):
            return []
        chosen: list[SpooledBatch] = []
        size = 0
        count_max = 1 if self._singly_left else BATCHES_PER_REQUEST_MAX
        for batch in self._spool.batches(current_stream):
            block = self.blocked.get(batch.stream_id)
            if block is not None and now_ns < block.retry_ns:
                continue
            if chosen and (
                batch.stream_id != chosen[0].stream_id
                or len(chosen) == count_max
                or size + batch.size_bytes > REQUEST_BYTES_MAX
            ):
                break
            chosen.append(batch)
            size += batch.size_bytes
        return chosen

    def on_answers(self, now_ns: int, sent: Sequence[SpooledBatch], answers: Answers) -> bool:
        """Free what is durable; block a stream at its first batch that is not.

        True when anything came of it. An answer can free only what was sent; where no batch that
        was sent is answered, the collector is as good as silent.
        """
        unanswered = {(batch.stream_id, batch.sequence): batch for batch in sent}
        freed = 0
        for answer in answers.answers:
            batch = self._meant(answer, sent, unanswered)
            if batch is None:
                continue
            if answer.outcome not in DURABLE:
                self._on_progress()
                self._block(now_ns, batch, answer.outcome, answer.message)
                return True
            self._spool.free(batch.stream_id, batch.sequence)
            del unanswered[batch.stream_id, batch.sequence]
            block = self.blocked.get(batch.stream_id)
            if block is not None and now_ns >= block.retry_ns:  # not one found while sending
                del self.blocked[batch.stream_id]
            self.shipped += 1
            freed += 1
        if freed:
            self._on_progress()
            self._singly_left = max(0, self._singly_left - 1)
        if unanswered and len(sent) > 1:
            # The collector could not tell the batches apart: one of them is not what it seems.
            self._singly_left = BATCHES_PER_REQUEST_MAX
        if not freed:
            told = next((one.message for one in answers.answers if one.message), "no reason given")
            self.on_failure(
                now_ns,
                "unrelated_answer",
                f"the collector answered for no batch that was sent: {told}",
            )
        return freed > 0

    def _meant(
        self,
        answer: Answer,
        sent: Sequence[SpooledBatch],
        unanswered: Mapping[tuple[str, int], SpooledBatch],
    ) -> SpooledBatch | None:
        """The batch that an answer speaks of; a nameless refusal of a lone batch is its own."""
        if answer.stream_id is not None and answer.sequence is not None:
            return unanswered.get((answer.stream_id, answer.sequence))
        alone = len(sent) == 1 and answer.outcome not in DURABLE
        return sent[0] if alone else None

    def on_damage(self, now_ns: int, batch: SpooledBatch, message: str) -> None:
        """A waiting batch is no longer what was sealed: what follows it in its stream waits.

        The collector is asked again like after a refusal: it may hold the damaged one already.
        """
        self._block(now_ns, batch, "damaged", message)

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

    def _on_progress(self) -> None:
        self._failures = 0
        self._not_before_ns = 0
        self.last_error = None

    def _block(self, now_ns: int, batch: SpooledBatch, outcome: str, message: str) -> None:
        self.failures[outcome] = self.failures.get(outcome, 0) + 1
        self.last_error = (
            f"batch {batch.sequence} of stream {batch.stream_id} is {outcome}: {message}"
        )
        self.blocked[batch.stream_id] = Blocked(
            outcome=outcome,
            message=message,
            retry_ns=now_ns + int(REFUSED_RETRY_SECONDS * NS_PER_SECOND),
        )
