"""A lane: GPUs that are read together, the worker process that reads them, and its replacement.

Nothing here waits. A worker that died is replaced at once, then after 1, 2, 4, ... ticks; one that
does not answer for long is killed and left behind. Where the GPUs of a lane change, a successor
starts beside the worker and takes over once it reads them, so that the rest is read all the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.worker_messages import (
    Answer,
    Ask,
    BrokenMessage,
    Inbox,
    answer_of,
    framed,
)
from flopledger_agent.gpus.worker_process import WorkerGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.gpus.worker_messages import Hello
    from flopledger_agent.gpus.worker_process import WorkerProcess

BACKOFF_TICKS_MAX: Final = 64
# Workers of one lane that were killed and are still there: they sleep in the driver, so another
# one would only join them. The lane waits until the operating system lets go of one.
ABANDONED_WORKERS_MAX: Final = 3
# A library older than the driver it meets stays so: only a new process loads another one.
FRESH_LIBRARY: Final = frozenset({"driver_version_mismatch", "unexpected_error"})


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long, in real time, a worker may be silent before it is replaced.

    One request to a GPU in trouble takes the driver six seconds, after which it may answer; opening
    a driver without its persistence daemon has taken thirty (hardware reference, sections 7 and 8).
    """

    hang_seconds: float = 8.0
    start_seconds: float = 60.0
    # A GPU with a worker of its own goes back to the others' after it was read for so long; each
    # time it is in trouble again this doubles, up to the longest.
    rejoin_seconds: float = 600.0
    rejoin_seconds_max: float = 86_400.0


class Conversation:
    """One worker process and what was asked of it."""

    def __init__(self, process: WorkerProcess, hello: Hello, at_seconds: float) -> None:
        self.process = process
        self.gone = False
        self.answered = False  # ever
        self.started_at_seconds = at_seconds
        self.asked_at_seconds: float | None = None
        self._inbox = Inbox()
        self._number = 0
        self._delivered = True
        self._answer: Answer | None = None
        self._say(framed(hello))

    @property
    def waiting(self) -> bool:
        """Whether something was asked that is not answered yet."""
        return self.asked_at_seconds is not None and not self.gone

    def ask(self, at_seconds: float) -> Answer | None:
        """Ask for a sample, unless the last one is still due; a late answer to that one."""
        late: Answer | None = None
        if self.waiting:
            self.listen()
            late = self.peek()
            if late is None:
                return None
            self.discard()
        if not self.gone:
            self._number += 1
            self.asked_at_seconds = at_seconds
            self._say(framed(Ask(number=self._number, delivered=self._delivered)))
        return late

    def listen(self) -> None:
        """Read what has come, without waiting."""
        try:
            self._inbox.feed(self.process.receive())
            while (body := self._inbox.take()) is not None:
                answer = answer_of(body)
                if answer.number == self._number:
                    self._answer = answer
                    self.asked_at_seconds = None
                    self.answered = True
        except (WorkerGone, BrokenMessage):
            self.gone = True

    def take(self) -> Answer | None:
        """The answer, once."""
        answer, self._answer = self._answer, None
        if answer is not None:
            self._delivered = True
        return answer

    def peek(self) -> Answer | None:
        """The answer, without taking it."""
        return self._answer

    def discard(self) -> None:
        """Take the answer and tell the worker with the next question that nobody used it."""
        if self.take() is not None:
            self._delivered = False

    def silent_seconds(self, at_seconds: float) -> float:
        """How long an answer has been due."""
        return 0.0 if self.asked_at_seconds is None else at_seconds - self.asked_at_seconds

    def _say(self, content: bytes) -> None:
        try:
            self.process.send(content)
        except WorkerGone:
            self.gone = True


class LaneTick(msgspec.Struct, frozen=True, kw_only=True):
    """What a lane says in one tick: an answer, or the reason why there is none."""

    answer: Answer | None
    reason: str
    late: tuple[Answer, ...] = ()  # to questions of earlier ticks: only their events count


def _is_of_use(told: NodeSample) -> bool:
    """Whether a successor may take over: it reads something, or nothing is left to read."""
    if told.failure is not None:
        return told.failure == "no_devices"  # every GPU is set apart
    return bool(told.samples) or not told.failures


class Lane:
    """The workers of some GPUs."""

    def __init__(self, launch: Callable[[], WorkerProcess], patience: Patience) -> None:
        self._launch = launch
        self._patience = patience
        self._worker: Conversation | None = None
        self._successor: Conversation | None = None
        self._wants_successor = False
        self._wait_ticks = 0
        self._backoff_ticks = 1
        self._well_ticks = 0
        self._dark_since_seconds: float | None = None
        self._reason = "worker_starting"
        self._late: list[Answer] = []
        self._left: list[WorkerProcess] = []
        self.restarts: dict[str, int] = {}

    # --- one tick -----------------------------------------------------------------------------

    def begin(self, hello: Callable[[], Hello], at_seconds: float) -> list[Conversation]:
        """Start what is due and ask; whom to wait for, which is nobody who is silent already."""
        self._forget_the_dead()
        asked: list[Conversation] = []
        if self._worker is not None:
            self._ask(self._worker, at_seconds, asked)
            if self._worker.gone:
                self._replace("died", "worker_died")
        if self._wait_ticks > 0:
            self._wait_ticks -= 1
        elif self._worker is None and self._may_start():
            self._worker = self._start(hello, at_seconds)
            if self._worker is not None:
                self._ask(self._worker, at_seconds, asked)
        elif self._wants_successor and self._successor is None and self._may_start():
            self._successor = self._start(hello, at_seconds)
        if self._successor is not None:
            self._ask(self._successor, at_seconds, asked)
        return asked

    def conclude(self, at_seconds: float) -> LaneTick:
        """What became of this tick; workers that are no good any more are let go."""
        self._hand_over(at_seconds)
        late, self._late = tuple(self._late), []
        worker = self._worker
        if worker is None:
            return LaneTick(answer=None, reason=self._reason, late=late)
        answer = worker.take()
        if answer is None:
            reason = "timeout" if worker.answered else "worker_starting"
            if worker.gone:
                reason = "worker_died"
                self._replace("died", reason)
            elif self._is_silent(worker, at_seconds):
                reason = "timeout"
                self._replace("hung", reason)
            return LaneTick(answer=None, reason=reason, late=late)
        self._judge(answer, at_seconds)
        return LaneTick(answer=answer, reason=answer.sample.failure or "timeout", late=late)

    def _start(self, hello: Callable[[], Hello], at_seconds: float) -> Conversation | None:
        try:
            return Conversation(self._launch(), hello(), at_seconds)
        except OSError:  # no memory or no process to spare: later, perhaps
            if self._worker is None:
                self._reason = "worker_cannot_start"
            self._back_off()
            return None

    def _ask(self, whom: Conversation, at_seconds: float, asked: list[Conversation]) -> None:
        late = whom.ask(at_seconds)
        if late is not None:
            self._late.append(late)
        if whom.asked_at_seconds == at_seconds and not whom.gone:
            asked.append(whom)

    def _judge(self, answer: Answer, at_seconds: float) -> None:
        """Replace a worker whose library is of no use any more."""
        failure = answer.sample.failure
        if failure in FRESH_LIBRARY:
            self._replace(failure, failure)
            return
        if failure != "timeout":
            self._dark_since_seconds = None
        elif self._dark_since_seconds is None:
            self._dark_since_seconds = at_seconds
        elif at_seconds - self._dark_since_seconds >= self._patience.start_seconds:
            self._replace("hung", "timeout")
            return
        self._well_ticks = self._well_ticks + 1 if answer.sample.samples else 0
        if self._well_ticks >= BACKOFF_TICKS_MAX:
            self._backoff_ticks = 1

    def _is_silent(self, worker: Conversation, at_seconds: float) -> bool:
        patience = self._patience
        limit = patience.hang_seconds if worker.answered else patience.start_seconds
        return worker.silent_seconds(at_seconds) >= limit

    # --- replacing ----------------------------------------------------------------------------

    @property
    def well_ticks(self) -> int:
        """For how many ticks in a row the worker has read something."""
        return self._well_ticks

    @property
    def running(self) -> int:
        """Workers now at work."""
        return sum(item is not None for item in (self._worker, self._successor))

    @property
    def abandoned(self) -> int:
        """Workers that were ended and are still there."""
        self._forget_the_dead()
        return len(self._left)

    def succeed(self) -> None:
        """Have the worker replaced by one that is greeted anew, without a gap."""
        if self._successor is not None:
            self._leave(self._successor)
            self._successor = None
        self._wants_successor = self._worker is not None

    def give_up(self, why: str, reason: str) -> None:
        """End the worker; another one starts after a while. Until then `reason` is the answer."""
        self._replace(why, reason)

    def end(self, *, kill: bool) -> list[WorkerProcess]:
        """Let every worker go for good; those that may still be there."""
        for item in (self._worker, self._successor):
            if item is not None:
                self._leave(item, kill=kill)
        self._worker = self._successor = None
        return self._left

    def _hand_over(self, at_seconds: float) -> None:
        """Let the successor take over when it reads what it should, or give up on it."""
        successor = self._successor
        if successor is None:
            return
        if successor.gone or self._is_silent(successor, at_seconds):
            self._leave(successor)
            self._successor = None
            self._back_off()
            return
        answer = successor.peek()  # taken by `conclude`
        if answer is not None and _is_of_use(answer.sample):
            old = self._worker
            if old is not None:
                self._count("gpu_set_changed")
                self._leave(old)
            self._worker, self._successor = successor, None
            self._wants_successor = False
            self._dark_since_seconds = None
            self._well_ticks = 0
        else:
            successor.discard()

    def _replace(self, why: str, reason: str) -> None:
        """End the worker; its successor, or another one after a while, takes its place."""
        self._reason = reason
        self._well_ticks = 0
        self._dark_since_seconds = None
        self._count(why)
        if self._worker is not None:
            self._leave(self._worker)
        self._worker, self._successor = self._successor, None
        self._wants_successor = False
        if self._worker is None:
            self._back_off()

    def _back_off(self) -> None:
        self._wait_ticks = self._backoff_ticks - 1
        self._backoff_ticks = min(2 * self._backoff_ticks, BACKOFF_TICKS_MAX)

    def _count(self, why: str) -> None:
        self.restarts[why] = self.restarts.get(why, 0) + 1

    def _leave(self, worker: Conversation, *, kill: bool = True) -> None:
        worker.process.end(kill=kill)
        self._left.append(worker.process)

    def _forget_the_dead(self) -> None:
        self._left = [process for process in self._left if not process.ended()]

    def _may_start(self) -> bool:
        return len(self._left) < ABANDONED_WORKERS_MAX
