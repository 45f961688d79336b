"""Checks on raw quantities: what no honest device could have reported.

An ordered list of pure functions, each from a batch to findings. A finding never refuses a batch
(only undecodable or unauthenticated bytes are refused); it marks a record disputed, which takes
it out of central and low and keeps it in high until a later entry resolves it.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.records import GapRecord, UsageRecord
from flopledger_core.units import HZ_PER_MHZ, MS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.batch import SealedBatch

# A window's edges are instants of sampling; counters are read some time around them, and NVML's
# maximum clock is known to be too low on some parts, its energy counter to lag by 100 ms.
EDGE_TOLERANCE_MS: Final = 1_000
CLOCK_TOLERANCE_PER_MILLE: Final = 50
POWER_TOLERANCE_PER_MILLE: Final = 200  # short excursions above the enforced limit are real


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a batch or one of its records."""

    code: str
    record_index: int | None  # None: the whole batch
    message: str


def active_within_elapsed(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """No pipe is active in more SM-cycles than elapsed.

    Shares of a split device are rounded each for itself, one SM-cycle per owner at most.
    """
    del table
    for index, record in _usage(batch):
        elapsed = record.cycles.elapsed
        slack = record.attribution.sharers - 1
        for name, value in record.cycles.as_dict().items():
            if value is not None and (elapsed is None or value > elapsed + slack):
                yield Finding(
                    code="active_exceeds_elapsed",
                    record_index=index,
                    message=f"cycles.{name} is {value}, more than cycles.elapsed {elapsed}",
                )
                break


def elapsed_within_clock(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """SM-cycles elapsed stay under SM count x maximum clock x time."""
    for index, record in _usage(batch):
        row = table.find(record.device.name, record.device.pci_device_id)
        if row is None or record.cycles.elapsed is None:
            continue
        sms = max(row.sm_count, record.device.sm_count or 0)
        time_ms = record.gpu_time_ms + EDGE_TOLERANCE_MS
        limit = sms * row.max_sm_clock_mhz * HZ_PER_MHZ * time_ms // MS_PER_SECOND
        limit += limit * CLOCK_TOLERANCE_PER_MILLE // 1000
        if record.cycles.elapsed > limit:
            yield Finding(
                code="elapsed_exceeds_clock",
                record_index=index,
                message=f"cycles.elapsed is {record.cycles.elapsed}, above {limit} which "
                f"{row.key} reaches in {record.gpu_time_ms} ms",
            )


def energy_within_power(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Energy stays under the power limit x time."""
    for index, record in _usage(batch):
        row = table.find(record.device.name, record.device.pci_device_id)
        if row is None or record.energy_mj is None:
            continue
        limit = row.power_limit_watts * (record.gpu_time_ms + EDGE_TOLERANCE_MS)
        limit += limit * POWER_TOLERANCE_PER_MILLE // 1000
        if record.energy_mj > limit:
            yield Finding(
                code="energy_exceeds_power",
                record_index=index,
                message=f"energy_mj is {record.energy_mj}, above {limit} which "
                f"{row.key} can draw in {record.gpu_time_ms} ms",
            )


def gpu_time_tiles_window(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Over the owners of a device, `gpu_time_ms` sums exactly to the measurement window."""
    del table
    shares: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, record in _usage(batch):
        shares[record.device.key, record.start_boot_ms, record.end_boot_ms].append(index)
    for (device, start, end), indexes in shares.items():
        found = sum(_gpu_time(batch, index) for index in indexes)
        if found != end - start:
            for index in indexes:
                yield Finding(
                    code="gpu_time_does_not_tile",
                    record_index=index,
                    message=f"gpu_time_ms of {device} sums to {found} over a window of "
                    f"{end - start} ms",
                )


def windows_do_not_overlap(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """One device's measurement windows in a batch follow each other."""
    del table
    windows: dict[str, set[tuple[int, int]]] = defaultdict(set)
    members: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, record in _usage(batch):
        window = (record.start_boot_ms, record.end_boot_ms)
        windows[record.device.key].add(window)
        members[record.device.key, *window].append(index)
    for device, spans in windows.items():
        ordered = sorted(spans)
        for (start, end), (next_start, next_end) in pairwise(ordered):
            if next_start < end:
                for index in members[device, next_start, next_end]:
                    yield Finding(
                        code="windows_overlap",
                        record_index=index,
                        message=f"window {next_start}..{next_end} of {device} overlaps "
                        f"{start}..{end}",
                    )


def only_agents_meter(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Metered records come from agents, people's entries from the collector."""
    del table
    for index, record in enumerate(batch.records):
        metered = isinstance(record, (UsageRecord, GapRecord))
        if metered != (batch.header.author == "agent"):
            yield Finding(
                code="wrong_author",
                record_index=index,
                message=f"a {type(record).__name__} in a batch whose author is "
                f"{batch.header.author}",
            )


CHECKS: Final[tuple[Callable[[SealedBatch, AcceleratorTable], Iterator[Finding]], ...]] = (
    only_agents_meter,
    active_within_elapsed,
    elapsed_within_clock,
    energy_within_power,
    gpu_time_tiles_window,
    windows_do_not_overlap,
)


def findings(batch: SealedBatch, table: AcceleratorTable) -> tuple[Finding, ...]:
    """Everything the checks find, in their order."""
    return tuple(finding for check in CHECKS for finding in check(batch, table))


def _usage(batch: SealedBatch) -> Iterator[tuple[int, UsageRecord]]:
    for index, record in enumerate(batch.records):
        if isinstance(record, UsageRecord):
            yield index, record


def _gpu_time(batch: SealedBatch, index: int) -> int:
    record = batch.records[index]
    return record.gpu_time_ms if isinstance(record, UsageRecord) else 0
