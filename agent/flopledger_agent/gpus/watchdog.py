"""A thread that may get stuck in the driver, and a caller that never waits beyond a deadline.

A driver call can block for ever in the kernel; ctypes releases the interpreter meanwhile, so only
this thread is lost. One job at a time: while it is stuck nothing new is given to it, nothing piles
up, and it is of use again as soon as the driver answers. The thread is a daemon: exit never waits.
Answers carry no lock of their own, because eight of them are made every second on every node.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Round:
    """Jobs given out together and waited for together, under one deadline."""

    def __init__(self) -> None:
        self._left = 1  # the waiting caller itself, so that early answers do not end the round
        self._counting = threading.Lock()
        self._over = threading.Lock()
        self._over.acquire()

    def add(self) -> None:
        """One more job to wait for."""
        with self._counting:
            self._left += 1

    def arrive(self) -> None:
        """One job is done."""
        with self._counting:
            self._left -= 1
            over = self._left == 0
        if over:
            self._over.release()

    def wait(self, seconds: float) -> None:
        """Return when every job is done, at the latest after `seconds` of real time; once only."""
        self.arrive()
        self._over.acquire(timeout=seconds)


class Answer(Generic[T]):
    """What became of a job; `value` and `error` count once it is `done`."""

    __slots__ = ("done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None


class WatchedThread(Generic[T]):
    """Runs jobs one after the other."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], T], Answer[T], Round] | None] = SimpleQueue()
        self._pending: Answer[T] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def stuck(self) -> bool:
        """True while the last job has not come back."""
        return self._pending is not None and not self._pending.done

    def start(self, job: Callable[[], T], together: Round) -> Answer[T]:
        """Begin a job as part of a round; only when not `stuck`."""
        assert not self.stuck, "a stuck thread takes no job"
        answer: Answer[T] = Answer()
        self._pending = answer
        together.add()
        self._jobs.put((job, answer, together))
        return answer

    def close(self, last: Callable[[], T] | None = None) -> None:
        """Let the thread end once it is idle, after `last` if there is one; does not wait."""
        if last is not None:
            self._jobs.put((last, Answer(), Round()))
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, answer, together = item
            try:
                answer.value = job()
            except BaseException as error:  # noqa: BLE001  (handed to the caller, whatever it is)
                answer.error = error
            answer.done = True
            together.arrive()
            del job, answer, together, item  # nothing of a device outlives its reading
