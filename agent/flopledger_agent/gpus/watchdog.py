"""A thread that may get stuck in the driver, and a caller that never waits beyond a deadline.

A driver call can block for ever in the kernel; ctypes releases the interpreter meanwhile, so only
this thread is lost. One job at a time: while it is stuck nothing new is given to it, nothing piles
up, and it is of use again as soon as the driver answers. The thread is a daemon: exit never waits.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class WatchedThread:
    """Runs jobs one after the other, each answered through a future."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._pending: Future[Any] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def stuck(self) -> bool:
        """True while the last job has not come back."""
        return self._pending is not None and not self._pending.done()

    def start(self, job: Callable[[], Any]) -> Future[Any]:
        """Begin a job; only when not `stuck`."""
        assert not self.stuck, "a stuck thread takes no job"
        self._pending = Future()
        self._jobs.put((job, self._pending))
        return self._pending

    def close(self) -> None:
        """Let the thread end once it is idle; does not wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001  (handed to the caller, whatever it is)
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future, item
