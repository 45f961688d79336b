"""Made-up processes, and real ones that are cleaned up, for the tests of attribution."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flopledger_agent.attribution.interface import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PATIENT_SECONDS = 30.0
SLEEP = (sys.executable, "-c", "import sys; sys.stdin.read()")


def process(
    pid: int = 100,
    environ: Mapping[str, str] | None = None,
    *,
    create_time_ms: int = 5,
    user: str = "alice",
    ancestors: tuple[tuple[int, int], ...] = (),
    reason: str | None = None,
) -> Process:
    """A process; `environ` None: not readable."""
    return Process(
        pid=pid,
        create_time_ms=create_time_ms,
        user=user,
        environ=None if environ is None else dict(environ),
        ancestors=ancestors,
        reason=reason,
    )


class FakeProcessTable:
    """Knows the processes it is given."""

    def __init__(self, *processes: Process) -> None:
        self.processes = {process.pid: process for process in processes}

    def identify(self, pid: int) -> Process | None:
        """The process behind a pid now."""
        return self.processes.get(pid)


@contextmanager
def running(
    environ: Mapping[str, str] | None = None, command: tuple[str, ...] = SLEEP
) -> Iterator[subprocess.Popen[bytes]]:
    """A real child that ends when its standard input does."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environ or {})},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=PATIENT_SECONDS)


def until(condition: Callable[[], object], what: str) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + PATIENT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
