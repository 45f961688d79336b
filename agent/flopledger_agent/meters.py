"""Running counters of this agent's life, for its own page: the same slices the ledger gets.

Counters start at zero with the process, as Prometheus counters do. FLOP comes from the same core
function as everywhere; a counter is never shown lower than before, because a reader would take
that for a restart.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.splitting import claim_weights
from flopledger_agent.layouts import part
from flopledger_agent.windows import MICRO, MW_NS_PER_MJ, shares
from flopledger_core.records import Cycles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.windows import Slice
    from flopledger_core.records import Device, EnergyOrigin

# One device shows few of the XIDs there are: more are counted together, so that the page stays
# bounded whatever a driver says.
XIDS_PER_DEVICE_MAX: Final = 32
OTHER_XIDS: Final = "other"


class WorkKey(msgspec.Struct, frozen=True, kw_only=True):
    """Slices under one key can be turned into FLOP together."""

    device: Device
    tier: str
    precision: str | None


class MeterCounts(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of the counters at one instant."""

    cycles: dict[WorkKey, Cycles]
    counted_ns: dict[WorkKey, int]  # device time that the cycles were counted in
    energy_mj: dict[Device, int]  # by the counter, else by the integral of sampled power
    time_ns: dict[tuple[Device, str], int]  # by device and kind of owner
    dark_ns: dict[tuple[Device, str], int]  # time without activity counters, by reason
    failures: dict[tuple[str, str], int]  # by device key and reason
    last_sample_unix_ns: dict[Device, int]
    # Where the counter and sampled power told of the same time: what each of them said.
    energy_check_mj: dict[tuple[Device, EnergyOrigin], int] = {}
    xids: dict[tuple[str, str], int] = {}  # by device key and XID; see XIDS_PER_DEVICE_MAX


class Meters:
    """Adds up slices; read from another thread through `counts`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[WorkKey, _Work] = defaultdict(_Work)
        self._energy_mj: dict[Device, int] = defaultdict(int)
        self._power_twice_mw_ns: dict[Device, int] = defaultdict(int)  # where no counter told
        self._checked_mj: dict[Device, int] = defaultdict(int)
        self._checked_twice_mw_ns: dict[Device, int] = defaultdict(int)
        self._time_ns: dict[tuple[Device, str], int] = defaultdict(int)
        self._dark_ns: dict[tuple[Device, str], int] = defaultdict(int)
        self._failures: dict[tuple[str, str], int] = defaultdict(int)
        self._last_unix_ns: dict[Device, int] = {}
        self._xids: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, node: NodeSample, slices: Iterable[Slice]) -> None:
        """Count one tick."""
        offset_ns = node.unix_ns - node.boot_ns
        with self._lock:
            for sample in node.samples:
                self._last_unix_ns[sample.device] = sample.boot_ns + offset_ns
            for failure in node.failures:
                self._failures[failure.device.key, failure.reason] += 1
                self._add_xids(failure.device.key, failure.xids)
            for sample in node.samples:
                self._add_xids(sample.device.key, sample.xids)
            for piece in slices:
                self._add_slice(piece)

    def counts(self) -> MeterCounts:
        """The counters now."""
        with self._lock:
            return MeterCounts(
                cycles={
                    key: Cycles(**{name: amount // MICRO for name, amount in work.micro.items()})
                    for key, work in self._works.items()
                },
                counted_ns={key: work.counted_ns for key, work in self._works.items()},
                energy_mj=self._energies(),
                energy_check_mj=self._checks(),
                time_ns=dict(self._time_ns),
                dark_ns=dict(self._dark_ns),
                failures=dict(self._failures),
                last_sample_unix_ns=dict(self._last_unix_ns),
                xids={
                    (key, xid): number
                    for key, xids in self._xids.items()
                    for xid, number in xids.items()
                },
            )

    def _add_xids(self, key: str, xids: tuple[int, ...]) -> None:
        counts = self._xids[key] if xids else {}
        for xid in xids:
            known = str(xid) in counts or len(counts) < XIDS_PER_DEVICE_MAX
            counts[str(xid) if known else OTHER_XIDS] += 1

    def _energies(self) -> dict[Device, int]:
        sums = dict(self._energy_mj)
        for device, twice in self._power_twice_mw_ns.items():
            sums[device] = sums.get(device, 0) + twice // (2 * MW_NS_PER_MJ)
        return sums

    def _checks(self) -> dict[tuple[Device, EnergyOrigin], int]:
        sums: dict[tuple[Device, EnergyOrigin], int] = {}
        for device, amount in self._checked_mj.items():
            sums[device, "counter"] = amount
            twice = self._checked_twice_mw_ns[device]
            sums[device, "power_integral"] = twice // (2 * MW_NS_PER_MJ)
        return sums

    def _add_energy(self, piece: Slice) -> None:
        twice = piece.power_twice_mw_ns
        if piece.energy_mj is None:
            if twice is not None:
                self._power_twice_mw_ns[piece.device] += twice
            return
        self._energy_mj[piece.device] += piece.energy_mj
        if twice is not None and piece.energy_scope == "gpu":
            self._checked_mj[piece.device] += piece.energy_mj
            self._checked_twice_mw_ns[piece.device] += twice

    def _add_slice(self, piece: Slice) -> None:
        device = piece.device
        span_ns = piece.end_boot_ns - piece.start_boot_ns
        own_ns = part(device, piece.end_boot_ns) - part(device, piece.start_boot_ns)
        weights = claim_weights(piece.claims)
        times = shares(own_ns, weights)
        for claim, own in zip(piece.claims, times, strict=True):
            self._time_ns[device, claim.owner.kind] += own
        self._add_energy(piece)
        if not piece.micro_cycles:  # a key without counts would be shown as a count of zero
            self._dark_ns[device, piece.absent.get("cycles", "unknown")] += own_ns
            return
        works: list[dict[str, int]] = []
        for claim, span in zip(piece.claims, shares(span_ns, weights), strict=True):
            # A key is hashed with all of its device: once here, and not once a counter.
            work = self._works[WorkKey(device=device, tier=piece.tier, precision=claim.precision)]
            work.counted_ns += span
            works.append(work.micro)
        if len(works) == 1:
            only = works[0]
            for name, amount in piece.micro_cycles.items():
                only[name] += amount
            return
        for name, amount in piece.micro_cycles.items():
            for sums, share in zip(works, shares(amount, weights), strict=True):
                sums[name] += share


class _Work:
    """What was counted under one key."""

    __slots__ = ("counted_ns", "micro")

    def __init__(self) -> None:
        self.micro: dict[str, int] = defaultdict(int)
        self.counted_ns = 0
