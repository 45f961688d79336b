"""The process behind a driver worker, and the only place that starts or ends one.

A worker is another run of this program (spawned, never forked: NVML does not survive a fork) with
two pipes and nothing else of ours: no lock, socket or file is inherited. Whatever a driver call
does to it, ending it never waits: a process in uninterruptible sleep outlives SIGKILL, and is only
looked at again later.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

READ_BYTES: Final = 256 * 1024
PIPE_BYTES: Final = 1024 * 1024  # what everybody may have
MS_PER_SECOND: Final = 1000
COMMAND: Final = (sys.executable, "-P", "-m", "flopledger_agent.gpus.worker")


class WorkerGone(Exception):
    """The worker ended or its pipe is full: nothing can be said to it, nothing comes from it."""


class WorkerProcess(Protocol):
    """A running worker, at the other end of two pipes. No method ever waits."""

    def send(self, content: bytes) -> None:
        """Write all of it at once. Errors: WorkerGone."""
        ...

    def receive(self) -> bytes:
        """What has come, perhaps nothing. Errors: WorkerGone."""
        ...

    def fileno(self) -> int:
        """The descriptor that is readable when something has come."""
        ...

    def end(self, *, kill: bool) -> None:
        """Close the pipes, which tells it to leave; `kill` does not ask."""
        ...

    def ended(self) -> bool:
        """Whether the operating system has let go of it."""
        ...


class PipeWorker:
    """A worker as a child process."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        # Threads of glibc keep an arena each: one is enough for a worker that mostly waits.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(  # noqa: S603  (this program)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=True,
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None, "a pipe was asked for"
        assert self._process.stdout is not None, "a pipe was asked for"
        self._in, self._out = self._process.stdin, self._process.stdout
        for pipe in (self._in, self._out):
            os.set_blocking(pipe.fileno(), False)
            # A greeting must fit at once, and an answer should: many parts make it long. Without
            # the room most nodes do as well.
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, content: bytes) -> None:
        """Write all of it at once; a worker that does not read is gone. Errors: WorkerGone."""
        try:
            written = os.write(self._in.fileno(), content)
        except (OSError, ValueError) as error:
            raise WorkerGone(str(error)) from error
        if written != len(content):
            raise WorkerGone("it does not read")

    def receive(self) -> bytes:
        """What has come, perhaps nothing. Errors: WorkerGone at its end."""
        try:
            content = os.read(self._out.fileno(), READ_BYTES)
        except BlockingIOError:
            return b""
        except (OSError, ValueError) as error:
            raise WorkerGone(str(error)) from error
        if not content:
            raise WorkerGone("it ended")
        return content

    def fileno(self) -> int:
        """The reading end."""
        return self._out.fileno()

    def end(self, *, kill: bool) -> None:
        """Close the pipes; `kill` sends SIGKILL, too."""
        if kill:
            self._process.kill()  # nothing when it has been reaped
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()

    def ended(self) -> bool:
        """Whether it was reaped; does not wait."""
        return self._process.poll() is not None


def wait_for_any(workers: Iterable[WorkerProcess], seconds: float) -> None:
    """Return when one of the workers has something to read, at the latest after `seconds`."""
    poll = select.poll()
    for worker in workers:
        poll.register(worker.fileno(), select.POLLIN)
    poll.poll(max(0.0, seconds) * MS_PER_SECOND)
