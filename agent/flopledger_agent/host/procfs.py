"""Reading `/proc` cheaply and without being held up.

Most files answer in microseconds. The environment of a process that hangs in the kernel can block
its reader for as long as it hangs, so environments are read in a thread that nobody waits for.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.tag_values import KEPT_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STAT_BYTES_MAX: Final = 4096  # one line of about 300 bytes
NODE_STAT_BYTES_MAX: Final = 4 * 1024 * 1024  # the line of interrupts grows with the machine
ENVIRONMENT_BYTES_MAX: Final = 4 * 1024 * 1024  # more than the kernel lets a program start with
PIECE_BYTES: Final = 64 * 1024
LATE_THREADS_MAX: Final = 4  # threads that may be lost to hanging processes at once
STALLS_MAX: Final = 3  # questions without an answer after which the process in hand hangs
_KEPT: Final = re.compile(
    rb"(?:\A|(?<=\0))(?:"
    + b"|".join(sorted(name.encode() for name in KEPT_VARIABLES))
    + rb")=[^\0]*"
)
_USER_IDS: Final = re.compile(rb"^Uid:.*$", re.MULTILINE)


class ProcessFiles:
    """The files of a mounted `/proc`."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._peek = _Peek(self._root)

    def pids(self) -> list[int]:
        """Every process that is visible; raises OSError."""
        return [int(name) for name in os.listdir(self._root) if name.isdecimal()]  # noqa: PTH208

    def node_stat(self) -> bytes:
        """The node's counters; raises OSError."""
        return _read(f"{self._root}/stat", NODE_STAT_BYTES_MAX)

    def process_stat(self, pid: int) -> bytes | None:
        """A process's counters; None when it is gone."""
        try:
            descriptor = os.open(f"{self._root}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.read(descriptor, STAT_BYTES_MAX)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def user_ids(self, pid: int) -> bytes:
        """The line of a process's user ids, to compare; empty when it is gone."""
        try:
            found = _USER_IDS.search(_read(f"{self._root}/{pid}/status", STAT_BYTES_MAX))
        except OSError:
            return b""
        return b"" if found is None else found[0]

    def variables(self, pids: Sequence[int], limit_seconds: float) -> dict[int, bytes]:
        """The variables of attribution in the environments of processes, to compare; empty: none.

        An environment that may not be read counts as one without. Reading goes on after
        `limit_seconds`: what it finds then is in the answer to the next question, which may
        therefore speak of processes that were asked about before.
        """
        return self._peek.ask(pids, limit_seconds)


class _Job:
    """Environments being read, one after the other, by a thread."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.answers: list[bytes] = []  # in the order of `pids`; grows while the thread works
        self.taken = 0  # answers that were handed on
        self.stalls = 0  # questions in a row that found nothing new
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self) -> dict[int, bytes]:
        """What came since it was asked last."""
        before, self.taken = self.taken, len(self.answers)
        self.stalls = self.stalls + 1 if before == self.taken else 0
        return {self.pids[place]: self.answers[place] for place in range(before, self.taken)}


class _Peek:
    """Reads environments in a thread that goes on between questions; leaves it when it hangs."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._job: _Job | None = None
        self._late: dict[int, threading.Thread] = {}  # hanging pid -> the thread lost to it

    def ask(self, pids: Sequence[int], limit_seconds: float) -> dict[int, bytes]:
        if self._job is None:
            self._begin(pids)
        job = self._job
        if job is None or job.thread is None:
            return {}
        job.thread.join(limit_seconds)
        found = job.take()
        if job.taken == len(job.pids):
            self._job = None
        elif job.stalls >= STALLS_MAX or not job.thread.is_alive():
            job.stop.set()
            self._late[job.pids[job.taken]] = job.thread
            self._job = None
        return found

    def _begin(self, pids: Sequence[int]) -> None:
        self._late = {pid: thread for pid, thread in self._late.items() if thread.is_alive()}
        wanted = [pid for pid in pids if pid not in self._late]
        if not wanted or len(self._late) >= LATE_THREADS_MAX:
            return
        job = _Job(wanted)
        job.thread = threading.Thread(
            target=self._work, args=(job,), name="environments", daemon=True
        )
        try:
            job.thread.start()
        except RuntimeError:
            return  # no thread to be had: try again next time
        self._job = job

    def _work(self, job: _Job) -> None:
        for pid in job.pids:
            job.answers.append(self._variables(pid))
            if job.stop.is_set():
                return

    def _variables(self, pid: int) -> bytes:
        try:
            content = _read(f"{self._root}/{pid}/environ", ENVIRONMENT_BYTES_MAX)
        except OSError:
            return b""
        return b"\0".join(sorted(_KEPT.findall(content)))


def _read(path: str, bytes_max: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        while piece := os.read(descriptor, PIECE_BYTES):
            content += piece
            if len(content) >= bytes_max:
                break
        return content
    finally:
        os.close(descriptor)
