"""The host beside the GPUs in the agent's loop: when it is sampled, and what becomes of it.

It has a rhythm of its own, slower than the GPUs', and an extra sample whenever windows are about to
close, so that both close at the same minutes. After a job's beginning samples come closer for one
interval, because the kernel keeps nothing of a process that ended but what its parent got: what a
short job used is known from the last sample in its life. They are rationed like the GPUs' extra
readings.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from flopledger_agent.host.counters import HostCounters
from flopledger_agent.host.metering import HostState, observe

if TYPE_CHECKING:
    from flopledger_agent.host.interface import HostSource
    from flopledger_agent.windows import Closed

# The kernel tells a process's time in hundredths of a second: closer samples say little more.
EXTRA_SPACING_NS: Final = 100_000_000
SETTLING_SHARE: Final = 4  # of the time since a job's edge: a quarter of its age stays unseen
EXTRA_SAMPLES_MAX: Final = 30  # in hand at once; looking after one beginning takes 20 at most
EXTRA_SAMPLES_PER_SAMPLE: Final = 2  # a scan of the grid earns them: edges at most treble the load


class HostRoom:
    """A host source and its rhythm; the loop keeps the state."""

    def __init__(self, source: HostSource, interval_ns: int) -> None:
        self._source = source
        self._interval_ns = interval_ns
        self._sampled_boot_ns: int | None = None
        self._asked = threading.Event()
        self._edge_boot_ns: int | None = None
        self._ration_count = EXTRA_SAMPLES_MAX
        self.counters = HostCounters()

    def ask(self) -> None:
        """A job began or ended: sample at the next tick, and closely for a while. Any thread."""
        self._asked.set()

    def observe(
        self, state: HostState, boot_ns: int, *, closing: bool = False
    ) -> tuple[HostState, list[Closed]]:
        """The state after this tick, and what closed by it; samples when it is time to."""
        before = self._sampled_boot_ns
        on_time = before is None or not before <= boot_ns < before + self._interval_ns
        extra = not (on_time or closing) and self._extra_is_due(boot_ns)
        if on_time:
            self._ration_count = min(
                EXTRA_SAMPLES_MAX, self._ration_count + EXTRA_SAMPLES_PER_SAMPLE
            )
        if not (on_time or closing or extra):
            return state, []
        self._ration_count -= extra
        self._sampled_boot_ns = boot_ns
        sample = self._source.sample()
        state, piece, closed = observe(state, sample)
        self.counters.add(sample, piece)
        return state, closed

    def _extra_is_due(self, boot_ns: int) -> bool:
        """Whether a job's edge is so fresh that this tick takes a sample for it."""
        asked = self._asked.is_set()
        if asked:
            self._asked.clear()
            self._edge_boot_ns = boot_ns
        before, edge_ns = self._sampled_boot_ns, self._edge_boot_ns
        if edge_ns is None or before is None or self._ration_count < 1:
            return False
        age_ns = boot_ns - edge_ns
        if not 0 <= age_ns < self._interval_ns:
            self._edge_boot_ns = None
            return False
        spacing_ns = max(EXTRA_SPACING_NS, (before - edge_ns) // SETTLING_SHARE)
        return asked or boot_ns - before >= spacing_ns

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()
