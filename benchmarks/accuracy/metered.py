"""The agent's own metering around a piece of work: sampled at its edges and as often as asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.metering import close_windows, empty_state, observe, records_of
from flopledger_core.accelerators import load_table
from flopledger_core.basis import basis
from flopledger_core.flop import Work, total_work, work
from flopledger_core.identity import IDLE_OWNER, Owner
from flopledger_core.records import AgentRecord, GapRecord, Precision, UsageRecord

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSource, NodeSample
    from flopledger_core.accelerators import AcceleratorTable

TICK_NS: Final = 1_000_000_000

IDLE: Final = Claim(
    owner=IDLE_OWNER,
    weight=1,
    source="idle",
    evidence=None,
    precision=None,
    precision_origin="unknown",
    user=None,
    flags=(),
)


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """What was metered for one case."""

    work: Work
    energy_mj: int | None
    power_integral_mj: int | None
    tiers: tuple[str, ...]
    time_ms: int
    gaps: int


class Meter:
    """Meters one device; the work in between is whatever the caller does."""

    def __init__(self, source: GpuSource, table: AcceleratorTable | None = None) -> None:
        self._source = source
        self._table = load_table() if table is None else table
        self._state = empty_state("bench")
        self._claims: tuple[Claim, ...] = (IDLE,)
        self.last: NodeSample | None = None

    def tick(self) -> None:
        """One sample now."""
        node = self._source.sample()
        claims = {sample.device.key: self._claims for sample in node.samples}
        self._state, _ = observe(self._state, node, claims, tick_ns=TICK_NS)
        self.last = node

    def begin(self, case: str, precision: Precision | None) -> None:
        """What happens from now on belongs to `case`."""
        self.tick()
        owner = Owner(kind="attributed", project=case)
        origin = "unknown" if precision is None else "declared"
        self._claims = (
            msgspec.structs.replace(
                IDLE,
                owner=owner,
                source="tag",
                precision=precision,
                precision_origin=origin,
            ),
        )

    def end(self) -> None:
        """The case is over."""
        self.tick()
        self._claims = (IDLE,)

    def amounts(self) -> dict[str, Amounts]:
        """Everything metered so far, by case."""
        self._state = close_windows(self._state)
        records = records_of(self._state.closed)
        cases = {record.owner.account for record in records}
        return {case: self._amounts_of(case, records) for case in cases}

    def _amounts_of(self, case: str, records: list[AgentRecord]) -> Amounts:
        mine = [
            record
            for record in records
            if isinstance(record, (UsageRecord, GapRecord)) and record.owner.account == case
        ]
        usage = [record for record in mine if isinstance(record, UsageRecord)]
        energies = [record.energy_mj for record in usage]
        integrals = [record.power_integral_mj for record in usage]
        return Amounts(
            work=total_work([self._work_of(record) for record in mine]),
            energy_mj=None if None in energies else sum(value or 0 for value in energies),
            power_integral_mj=None if None in integrals else sum(value or 0 for value in integrals),
            tiers=tuple(sorted({record.tier for record in usage})),
            time_ms=sum(record.gpu_time_ms for record in usage),
            gaps=len(mine) - len(usage),
        )

    def _work_of(self, record: UsageRecord | GapRecord) -> Work:
        device = record.device
        found = self._table.resolve(device.name, device.pci_device_id, device.compute_capability)
        return work(
            basis(record),
            table=self._table,
            accelerator=found,
            device_name=device.name,
            precision=record.precision,
        )
