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
from tests.agent.sampling import BOOT_NS, UNIX_NS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flopledger_core.accelerators import Resolved
    from flopledger_core.batch import SealedBatch
    from flopledger_core.records import Device

TABLE: Final = load_table()
BOOT_BEFORE_UNIX_MS: Final = (UNIX_NS - BOOT_NS) // 1_000_000  # of the tests' clock, not stepped


class VirtualLedger:
    """What a collector would have, added up as batches come."""

    def __init__(self) -> None:
        self.heads: dict[str, tuple[int, str]] = {}
        self.sums: dict[tuple[str, str | None], dict[str, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        self.accounts: dict[tuple[str, str, str | None], dict[str, int]] = defaultdict(
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
                    start_ms = record.start_boot_ms
                    if start_ms is None:  # across a reboot, which boot time here goes on through
                        start_ms = record.start_unix_ms - BOOT_BEFORE_UNIX_MS
                    span = (start_ms, start_ms + record.gap_ms)
                    self.gaps.add(record.reason)
                else:
                    continue
                self.records += 1
                key = record.device.key
                if record.device.name != "unknown" or key not in self.devices:
                    self.devices[key] = record.device
                if (key, *span) not in seen:
                    seen.add((key, *span))
                    self.spans[key].append(span)
                account = self.accounts[key, record.owner.account, record.precision]
                for name, amount in basis(record).items():
                    assert amount >= 0, name
                    self.sums[key, record.precision][name] += amount
                    account[name] += amount

    def work_of(self, key: str) -> Work:
        """Every precision's work of one device."""
        result = Work()
        for (device, precision), sums in self.sums.items():
            if device == key:
                result += self._work(key, precision, sums)
        return result

    def work_of_account(self, key: str, account: str) -> Work:
        """What one account did on a device."""
        result = Work()
        for (device, owner, precision), sums in self.accounts.items():
            if (device, owner) == (key, account):
                result += self._work(key, precision, sums)
        return result

    def _work(self, key: str, precision: str | None, sums: dict[str, int]) -> Work:
        return work(
            sums,
            table=TABLE,
            accelerator=self.row_of(key),
            device_name=self.devices[key].name,
            precision=precision,
        )

    def own_time_ms(self, uuid: str) -> int:
        """Device time of all parts of a GPU, metered or not."""
        return sum(
            sums.get("gpu_time_ms", 0) + sums.get("gap_time_ms", 0)
            for (key, _), sums in self.sums.items()
            if self.devices[key].uuid == uuid
        )

    def row_of(self, key: str) -> Resolved | None:
        """What the hardware table says of a device."""
        found = self.devices[key]
        return TABLE.resolve(found.name, found.pci_device_id, found.compute_capability)

    def energy_of(self, key: str) -> tuple[int, int | None]:
        """Low and high millijoules of one device."""
        low, high = 0, 0
        row = self.row_of(key)
        assert row is not None
        for (device, _), sums in self.sums.items():
            if device == key:
                bounds = energy_bounds(sums, row.accelerator)
                assert bounds.high is not None
                low, high = low + bounds.low, high + bounds.high
        return low, high

    def require_tiles(self) -> None:
        """Windows and gaps follow each other without a hole or an overlap, and no time is lost.

        The owners' shares, and the parts of a partitioned GPU, sum to the time that passed.
        """
        ends: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for key, found in self.spans.items():
            for before, after in pairwise(sorted(found)):
                assert before[1] == after[0], f"{key}: {before} is not followed by {after}"
            ends[self.devices[key].uuid].append((min(found)[0], max(end for _, end in found)))
        for uuid, parts in ends.items():
            assert len(set(parts)) == 1, f"{uuid}: its parts begin and end together"
            assert self.own_time_ms(uuid) == parts[0][1] - parts[0][0], uuid
