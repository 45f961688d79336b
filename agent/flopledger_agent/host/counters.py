"""Running counters of the host for the agent's own page: the same slices the ledger gets."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from flopledger_core.records import HostBoundary

if TYPE_CHECKING:
    from flopledger_agent.host.interface import HostSample
    from flopledger_agent.host.windows import HostSlice


class HostCounts(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of the counters at one instant."""

    cpu_ns: dict[str, int]  # by kind of owner
    energy_uj: dict[HostBoundary, int]
    absent: dict[str, str]  # what the last sample could not tell, and why
    last_sample_unix_ns: int | None


class HostCounters:
    """Adds up slices; read from another thread through `counts`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cpu_ns: dict[str, int] = defaultdict(int)
        self._energy_uj: dict[HostBoundary, int] = defaultdict(int)
        self._absent: dict[str, str] = {}
        self._last_unix_ns: int | None = None

    def add(self, sample: HostSample, piece: HostSlice | None) -> None:
        """Count one sample and the slice that it ended."""
        with self._lock:
            self._last_unix_ns = sample.unix_ns
            self._absent = dict(sample.absent if piece is None else piece.absent)
            if piece is None:
                return
            for one in piece.shares or ():
                self._cpu_ns[one.claim.owner.kind] += one.cpu_ns
            for boundary, amount in piece.energy_uj.items():
                self._energy_uj[boundary] += amount

    def counts(self) -> HostCounts:
        """The counters now."""
        with self._lock:
            return HostCounts(
                cpu_ns=dict(self._cpu_ns),
                energy_uj=dict(self._energy_uj),
                absent=dict(self._absent),
                last_sample_unix_ns=self._last_unix_ns,
            )
