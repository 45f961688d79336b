"""What a collector would have of a virtual node: sums of every batch, held against the truth."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from flopledger_core.accelerators import load_table
from flopledger_core.basis import basis
from flopledger_core.energy import energy_bounds
from flopledger_core.flop import Work, work
from flopledger_core.records import GapRecord, UsageRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flopledger_core.accelerators import Resolved
    from flopledger_core.batch import SealedBatch
    from flopledger_core.records import Device

TABLE: Final = load_table()


class VirtualLedger:
    """What a collector would have, added up as batches come."""

    def __init__(self) -> None:
        self.heads: dict[str, tuple[int, str]] = {}
        self.sums: dict[tuple[str, str | None], dict[str, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        self.spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.records = 0
        self.gaps: set[str] = set()
        self.devices: dict[str, Device] = {}

    def take(self, batches: Iterable[SealedBatch]) -> None:
        """Each batch follows the one before it in its stream."""
        for batch in batches:
            header = batch.header
            before = self.heads.get(header.stream_id)
            assert header.sequence == (0 if before is None else before[0] + 1)
            assert header.previous_hash == (None if before is None else before[1])
            self.heads[header.stream_id] = (header.sequence, batch.hash)
            seen: set[tuple[str, int, int]] = set()
            for record in batch.records:
                if isinstance(record, UsageRecord):
                    span = (record.start_boot_ms, record.end_boot_ms)
                elif isinstance(record, GapRecord):
                    assert record.start_boot_ms is not None
                    span = (record.start_boot_ms, record.start_boot_ms + record.gap_ms)
                    self.gaps.add(record.reason)
                else:
                    continue
                self.records += 1
                if record.device.name != "unknown" or record.device.uuid not in self.devices:
                    self.devices[record.device.uuid] = record.device
                if (record.device.uuid, *span) not in seen:
                    seen.add((record.device.uuid, *span))
                    self.spans[record.device.uuid].append(span)
                for name, amount in basis(record).items():
                    assert amount >= 0, name
                    self.sums[record.device.uuid, record.precision][name] += amount

    def work_of(self, uuid: str) -> Work:
        """Every precision's work of one GPU."""
        result = Work()
        for (device, precision), sums in self.sums.items():
            if device == uuid:
                found = self.devices[uuid]
                result += work(
                    sums,
                    table=TABLE,
                    accelerator=self.row_of(uuid),
                    device_name=found.name,
                    precision=precision,
                )
        return result

    def row_of(self, uuid: str) -> Resolved | None:
        """What the hardware table says of a GPU."""
        found = self.devices[uuid]
        return TABLE.resolve(found.name, found.pci_device_id, found.compute_capability)

    def energy_of(self, uuid: str) -> tuple[int, int | None]:
        """Low and high millijoules of one GPU."""
        low, high = 0, 0
        row = self.row_of(uuid)
        assert row is not None
        for (device, _), sums in self.sums.items():
            if device == uuid:
                bounds = energy_bounds(sums, row.accelerator)
                assert bounds.high is not None
                low, high = low + bounds.low, high + bounds.high
        return low, high

    def require_tiles(self) -> None:
        """Windows and gaps of a GPU follow each other without a hole or an overlap."""
        for uuid, found in self.spans.items():
            for before, after in pairwise(sorted(found)):
                assert before[1] == after[0], f"{uuid}: {before} is not followed by {after}"
