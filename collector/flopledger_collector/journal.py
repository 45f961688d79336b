"""The journal: the ledger's only truth, append-only, one row per admitted batch, bytes verbatim.

This module says what the rules of admission need to know of it and what they may ask it to write;
`store/journal_rows.py` is the SQL behind it. A row is never changed or removed: the database
itself refuses that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

import msgspec

from flopledger_core.records import GapRecord, HostRecord, UsageRecord
from flopledger_core.validation import NOTED_CODES, Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flopledger_core.batch import BatchHeader
    from flopledger_core.records import Record

KeyState = Literal["trusted", "revoked"]
KeyHow = Literal["config", "first_use", "collector"]

# Findings that are worth showing but take nothing out of a total.
INFORMATIVE_CODES: Final = frozenset({"clock_skew"}) | NOTED_CODES
# Records that their author may not write at all: kept and listed, but nothing is folded from them.
EXCLUDING_CODES: Final = frozenset({"wrong_author"})
HOST_KEY: Final = "host"  # stands for the node itself where a stream's devices are named


class LedgerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which ledger this is: the one row written when it was founded."""

    ledger_id: str
    created_unix_ms: int
    simulated: bool  # a demonstration: simulated batches are clear in it


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """A stream as far as it is journaled."""

    stream_id: str
    fingerprint: str  # of the only key that may write it
    node: str
    cluster: str | None
    author: str
    simulated: bool
    head_sequence: int
    head_hash: str
    last_received_unix_ms: int
    last_window_end_unix_ms: int

    @classmethod
    def after(
        cls, header: BatchHeader, fingerprint: str, batch_hash: str, received_unix_ms: int
    ) -> StreamState:
        """The stream once this batch is journaled."""
        return cls(
            stream_id=header.stream_id,
            fingerprint=fingerprint,
            node=header.node,
            cluster=header.cluster,
            author=header.author,
            simulated=header.simulated,
            head_sequence=header.sequence,
            head_hash=batch_hash,
            last_received_unix_ms=received_unix_ms,
            last_window_end_unix_ms=header.window_end_unix_ms,
        )


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A public key the collector has decided about."""

    fingerprint: str
    public_key: str
    node: str | None
    state: KeyState
    added_unix_ms: int
    how: KeyHow


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted batch."""

    stream_id: str
    sequence: int
    batch_hash: str
    content: bytes
    received_unix_ms: int
    findings: tuple[Finding, ...]


class DeviceSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time in which a record says its stream metered a device."""

    device_key: str
    start_unix_ms: int
    end_unix_ms: int
    record_index: int


class DeviceLease(msgspec.Struct, frozen=True, kw_only=True):
    """The hull of all wall time a stream metered a device without any finding."""

    device_key: str
    stream_id: str
    first_start_unix_ms: int
    last_end_unix_ms: int

    def widened(self, span: DeviceSpan) -> DeviceLease:
        """The hull with one more span in it; independent of the order spans come in."""
        return DeviceLease(
            device_key=self.device_key,
            stream_id=self.stream_id,
            first_start_unix_ms=min(self.first_start_unix_ms, span.start_unix_ms),
            last_end_unix_ms=max(self.last_end_unix_ms, span.end_unix_ms),
        )


class BootSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A record's place in its node's boot time; without a start, the boot before was another."""

    device_key: str
    start_unix_ms: int
    start_boot_ms: int | None
    end_boot_ms: int
    record_index: int


class DeviceReach(msgspec.Struct, frozen=True, kw_only=True):
    """How far in a boot a stream has accounted for a device: no later record starts before."""

    stream_id: str
    device_key: str
    boot_id: str
    end_boot_ms: int


_SpanType = TypeVar("_SpanType", DeviceSpan, BootSpan)


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal or conflict worth keeping; the same one is kept once."""

    at_unix_ms: int
    code: str
    stream_id: str
    sequence: int
    batch_hash: str
    message: str


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one transaction writes."""

    entries: Sequence[JournalEntry] = ()
    streams: Sequence[StreamState] = ()  # the state after the transaction, each stream once
    keys: Sequence[KeyEntry] = ()  # new ones only
    leases: Sequence[DeviceLease] = ()  # the state after the transaction, each pair once
    reaches: Sequence[DeviceReach] = ()  # the state after the transaction, each triple once
    audits: Sequence[AuditEntry] = ()


class Journal(Protocol):
    """What admission asks of the database, inside one writing transaction."""

    def streams(self, stream_ids: Iterable[str]) -> Mapping[str, StreamState]:
        """Those of the streams that exist."""
        ...

    def keys(self, fingerprints: Iterable[str]) -> Mapping[str, KeyEntry]:
        """Those of the keys that were decided about."""
        ...

    def batch_hash(self, stream_id: str, sequence: int) -> str | None:
        """The hash journaled at a place; None where nothing is."""
        ...

    def leases(self, device_keys: Iterable[str]) -> Sequence[DeviceLease]:
        """Every lease of these devices."""
        ...

    def reaches(self, stream_ids: Iterable[str], boot_ids: Iterable[str]) -> Sequence[DeviceReach]:
        """How far these streams have come in these boots, by device."""
        ...

    def write(self, changes: Changes) -> None:
        """Write all of it, or raise and leave the transaction to be rolled back."""
        ...


def spans(records: Sequence[Record], *, node: str, boot_id: str) -> tuple[DeviceSpan, ...]:
    """The wall time of a device, or of the node itself, that records claim to have metered.

    A GPU is one device to every stream, however it is partitioned. A node is known by its name
    and its boot: two machines may share a name, and one machine may be told of as several.
    """
    found: list[DeviceSpan] = []
    for index, record in enumerate(records):
        if isinstance(record, UsageRecord):
            key = record.device.uuid
        elif isinstance(record, HostRecord):
            key = f"{HOST_KEY}/{node}/{boot_id}"
        else:
            continue
        found.append(
            DeviceSpan(
                device_key=key,
                start_unix_ms=record.start_unix_ms,
                end_unix_ms=record.end_unix_ms,
                record_index=index,
            )
        )
    return tuple(found)


def boot_spans(records: Sequence[Record]) -> tuple[BootSpan, ...]:
    """The boot time that usage, gap and host records cover, in the order they were sealed."""
    found: list[BootSpan] = []
    for index, record in enumerate(records):
        if isinstance(record, UsageRecord):
            key, length_ms = record.device.key, record.window_ms
        elif isinstance(record, GapRecord):
            key, length_ms = record.device.key, record.gap_ms
        elif isinstance(record, HostRecord):
            key, length_ms = HOST_KEY, record.window_ms
        else:
            continue
        found.append(
            BootSpan(
                device_key=key,
                start_unix_ms=record.start_unix_ms,
                start_boot_ms=record.start_boot_ms,
                end_boot_ms=(record.start_boot_ms or 0) + length_ms,
                record_index=index,
            )
        )
    return tuple(found)


def excluded_indexes(findings: Iterable[Finding]) -> frozenset[int]:
    """Which records of a batch count nowhere, not even as disputed."""
    return frozenset(
        finding.record_index
        for finding in findings
        if finding.code in EXCLUDING_CODES and finding.record_index is not None
    )


class Reaches:
    """Reaches as a run of batches moves them; each stream's batches come in order.

    A gap without a boot time says that the boot before it was another one: windows of that boot
    may have been sealed under the new boot's id, so the device begins again behind it.
    """

    def __init__(self, known: Iterable[DeviceReach] = ()) -> None:
        self._ends = {(r.stream_id, r.device_key, r.boot_id): r.end_boot_ms for r in known}
        self._moved: set[tuple[str, str, str]] = set()

    def repeated(
        self, stream_id: str, boot_id: str, claimed: Iterable[BootSpan]
    ) -> list[tuple[BootSpan, int]]:
        """Spans that start before what earlier batches reached, and where that was."""
        ends: dict[str, int] = {}
        found: list[tuple[BootSpan, int]] = []
        for span in claimed:
            key = span.device_key
            if span.start_boot_ms is None:
                ends[key] = 0
                continue
            reached = ends.setdefault(key, self._ends.get((stream_id, key, boot_id), 0))
            if span.start_boot_ms < reached:
                found.append((span, reached))
        return found

    def take(
        self,
        stream_id: str,
        boot_id: str,
        claimed: Sequence[BootSpan],
        findings: Sequence[Finding],
    ) -> None:
        """Move on by a batch's spans, without the disputed ones."""
        for span in unquestioned(claimed, findings):
            place = (stream_id, span.device_key, boot_id)
            if span.start_boot_ms is None:
                self._ends[place] = 0
            else:
                self._ends[place] = max(self._ends.get(place, 0), span.end_boot_ms)
            self._moved.add(place)

    def moved(self) -> list[DeviceReach]:
        """Every reach that a batch moved, as it is now."""
        return [
            DeviceReach(
                stream_id=stream_id,
                device_key=device_key,
                boot_id=boot_id,
                end_boot_ms=self._ends[stream_id, device_key, boot_id],
            )
            for stream_id, device_key, boot_id in sorted(self._moved)
        ]


def disputed_indexes(findings: Iterable[Finding], record_count: int) -> frozenset[int]:
    """Which records of a batch the findings dispute; a finding on the batch disputes them all."""
    indexes: set[int] = set()
    for finding in findings:
        if finding.code in INFORMATIVE_CODES:
            continue
        if finding.record_index is None:
            return frozenset(range(record_count))
        indexes.add(finding.record_index)
    return frozenset(indexes)


def unquestioned(
    claimed: Sequence[_SpanType], findings: Sequence[Finding]
) -> tuple[_SpanType, ...]:
    """Spans of records that no finding disputes; a skewed clock disputes none."""
    disputing = [finding for finding in findings if finding.code not in INFORMATIVE_CODES]
    if any(finding.record_index is None for finding in disputing):
        return ()
    questioned = {finding.record_index for finding in disputing}
    return tuple(span for span in claimed if span.record_index not in questioned)
