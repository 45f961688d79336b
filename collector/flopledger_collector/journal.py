"""The journal: the ledger's only truth, append-only, one row per admitted batch, bytes verbatim.

This module says what the rules of admission need to know of it and what they may ask it to write;
`store/journal_rows.py` is the SQL behind it. A row is never changed or removed: the database
itself refuses that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from flopledger_core.records import UsageRecord
from flopledger_core.validation import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flopledger_core.batch import BatchHeader
    from flopledger_core.records import Record

KeyState = Literal["trusted", "revoked"]
KeyHow = Literal["config", "first_use", "collector"]

# Findings that are worth showing but take nothing out of a total.
INFORMATIVE_CODES: Final = frozenset({"clock_skew"})


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

    def write(self, changes: Changes) -> None:
        """Write all of it, or raise and leave the transaction to be rolled back."""
        ...


def spans(records: Sequence[Record]) -> tuple[DeviceSpan, ...]:
    """The device time that usage records claim."""
    return tuple(
        DeviceSpan(
            device_key=record.device.key,
            start_unix_ms=record.start_unix_ms,
            end_unix_ms=record.end_unix_ms,
            record_index=index,
        )
        for index, record in enumerate(records)
        if isinstance(record, UsageRecord)
    )


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


def unquestioned_spans(
    claimed: Sequence[DeviceSpan], findings: Sequence[Finding]
) -> tuple[DeviceSpan, ...]:
    """Spans that may hold a lease: those without any finding, skewed clocks included."""
    if not findings:
        return tuple(claimed)
    if any(finding.record_index is None for finding in findings):
        return ()
    questioned = {finding.record_index for finding in findings}
    return tuple(span for span in claimed if span.record_index not in questioned)
