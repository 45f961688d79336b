"""The host beside the GPUs in the agent's loop: when it is sampled, and what becomes of it.

It has a rhythm of its own, slower than the GPUs', and an extra sample whenever windows are about to
close, so that both close at the same minutes.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from flopledger_agent.host.counters import HostCounters
from flopledger_agent.host.metering import HostState, observe

if TYPE_CHECKING:
    from flopledger_agent.host.interface import HostSource
    from flopledger_agent.windows import Closed


class HostRoom:
    """A host source and its rhythm; the loop keeps the state."""

    def __init__(self, source: HostSource, interval_ns: int) -> None:
        self._source = source
        self._interval_ns = interval_ns
        self._sampled_boot_ns: int | None = None
        self._asked = threading.Event()
        self.counters = HostCounters()

    def ask(self) -> None:
        """Sample at the next tick, whatever the rhythm: a job began or ended. From any thread."""
        self._asked.set()

    def observe(
        self, state: HostState, boot_ns: int, *, closing: bool = False
    ) -> tuple[HostState, list[Closed]]:
        """The state after this tick, and what closed by it; samples when it is time to."""
        before = self._sampled_boot_ns
        on_time = before is None or not before <= boot_ns < before + self._interval_ns
        if not (on_time or closing or self._asked.is_set()):
            return state, []
        self._asked.clear()
        self._sampled_boot_ns = boot_ns
        sample = self._source.sample()
        state, piece, closed = observe(state, sample)
        self.counters.add(sample, piece)
        return state, closed

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()
