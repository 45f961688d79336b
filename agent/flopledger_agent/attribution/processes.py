"""The node's processes through psutil: who a pid is now, whose it is, and what tagged it.

A process is a pid and a create time together, so a pid that the system gave away again is never
taken for the old process. What is known of a process is kept while it lives; its create time is
fixed at first sight, because it is told in wall time and would move when the clock steps. Of its
environment only the variables of attribution are kept: the rest may hold secrets. Reading it can
block for as long as the process hangs in the kernel, so that is never waited for.
"""

from __future__ import annotations

import os
import select
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
import psutil

from flopledger_agent.attribution.interface import Process
from flopledger_agent.attribution.tag_values import KEPT_VARIABLES

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import ProcessTable

PROCESSES_MAX: Final = (
    4096  # far more than any node has on its GPUs; bounds memory, not correctness
)
WATCHED_MAX: Final = 256  # file descriptors spent on known processes; the rest are asked of psutil
ANCESTORS_MAX: Final = 64  # deeper trees exist only by accident
# A process keeps its pid when it executes another program, but not its environment: look again
# after this many questions (a minute at one a second).
QUESTIONS_PER_ENVIRONMENT: Final = 60
# Reading an environment takes microseconds; one that takes longer belongs to a process that hangs
# in the kernel, and the sampling loop must not hang with it.
ENVIRONMENT_DEADLINE_SECONDS: Final = 0.2
QUESTIONS_PER_LATE_ENVIRONMENT: Final = 5  # how soon it is tried again
LATE_READS_MAX: Final = 8  # threads that may be lost to hanging processes at once
TIMED_OUT: Final = "timed out; the process hangs in the kernel and is asked again"

Environment: TypeAlias = tuple[dict[str, str] | None, str | None]


class EnvironmentReader:
    """Reads environments, each in a thread of its own, under a deadline.

    A process whose reading has not come back is not asked again meanwhile, and there are never more
    than a few such threads, so hanging processes cost neither time nor memory without bound.
    """

    def __init__(self, deadline_seconds: float = ENVIRONMENT_DEADLINE_SECONDS) -> None:
        self._deadline_seconds = deadline_seconds
        self._late: dict[psutil.Process, threading.Thread] = {}

    def read(self, handle: psutil.Process) -> Environment:
        """The variables of attribution, or None and why. One caller at a time."""
        self._late = {key: thread for key, thread in self._late.items() if thread.is_alive()}
        if handle in self._late or len(self._late) >= LATE_READS_MAX:
            return None, TIMED_OUT
        answers: list[Environment] = []
        thread = threading.Thread(
            target=lambda: answers.append(_environment(handle)),
            name=f"environ-{handle.pid}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:
            return None, "no thread to read it with"
        thread.join(self._deadline_seconds)
        if answers:
            return answers[0]
        if thread.is_alive():
            self._late[handle] = thread
        return None, TIMED_OUT


class _Known:
    """A process seen before.

    The kernel's own handle of a process (a pidfd) tells in a microsecond that it still lives; where
    there is none, or it says otherwise, psutil compares create times.
    """

    def __init__(self, handle: psutil.Process, process: Process, *, watch: bool) -> None:
        self.handle = handle
        self.process = process
        self.questions = 0
        self._pidfd = _pidfd(process.pid) if watch else None
        self._poll = select.poll()
        if self._pidfd is not None:
            self._poll.register(self._pidfd, select.POLLIN)
            if not handle.is_running():  # it ended before the pidfd was made, whose is that then?
                self.forget()

    @property
    def watched(self) -> bool:
        """Whether it holds a file descriptor."""
        return self._pidfd is not None

    def lives(self) -> bool:
        """Whether the pid is still this process."""
        if self._pidfd is not None and not self._poll.poll(0):
            return True
        return bool(self.handle.is_running())

    def forget(self) -> None:
        """Give the file descriptor back."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)


class PsutilProcessTable:
    """The operating system's processes; usable from several threads."""

    def __init__(
        self, processes_max: int = PROCESSES_MAX, environments: EnvironmentReader | None = None
    ) -> None:
        self._processes_max = processes_max
        self._environments = EnvironmentReader() if environments is None else environments
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._create_times: OrderedDict[psutil.Process, int] = OrderedDict()
        self._watched = 0
        self._lock = threading.Lock()

    def identify(self, pid: int) -> Process | None:
        """The process now behind `pid`; None when it is gone."""
        with self._lock:
            known = self._known.get(pid)
            if known is not None and not known.lives():
                self._drop(pid)
                known = None
            if known is None:
                known = self._meet(pid)
                if known is None:
                    return None
                self._known[pid] = known
                self._watched += known.watched
                while len(self._known) > self._processes_max:
                    self._drop(next(iter(self._known)))
            self._known.move_to_end(pid)
            known.questions += 1
            late = known.process.reason == TIMED_OUT
            pause = QUESTIONS_PER_LATE_ENVIRONMENT if late else QUESTIONS_PER_ENVIRONMENT
            if known.questions % pause == 0:
                self._look_again(known)
            return known.process

    def _drop(self, pid: int) -> None:
        known = self._known.pop(pid)
        self._watched -= known.watched
        known.forget()

    def _meet(self, pid: int) -> _Known | None:
        try:
            handle = psutil.Process(pid)
            create_time_ms = self._create_time_ms(handle)
        except psutil.NoSuchProcess:
            return None
        except (psutil.AccessDenied, ValueError, OverflowError):
            return None  # hidden from us, or not a pid at all
        environ, reason = self._environments.read(handle)
        process = Process(
            pid=pid,
            create_time_ms=create_time_ms,
            user=_user(handle),
            uid=_uid(handle),
            environ=environ,
            ancestors=self._ancestors(handle),
            reason=reason,
        )
        return _Known(handle, process, watch=self._watched < WATCHED_MAX)

    def _look_again(self, known: _Known) -> None:
        environ, reason = self._environments.read(known.handle)
        before = known.process
        if environ is None and before.environ is not None:
            return  # what was read before still tells most
        if (environ, reason) != (before.environ, before.reason):
            known.process = msgspec.structs.replace(before, environ=environ, reason=reason)

    def _create_time_ms(self, handle: psutil.Process) -> int:
        create_time_ms = self._create_times.get(handle)
        if create_time_ms is None:
            create_time_ms = round(handle.create_time() * 1000)
            self._create_times[handle] = create_time_ms
            while len(self._create_times) > 2 * self._processes_max:
                self._create_times.popitem(last=False)
        self._create_times.move_to_end(handle)
        return create_time_ms

    def _ancestors(self, handle: psutil.Process) -> tuple[tuple[int, int], ...]:
        ancestors: list[tuple[int, int]] = []
        try:
            parent = handle.parent()
            while parent is not None and len(ancestors) < ANCESTORS_MAX:
                ancestors.append((parent.pid, self._create_time_ms(parent)))
                parent = parent.parent()
        except psutil.Error:
            pass  # an ancestor ended meanwhile: those below it are known
        return tuple(ancestors)


class CombinedProcessTable:
    """Two tables as one; the first is asked first."""

    def __init__(self, first: ProcessTable, second: ProcessTable) -> None:
        self._first = first
        self._second = second

    def identify(self, pid: int) -> Process | None:
        """The process now behind `pid`, wherever it is known."""
        process = self._first.identify(pid)
        return self._second.identify(pid) if process is None else process


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # an older kernel, no descriptors left, or it ended
        return None


def _environment(handle: psutil.Process) -> tuple[dict[str, str] | None, str | None]:
    try:
        environ = handle.environ()
    except psutil.AccessDenied:
        return None, (
            "no permission; give the agent CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, or start the "
            "job with flopledger-agent tag"
        )
    except psutil.NoSuchProcess:  # a zombie's is gone too
        return None, "the process is ending"
    except (psutil.Error, OSError) as error:
        return None, f"{type(error).__name__}"
    return {name: environ[name] for name in KEPT_VARIABLES if name in environ}, None


def _user(handle: psutil.Process) -> str | None:
    try:
        return handle.username()
    except psutil.Error:
        return None


def _uid(handle: psutil.Process) -> int | None:
    try:
        return int(handle.uids().real)
    except psutil.Error:
        return None
