"""The exits of processes that matter: those on a device, and those that were tagged.

The kernel's own handles (pidfds) tell at once when a process ends, so that a reading can be taken
while the job's edge is fresh. One thread uses a watch. A needless wake-up costs one reading; an
exit that was missed costs the precision of one edge, and the next tick of the grid sees it.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

EXITS_MAX: Final = 256  # file descriptors spent; more processes than this hold no node's GPUs


class ExitWatch:
    """Watches processes by pid until they end or no longer matter."""

    def __init__(self, processes_max: int = EXITS_MAX) -> None:
        self._processes_max = processes_max
        self._epoll = select.epoll()
        self._pidfds: dict[int, int] = {}
        self._ended: set[int] = set()
        self._tried: set[int] = set()  # tagged processes that were opened, or cannot be
        self._told: set[int] = set()  # still wanted, but a zombie may have its pid for long

    def fileno(self) -> int:
        """A descriptor that becomes readable when a watched process has ended."""
        return self._epoll.fileno()

    def watch(self, on_devices: Iterable[int], tagged: Iterable[int] = ()) -> None:
        """These processes matter now, and no others; what cannot be watched is left out.

        Of the tagged ones each is tried once: a registry remembers those that ended long ago.
        """
        urgent, others = set(on_devices), set(tagged)
        for pid in self._pidfds.keys() - urgent - others:
            self._let_go(pid)
        self._tried &= others
        self._told &= urgent | others
        for pid in (*sorted(urgent), *sorted(others - urgent - self._tried)):
            if len(self._pidfds) >= self._processes_max:
                return
            if pid not in self._pidfds and pid not in self._told:
                self._open(pid)
        self._tried = others

    def drain(self) -> None:
        """Take note of the exits that were told, so that they do not wake anybody again."""
        ready = {descriptor for descriptor, _events in self._epoll.poll(0)}
        for pid in [pid for pid, pidfd in self._pidfds.items() if pidfd in ready]:
            self._ended.add(pid)
            self._told.add(pid)
            self._let_go(pid)

    def ended(self) -> frozenset[int]:
        """The processes whose exit was told since this was asked last."""
        self.drain()
        ended, self._ended = frozenset(self._ended), set()
        return ended

    def close(self) -> None:
        """Give every descriptor back."""
        self.watch(())
        self._epoll.close()

    def _open(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError):  # ended already, made up, or an older kernel
            return
        self._pidfds[pid] = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)

    def _let_go(self, pid: int) -> None:
        os.close(self._pidfds.pop(pid))  # closing takes it out of the epoll, too
