"""Running counters of this agent's life, for its own page: the same slices the ledger gets.

Counters start at zero with the process, as Prometheus counters do. FLOP comes from the same core
function as everywhere; a counter is never shown lower than before, because a reader would take
that for a restart.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.windows import MICRO, shares
from flopledger_core.records import Cycles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.windows import Slice
    from flopledger_core.records import Device


class WorkKey(msgspec.Struct, frozen=True, kw_only=True):
    """Slices under one key can be turned into FLOP together."""

    device: Device
    tier: str
    precision: str | None


class MeterCounts(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of the counters at one instant."""

    cycles: dict[WorkKey, Cycles]
    counted_ns: dict[WorkKey, int]  # device time that the cycles were counted in
    energy_mj: dict[Device, int]
    time_ns: dict[tuple[Device, str], int]  # by device and kind of owner
    dark_ns: dict[tuple[Device, str], int]  # time without activity counters, by reason
    failures: dict[tuple[str, str], int]  # by device uuid and reason
    last_sample_unix_ns: dict[Device, int]


class Meters:
    """Adds up slices; read from another thread through `counts`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._micro: dict[WorkKey, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._counted_ns: dict[WorkKey, int] = defaultdict(int)
        self._energy_mj: dict[Device, int] = defaultdict(int)
        self._time_ns: dict[tuple[Device, str], int] = defaultdict(int)
        self._dark_ns: dict[tuple[Device, str], int] = defaultdict(int)
        self._failures: dict[tuple[str, str], int] = defaultdict(int)
        self._last_unix_ns: dict[Device, int] = {}

    def add(self, node: NodeSample, slices: Iterable[Slice]) -> None:
        """Count one tick."""
        offset_ns = node.unix_ns - node.boot_ns
        with self._lock:
            for sample in node.samples:
                self._last_unix_ns[sample.device] = sample.boot_ns + offset_ns
            for failure in node.failures:
                self._failures[failure.device.uuid, failure.reason] += 1
            for piece in slices:
                self._add_slice(piece)

    def counts(self) -> MeterCounts:
        """The counters now."""
        with self._lock:
            return MeterCounts(
                cycles={
                    key: Cycles(**{name: amount // MICRO for name, amount in micro.items()})
                    for key, micro in self._micro.items()
                },
                counted_ns=dict(self._counted_ns),
                energy_mj=dict(self._energy_mj),
                time_ns=dict(self._time_ns),
                dark_ns=dict(self._dark_ns),
                failures=dict(self._failures),
                last_sample_unix_ns=dict(self._last_unix_ns),
            )

    def _add_slice(self, piece: Slice) -> None:
        span_ns = piece.end_boot_ns - piece.start_boot_ns
        weights = [claim.weight for claim in piece.claims]
        keys = [
            WorkKey(device=piece.device, tier=piece.tier, precision=claim.precision)
            for claim in piece.claims
        ]
        times = shares(span_ns, weights)
        for claim, key, part_ns in zip(piece.claims, keys, times, strict=True):
            self._time_ns[piece.device, claim.owner.kind] += part_ns
            if piece.micro_cycles:
                self._counted_ns[key] += part_ns
        if not piece.micro_cycles:
            self._dark_ns[piece.device, piece.absent.get("cycles", "unknown")] += span_ns
        if piece.energy_mj is not None:
            self._energy_mj[piece.device] += piece.energy_mj
        if not piece.micro_cycles:
            return  # a key without counts would be shown as a count of zero
        works = [self._micro[key] for key in keys]
        for name, amount in piece.micro_cycles.items():
            for sums, part in zip(works, shares(amount, weights), strict=True):
                sums[name] += part
