"""Checks on raw quantities: what no honest device could have reported.

An ordered list of pure functions, each from a batch to findings. A finding never refuses a batch
(only undecodable or unauthenticated bytes are refused); it marks a record disputed, which takes
it out of central and low and keeps it in high until a later entry resolves it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.accelerators import POWER_TOLERANCE_PER_MILLE
from flopledger_core.energy import HOST_POWER_LIMIT_WATTS
from flopledger_core.flop import FLOP_MODEL_VERSION, estimate
from flopledger_core.records import Device, GapRecord, HostRecord, UsageRecord
from flopledger_core.units import US_PER_MS, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flopledger_core.accelerators import Accelerator, AcceleratorTable
    from flopledger_core.batch import SealedBatch

# A window's edges are instants of sampling; counters are read some time around them. A window
# shorter than this is allowed as much again, but never less than the counters' own steps: GPM and
# the energy counter move every 100 ms, so a window of one millisecond may show two such steps.
EDGE_TOLERANCE_MS: Final = 1_000
COUNTER_STEPS_MS: Final = 200
# Findings that tell of a mistake in what the agent said beside its counters, which stay good.
NOTED_CODES: Final = frozenset({"estimate_differs"})


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a batch or one of its records."""

    code: str
    record_index: int | None  # None: the whole batch
    message: str


def active_within_elapsed(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """No pipe is active in more SM-cycles than elapsed.

    Shares of a split device are rounded each for itself, one SM-cycle per owner at most; both
    counters may be off by what the record says they may.
    """
    del table
    for index, record in _usage(batch):
        elapsed = record.cycles.elapsed
        slack = record.attribution.sharers - 1 + 2 * record.uncertain_cycles
        for name, value in record.cycles.as_dict().items():
            if value is not None and (elapsed is None or value > elapsed + slack):
                yield Finding(
                    code="active_exceeds_elapsed",
                    record_index=index,
                    message=f"cycles.{name} is {value}, more than cycles.elapsed {elapsed}",
                )
                break


def elapsed_within_clock(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """A device's SM-cycles elapsed stay under SM count x maximum clock x window.

    A GPU instance has its own SMs; a model the table lacks has at most those of its architecture.
    """
    for window in _windows(batch):
        row = _row(window.device, table)
        if row is None:
            continue
        found = sum(record.cycles.elapsed or 0 for record in window.records)
        time_ms = window.length_ms + _edge_ms(window)
        limit = row.most_sm_cycles_per_us * US_PER_MS * time_ms
        slices, own_sms = window.device.slices, window.device.sm_count
        if slices is not None and slices.sms_of is not None and own_sms is not None:
            limit = min(limit, ceil_div(limit * own_sms, slices.sms_of))
        limit += sum(record.uncertain_cycles for record in window.records)
        if found > limit:
            yield from window.findings(
                "elapsed_exceeds_clock",
                f"cycles.elapsed sums to {found}, above {limit} which {row.key} reaches in "
                f"{window.length_ms} ms",
            )


def energy_within_power(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """A device's energy stays under the power limit x window, of a part under its slices' part."""
    for window in _windows(batch):
        row = _row(window.device, table)
        if row is None:
            continue
        found = sum(record.energy_mj or 0 for record in window.records)
        # Of a superchip whose counter's scope nobody confirmed, the module's limit is the limit.
        limit = row.max_power_watts * (window.length_ms + _edge_ms(window))
        slices = window.device.slices
        if slices is not None:
            limit = ceil_div(limit * slices.count, slices.of_count) + slices.of_count
        limit += limit * POWER_TOLERANCE_PER_MILLE // 1000
        if found > limit:
            yield from window.findings(
                "energy_exceeds_power",
                f"energy_mj sums to {found}, above {limit} which {row.key} can draw in "
                f"{window.length_ms} ms",
            )


def gpu_time_tiles_window(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Over the owners of a device, `gpu_time_ms` sums exactly to its part of the window.

    The part of a GPU instance is cut at absolute instants, so that all parts tile the GPU's time.
    """
    del table
    for window in _windows(batch):
        found = sum(record.gpu_time_ms for record in window.records)
        slices, expected = window.device.slices, window.length_ms
        if slices is not None:
            expected = slices.part(window.end_ms) - slices.part(window.start_ms)
        if found != expected:
            yield from window.findings(
                "gpu_time_does_not_tile",
                f"gpu_time_ms of {window.device.key} sums to {found} over a window of "
                f"{window.length_ms} ms, of which {expected} ms are the device's",
            )


def times_within_window(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Wall time and allocated time of one device are no longer than the window."""
    del table
    for index, record in _usage(batch):
        for name, value in (
            ("wall_time_ms", record.wall_time_ms),
            ("allocated_time_ms", record.allocated_time_ms or 0),
        ):
            if value > record.window_ms:
                yield Finding(
                    code="time_exceeds_window",
                    record_index=index,
                    message=f"{name} is {value} in a window of {record.window_ms} ms",
                )


def windows_do_not_overlap(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Measurement windows and gaps in a batch follow each other: one device's, and the node's."""
    del table
    spans: dict[str, list[tuple[int, int, tuple[int, ...]]]] = defaultdict(list)
    for window in _windows(batch):
        spans[window.device.key].append((window.start_ms, window.end_ms, window.indexes))
    for index, record in enumerate(batch.records):
        if isinstance(record, GapRecord) and record.start_boot_ms is not None:
            span = (record.start_boot_ms, record.start_boot_ms + record.gap_ms, (index,))
            spans[record.device.key].append(span)
    for host in _host_windows(batch):
        if host.start_ms is not None:
            spans["the node"].append((host.start_ms, host.start_ms + host.length_ms, host.indexes))
    for device, found in spans.items():
        reached = 0
        for start, end, indexes in sorted(found):
            if start < reached:
                for index in indexes:
                    yield Finding(
                        code="windows_overlap",
                        record_index=index,
                        message=f"{start}..{end} of {device} overlaps time up to {reached}",
                    )
            reached = max(reached, end)


def only_agents_meter(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Metered records come from agents, people's entries from the collector."""
    del table
    for index, record in enumerate(batch.records):
        metered = isinstance(record, (UsageRecord, GapRecord, HostRecord))
        if metered != (batch.header.author == "agent"):
            yield Finding(
                code="wrong_author",
                record_index=index,
                message=f"a {type(record).__name__} in a batch whose author is "
                f"{batch.header.author}",
            )


def cpu_time_tiles_window(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Over the owners of a node, `idle` among them, CPU time sums to CPUs x window."""
    del table
    for window in _host_windows(batch):
        times = [record.cpu_time_ms for record in window.records]
        if all(time_ms is None for time_ms in times):
            continue
        found = sum(time_ms or 0 for time_ms in times)
        expected = window.records[0].cpu_count * window.length_ms
        counts = {record.cpu_count for record in window.records}
        if found != expected or len(counts) > 1:
            yield from window.findings(
                "cpu_time_does_not_tile",
                f"cpu_time_ms sums to {found} over {window.length_ms} ms of "
                f"{' or '.join(map(str, sorted(counts)))} CPUs, which have {expected}",
            )


def host_energy_within_power(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """Energy of each boundary of a node stays under what no node draws."""
    del table
    for window in _host_windows(batch):
        edge_ms = min(EDGE_TOLERANCE_MS, window.length_ms)
        for boundary, watts in HOST_POWER_LIMIT_WATTS.items():
            found = sum(record.energy_mj.get(boundary, 0) for record in window.records)
            limit = watts * (window.length_ms + edge_ms)
            if found > limit:
                yield from window.findings(
                    "host_energy_exceeds_power",
                    f"energy_mj.{boundary} sums to {found}, above {limit} which no node draws in "
                    f"{window.length_ms} ms",
                )


def estimate_is_ours(batch: SealedBatch, table: AcceleratorTable) -> Iterator[Finding]:
    """A first estimate is what the same model and table make of the same counters here.

    One of another version is left alone: it can only be shown. Counters are not disputed by it.
    """
    for index, record in _usage(batch):
        given = record.estimate
        if given is None or given.model_version != FLOP_MODEL_VERSION:
            continue
        if given.table_version != table.version:
            continue
        own = estimate(record, table)
        if given != own:
            found = "nothing" if own is None else f"{own.flop_central} FLOP"
            yield Finding(
                code="estimate_differs",
                record_index=index,
                message=f"estimate.flop_central is {given.flop_central}, where model "
                f"{given.model_version} and table {given.table_version} give {found} within "
                f"{'no' if own is None else f'{own.flop_low} to {own.flop_high}'} bounds",
            )


CHECKS: Final[tuple[Callable[[SealedBatch, AcceleratorTable], Iterator[Finding]], ...]] = (
    only_agents_meter,
    active_within_elapsed,
    elapsed_within_clock,
    energy_within_power,
    gpu_time_tiles_window,
    times_within_window,
    windows_do_not_overlap,
    cpu_time_tiles_window,
    host_energy_within_power,
    estimate_is_ours,
)


def findings(batch: SealedBatch, table: AcceleratorTable) -> tuple[Finding, ...]:
    """Everything the checks find, in their order."""
    return tuple(finding for check in CHECKS for finding in check(batch, table))


class _Window(msgspec.Struct, frozen=True, kw_only=True):
    """Every owner's record of one device and measurement window."""

    device: Device
    start_ms: int
    end_ms: int
    indexes: tuple[int, ...]
    records: tuple[UsageRecord, ...]

    @property
    def length_ms(self) -> int:
        return self.end_ms - self.start_ms

    def findings(self, code: str, message: str) -> Iterator[Finding]:
        for index in self.indexes:
            yield Finding(code=code, record_index=index, message=message)


def _windows(batch: SealedBatch) -> list[_Window]:
    members: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for index, record in _usage(batch):
        members[record.device.key, record.start_boot_ms, record.end_boot_ms].append(index)
    windows: list[_Window] = []
    for (_, start_ms, end_ms), indexes in members.items():
        records = [batch.records[index] for index in indexes]
        usage = tuple(record for record in records if isinstance(record, UsageRecord))
        windows.append(
            _Window(
                device=usage[0].device,
                start_ms=start_ms,
                end_ms=end_ms,
                indexes=tuple(indexes),
                records=usage,
            )
        )
    return windows


class _HostWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Every owner's record of the node in one measurement window."""

    start_ms: int | None  # None: it began in an earlier boot
    length_ms: int
    indexes: tuple[int, ...]
    records: tuple[HostRecord, ...]

    def findings(self, code: str, message: str) -> Iterator[Finding]:
        for index in self.indexes:
            yield Finding(code=code, record_index=index, message=message)


def _host_windows(batch: SealedBatch) -> list[_HostWindow]:
    members: dict[tuple[int | None, int, int], list[tuple[int, HostRecord]]] = defaultdict(list)
    for index, record in enumerate(batch.records):
        if isinstance(record, HostRecord):
            # An earlier boot's window is told apart by wall time, which nothing else goes by.
            wall_ms = record.start_unix_ms if record.start_boot_ms is None else 0
            members[record.start_boot_ms, wall_ms, record.window_ms].append((index, record))
    return [
        _HostWindow(
            start_ms=start_ms,
            length_ms=length_ms,
            indexes=tuple(index for index, _ in found),
            records=tuple(record for _, record in found),
        )
        for (start_ms, _, length_ms), found in members.items()
    ]


def _row(device: Device, table: AcceleratorTable) -> Accelerator | None:
    """The limits of a device: its row, or the stand-in of its architecture."""
    known = table.resolve(device.name, device.pci_device_id, device.compute_capability)
    return None if known is None else known.accelerator


def _edge_ms(window: _Window) -> int:
    """The tolerance at a window's edges: none where there is no time at all, once per window."""
    if not window.length_ms:
        return 0
    return max(COUNTER_STEPS_MS, min(EDGE_TOLERANCE_MS, window.length_ms))


def _usage(batch: SealedBatch) -> Iterator[tuple[int, UsageRecord]]:
    for index, record in enumerate(batch.records):
        if isinstance(record, UsageRecord):
            yield index, record
