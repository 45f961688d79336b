"""When the loop ticks: on the grid of the wall clock, and at once when a job begins or ends.

Extra ticks split windows at job edges, so that a job shorter than the interval is metered in a
window of its own. They are spaced and rationed: whoever tags processes in a hurry, or lets them
die by the hundred, costs the node a few readings and no more. `Rhythm` is pure; `Bell` is what
other threads and the kernel ring.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Final

from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.exits import ExitWatch
    from flopledger_agent.clocks import Clock

# GPM refreshes its samples every 100 ms (nvml.h: the interval of two "should be greater"), so two
# readings closer than that may read the same.
EXTRA_SPACING_NS: Final = 100_000_000
# A tagged process needs a moment until it holds a device, and may be done with it before the grid's
# next tick: for one interval after its tag readings follow each other at this share of the time
# that has passed since, so that work of a tenth of a second, or of a quarter of its age, is seen.
SETTLING_SHARE: Final = 4
STOP_LOOK_SECONDS: Final = 3600.0  # a wait without a limit could not be told from a hang
EXTRA_TICKS_MAX: Final = 40  # in hand at once; looking after one beginning takes 25 at most
EXTRA_TICKS_FOR_EDGES: Final = 10  # of these, kept for edges that were seen
EXTRA_TICKS_PER_GRID_TICK: Final = 1  # so that no stream of edges more than doubles the load


class Rhythm:
    """Decides when the next tick is due, from edges that were told and ticks that were made."""

    def __init__(self, tick_ns: int) -> None:
        self._tick_ns = tick_ns
        self._last_boot_ns: int | None = None
        self._grid_boot_ns = 0
        self._edge_boot_ns: int | None = None
        self._begun_boot_ns: int | None = None
        self._ration_count = EXTRA_TICKS_MAX

    def ticked(self, boot_ns: int, unix_ns: int) -> None:
        """A tick began at these times; edges told before are seen by it."""
        if boot_ns >= self._grid_boot_ns:
            self._ration_count = min(
                EXTRA_TICKS_MAX, self._ration_count + EXTRA_TICKS_PER_GRID_TICK
            )
        else:
            self._ration_count -= 1
        self._last_boot_ns = boot_ns
        self._grid_boot_ns = boot_ns + self._tick_ns - unix_ns % self._tick_ns
        self._edge_boot_ns = None

    def edge(self, boot_ns: int, *, begins: bool) -> None:
        """A job begins, or ends, at about this time."""
        if self._edge_boot_ns is None:
            self._edge_boot_ns = boot_ns
        if begins:
            self._begun_boot_ns = boot_ns

    def due_boot_ns(self) -> int:
        """When the next tick is due: the next one of the grid, or an extra one before it."""
        last_ns = self._last_boot_ns
        if last_ns is None:
            return 0
        extra_ns: int | None = None
        if self._edge_boot_ns is not None and self._ration_count > 0:
            extra_ns = max(self._edge_boot_ns, last_ns + EXTRA_SPACING_NS)
        elif self._begun_boot_ns is not None and self._ration_count > EXTRA_TICKS_FOR_EDGES:
            age_ns = max(0, last_ns - self._begun_boot_ns)
            if age_ns < self._tick_ns:
                extra_ns = last_ns + max(EXTRA_SPACING_NS, age_ns // SETTLING_SHARE)
        # One that would come within the spacing of the grid's own tick is that tick.
        if extra_ns is not None and extra_ns + EXTRA_SPACING_NS <= self._grid_boot_ns:
            return extra_ns
        return self._grid_boot_ns


class Bell:
    """Wakes the thread that waits, from any thread, or by the kernel when a process ends."""

    def __init__(self, exits: ExitWatch) -> None:
        self._exits = exits
        self._lock = threading.Lock()
        self._rung: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._begins = False

    def ring(self, *, begins: bool = False) -> None:
        """Wake whoever waits, now or as soon as somebody does; `begins`: a job does."""
        with self._lock:
            self._begins = self._begins or begins
            if self._rung is not None:
                os.eventfd_write(self._rung, 1)

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Wait at most so long: whether an edge was told, and whether one was a beginning.

        To a fraction of a millisecond, which is much of a scaled clock's second.
        """
        rung = self._rung
        if rung is None:
            return False, False
        exits = self._exits.fileno()
        ready, _, _ = select.select([rung, exits], [], [], max(0.0, seconds))
        if exits in ready:
            self._exits.drain()
        with self._lock:
            if rung in ready:
                os.eventfd_read(rung)
            begins, self._begins = self._begins, False
        return bool(ready), begins

    def close(self) -> None:
        """Give the descriptor back; whoever rings later wakes nobody. For the waiting thread."""
        with self._lock:
            rung, self._rung = self._rung, None
        if rung is not None:
            os.close(rung)


def wait_until_due(
    rhythm: Rhythm, bell: Bell, clock: Clock, is_stopped: Callable[[], bool]
) -> None:
    """Return when the next tick is due by `clock`, or as soon as `is_stopped` and the bell rang."""
    while not is_stopped():
        wait_ns = rhythm.due_boot_ns() - clock.boottime_ns()
        if wait_ns <= 0:
            return
        woken, begins = bell.wait(clock.sleep_seconds(wait_ns / NS_PER_SECOND))
        if woken or begins:
            rhythm.edge(clock.boottime_ns(), begins=begins)


def ring_when_set(stop: threading.Event, bell: Bell) -> None:
    """Ring once `stop` is set, from a thread that does nothing else."""

    def watch() -> None:
        while not stop.wait(STOP_LOOK_SECONDS):
            pass
        bell.ring()

    threading.Thread(target=watch, name="stop", daemon=True).start()
