"""The demo's child processes: started together, stopped together, never left behind.

Each child is in a session of its own, so that Ctrl-C reaches the demo alone and it can stop them
in order; the kernel ends them if the demo itself is killed.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flopledger_collector.errors import CollectorError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PR_SET_PDEATHSIG: Final = 1
STOP_SECONDS: Final = 15.0  # a stopping agent tries to deliver for five
LOG_TAIL_BYTES: Final = 2_000


class ChildDied(CollectorError):
    """A process of the demo ended by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One running process and where it writes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Every child of the demo, in the order they were started."""

    children: list[Child] = field(default_factory=list[Child])

    def start(self, name: str, module: str, arguments: list[str], log: Path) -> Child:
        """Run `python -m module` with its output in `log`."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_death_wish(),  # noqa: PLW1509 (no thread runs yet when children start)
            )
        child = Child(name=name, process=process, log=log)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raise `ChildDied`, with the end of its log, if one ended by itself."""
        for child in self.children:
            status = child.process.poll()
            if status is not None:
                tail = child.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")
                raise ChildDied(f"{child.name} ended with status {status}; its log says:\n{tail}")

    def stop(self, children: list[Child]) -> None:
        """Ask these to stop, wait, and end whoever does not; afterwards they are gone."""
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait(STOP_SECONDS)
            if child in self.children:
                self.children.remove(child)

    def stop_all(self) -> None:
        """Stop agents before the collector: they deliver what they sealed last."""
        self.stop(list(reversed(self.children)))


def _death_wish() -> Callable[[], None]:
    """What a child does before it becomes its program: ask to be ended with its parent."""
    library = ctypes.CDLL(None)

    def wish() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return wish
