"""Admission: which batches enter the journal. Pure rules; the database is a port.

Two steps. `inspect` needs no ledger: it cuts a request apart, decodes, checks signatures and raw
quantities; it runs wherever there is a free core. `Admission` needs the ledger's state: trust,
order, links, leases; it runs inside one writing transaction and says what to write. A batch that
is authentic, in order and linked is always journaled; what is impossible in it is found and
disputed, never refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_collector.errors import RequestRefused
from flopledger_collector.journal import (
    AuditEntry,
    BootSpan,
    Changes,
    DeviceLease,
    DeviceSpan,
    JournalEntry,
    KeyEntry,
    Reaches,
    StreamState,
    boot_spans,
    spans,
    unquestioned,
)
from flopledger_core.batch import BatchHeader, batch_hash, decode, split_batches
from flopledger_core.errors import FlopLedgerError, InvalidInput, shown
from flopledger_core.signing import fingerprint, verify
from flopledger_core.validation import Finding, findings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flopledger_collector.journal import Journal
    from flopledger_core.accelerators import AcceleratorTable

REQUEST_BYTES_MAX: Final = 64 * 1024 * 1024  # a relay's bundle of some ten thousand node-minutes
BATCHES_PER_REQUEST_MAX: Final = 1024  # more would hold one transaction open for too long
CLOCK_SKEW_TOLERANCE_MS: Final = 10_000  # NTP-less nodes drift by less in days
FUTURE_TOLERANCE_MS: Final = 86_400_000  # a wrong time zone is no further off; no work begins later
LEASE_TOLERANCE_MS: Final = 1_000  # wall time may step by this much where two streams meet

Outcome = Literal["admitted", "duplicate", "conflict", "out_of_order", "refused"]
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "admitted", "duplicate", "conflict", "out_of_order", "refused",
)  # fmt: skip


class IngestRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of one request, and whether it came over this machine's loopback."""

    content: bytes
    peer_is_loopback: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one batch. The first three are None where the header could not be read."""

    stream_id: str | None
    sequence: int | None
    batch_hash: str | None
    outcome: Outcome
    expected_sequence: int | None = None  # what the stream continues with, where that helps
    message: str = ""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An authentic batch, reduced to what admission needs of it."""

    header: BatchHeader
    batch_hash: str
    fingerprint: str
    content: bytes
    findings: tuple[Finding, ...]
    spans: tuple[DeviceSpan, ...]
    boot_spans: tuple[BootSpan, ...]
    peer_is_loopback: bool


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What this ledger admits."""

    ledger_id: str
    simulated: bool  # a demonstration's ledger: simulated batches are clear in it
    first_use: bool  # an unknown key from loopback is trusted


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """What one transaction answers and writes."""

    answers: tuple[Answer, ...]
    changes: Changes


# --- step one: without a ledger -------------------------------------------------------------------


def inspect(request: IngestRequest, table: AcceleratorTable) -> tuple[Candidate | Answer, ...]:
    """Each batch of a request as a candidate, or as its refusal.

    Raises `RequestRefused` when the request as a whole is out of bounds.
    """
    if not request.content:
        raise RequestRefused("malformed", "body", "", "send at least one batch")
    if len(request.content) > REQUEST_BYTES_MAX:
        raise RequestRefused(
            "too_large",
            "body",
            f"{len(request.content)} bytes",
            f"send at most {REQUEST_BYTES_MAX}",
        )
    found: list[Candidate | Answer] = []
    for content in _parts(request.content):
        if isinstance(content, Answer):
            found.append(content)
        elif len(found) == BATCHES_PER_REQUEST_MAX:
            raise RequestRefused(
                "too_large",
                "batches",
                f"more than {BATCHES_PER_REQUEST_MAX}",
                f"send at most {BATCHES_PER_REQUEST_MAX} a request",
            )
        else:
            found.append(_candidate(content, request.peer_is_loopback, table))
    return tuple(found)


def _parts(content: bytes) -> Iterator[bytes | Answer]:
    """The batches of a body; where one cannot be cut off, a refusal ends them."""
    batches = split_batches(content)
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except InvalidInput as error:
            yield _refused(None, None, str(error))
            return


def _candidate(
    content: bytes,
    peer_is_loopback: bool,  # noqa: FBT001
    table: AcceleratorTable,
) -> Candidate | Answer:
    try:
        batch = decode(content)
    except InvalidInput as error:
        header_bytes = content.partition(b"\n")[0]  # the cut has read it already
        header = msgspec.json.decode(header_bytes, type=BatchHeader)
        return _refused(header, batch_hash(header_bytes), str(error))
    header = batch.header
    try:
        verify(header.public_key, batch.signature, batch.header_bytes)
        name = fingerprint(header.public_key)
    except FlopLedgerError as error:
        return _refused(header, batch.hash, str(error))
    return Candidate(
        header=header,
        batch_hash=batch.hash,
        fingerprint=name,
        content=content,
        findings=findings(batch, table),
        spans=spans(batch.records, node=header.node, boot_id=header.boot_id),
        boot_spans=boot_spans(batch.records),
        peer_is_loopback=peer_is_loopback,
    )


def _refused(header: BatchHeader | None, hash_: str | None, message: str) -> Answer:
    return Answer(
        stream_id=None if header is None else header.stream_id,
        sequence=None if header is None else header.sequence,
        batch_hash=hash_,
        outcome="refused",
        message=message,
    )


# --- step two: against the ledger -----------------------------------------------------------------


def admit(
    candidates: Sequence[Candidate], journal: Journal, rules: Rules, *, now_unix_ms: int
) -> Admitted:
    """Decide about candidates in order, as one transaction; nothing is written yet."""
    admission = Admission(candidates, journal, rules, now_unix_ms=now_unix_ms)
    answers = tuple(admission.consider(candidate) for candidate in candidates)
    return Admitted(answers=answers, changes=admission.changes())


class Admission:
    """The ledger's state as one transaction sees and moves it."""

    def __init__(
        self, candidates: Sequence[Candidate], journal: Journal, rules: Rules, *, now_unix_ms: int
    ) -> None:
        self._journal = journal
        self._rules = rules
        self._now_unix_ms = now_unix_ms
        self._streams = dict(journal.streams({c.header.stream_id for c in candidates}))
        self._keys = dict(journal.keys({c.fingerprint for c in candidates}))
        self._leases: dict[str, dict[str, DeviceLease]] = {}
        devices = {span.device_key for c in candidates for span in c.spans}
        for lease in journal.leases(devices):
            self._leases.setdefault(lease.device_key, {})[lease.stream_id] = lease
        self._reaches = Reaches(
            journal.reaches(
                {c.header.stream_id for c in candidates}, {c.header.boot_id for c in candidates}
            )
        )
        self._entries: dict[tuple[str, int], JournalEntry] = {}
        self._moved_streams: set[str] = set()
        self._new_keys: list[KeyEntry] = []
        self._moved_leases: set[tuple[str, str]] = set()
        self._audits: list[AuditEntry] = []

    def changes(self) -> Changes:
        """Everything that was decided so far."""
        return Changes(
            entries=tuple(self._entries.values()),
            streams=tuple(self._streams[stream_id] for stream_id in sorted(self._moved_streams)),
            keys=tuple(self._new_keys),
            leases=tuple(
                self._leases[device_key][stream_id]
                for device_key, stream_id in sorted(self._moved_leases)
            ),
            reaches=tuple(self._reaches.moved()),
            audits=tuple(self._audits),
        )

    def consider(self, candidate: Candidate) -> Answer:
        """Decide about one candidate, and move the state if it is admitted."""
        refusal = self._untrusted(candidate) or self._misdirected(candidate)
        if refusal is not None:
            return _refused(candidate.header, candidate.batch_hash, refusal)
        misplaced = self._misplaced(candidate)
        if misplaced is not None:
            return misplaced
        self._append(candidate)
        return self._answer(candidate, "admitted", "")

    # --- who may write, and where ---

    def _untrusted(self, candidate: Candidate) -> str | None:
        key = self._keys.get(candidate.fingerprint)
        public_key = candidate.header.public_key
        if key is not None and key.state == "revoked":
            return f"header.public_key is {public_key}: this key was revoked; enroll a new one"
        if key is None and not (self._rules.first_use and candidate.peer_is_loopback):
            return (
                f"header.public_key is {public_key}: this collector does not trust it; "
                "add it to [trust] keys"
            )
        if candidate.header.author == "collector" and (key is None or key.how != "collector"):
            return (
                "header.author is 'collector': only the collector's own key signs people's entries"
            )
        if key is None and candidate.header.ledger_id in {None, self._rules.ledger_id}:
            entry = KeyEntry(
                fingerprint=candidate.fingerprint,
                public_key=public_key,
                node=candidate.header.node,
                state="trusted",
                added_unix_ms=self._now_unix_ms,
                how="first_use",
            )
            self._keys[candidate.fingerprint] = entry
            self._new_keys.append(entry)
        return None

    def _misdirected(self, candidate: Candidate) -> str | None:
        header = candidate.header
        if header.ledger_id not in {None, self._rules.ledger_id}:
            message = (
                f"header.ledger_id is {shown(header.ledger_id)}: this collector keeps ledger "
                f"{self._rules.ledger_id}; send the batch to its own"
            )
            self._audit(candidate, "other_ledger", message)
            return message
        stream = self._streams.get(header.stream_id)
        if stream is not None and stream.fingerprint != candidate.fingerprint:
            message = (
                f"header.stream_id is {header.stream_id}: it belongs to another key; begin a new "
                "stream"
            )
            self._audit(candidate, "foreign_stream", message)
            return message
        return None

    # --- order and links ---

    def _misplaced(self, candidate: Candidate) -> Answer | None:
        header = candidate.header
        stream = self._streams.get(header.stream_id)
        expected = 0 if stream is None else stream.head_sequence + 1
        if header.sequence > expected:
            message = f"header.sequence is {header.sequence}: the stream continues with {expected}"
            return self._answer(candidate, "out_of_order", message, expected)
        if header.sequence < expected:
            return self._repeated(candidate, expected)
        if stream is not None and header.previous_hash != stream.head_hash:
            message = (
                f"header.previous_hash is {header.previous_hash}: the journal's head is "
                f"{stream.head_hash}; another writer may use this stream's key"
            )
            self._audit(candidate, "wrong_link", message)
            return self._answer(candidate, "conflict", message, expected)
        return None

    def _repeated(self, candidate: Candidate, expected: int) -> Answer:
        header = candidate.header
        place = (header.stream_id, header.sequence)
        pending = self._entries.get(place)
        known = pending.batch_hash if pending is not None else self._journal.batch_hash(*place)
        if known == candidate.batch_hash:
            return self._answer(candidate, "duplicate", "journaled already", expected)
        message = (
            f"header.sequence is {header.sequence}: the journal holds batch {known} there, not "
            f"{candidate.batch_hash}; another writer may use this stream's key"
        )
        self._audit(candidate, "conflict", message)
        return self._answer(candidate, "conflict", message, expected)

    # --- what enters ---

    def _append(self, candidate: Candidate) -> None:
        header = candidate.header
        found = (*candidate.findings, *self._ledger_findings(candidate))
        self._entries[header.stream_id, header.sequence] = JournalEntry(
            stream_id=header.stream_id,
            sequence=header.sequence,
            batch_hash=candidate.batch_hash,
            content=candidate.content,
            received_unix_ms=self._now_unix_ms,
            findings=found,
        )
        self._streams[header.stream_id] = StreamState.after(
            header, candidate.fingerprint, candidate.batch_hash, self._now_unix_ms
        )
        self._moved_streams.add(header.stream_id)
        for span in unquestioned(candidate.spans, found):
            self._widen_lease(header.stream_id, span)
        self._reaches.take(header.stream_id, header.boot_id, candidate.boot_spans, found)

    def _ledger_findings(self, candidate: Candidate) -> Iterator[Finding]:
        header = candidate.header
        if header.simulated and not self._rules.simulated:
            yield Finding(
                code="simulated",
                record_index=None,
                message="header.simulated is true, and this ledger is no demonstration",
            )
        latest = max(header.sealed.unix_ms, header.window_end_unix_ms)
        ahead = latest - self._now_unix_ms
        if ahead > CLOCK_SKEW_TOLERANCE_MS:
            yield Finding(
                code="clock_skew",
                record_index=None,
                message=f"the node's clock is {ahead} ms ahead of the collector's",
            )
        yield from self._misdated(candidate)
        for span in candidate.spans:
            other = self._other_holder(header.stream_id, span)
            if other is not None:
                yield Finding(
                    code="device_in_two_streams",
                    record_index=span.record_index,
                    message=f"stream {other.stream_id} metered {span.device_key} from "
                    f"{other.first_start_unix_ms} to {other.last_end_unix_ms} already",
                )

    def _misdated(self, candidate: Candidate) -> Iterator[Finding]:
        """Records of time that is still to come, or that this stream metered in earlier batches."""
        header = candidate.header
        for span in candidate.boot_spans:
            ahead = span.start_unix_ms - self._now_unix_ms
            if ahead > FUTURE_TOLERANCE_MS:
                yield Finding(
                    code="from_the_future",
                    record_index=span.record_index,
                    message=f"start_unix_ms is {span.start_unix_ms}, {ahead} ms after it was "
                    "received",
                )
        for span, reached in self._reaches.repeated(
            header.stream_id, header.boot_id, candidate.boot_spans
        ):
            yield Finding(
                code="windows_overlap",
                record_index=span.record_index,
                message=f"{span.start_boot_ms}..{span.end_boot_ms} of {span.device_key} overlaps "
                f"time up to {reached} that earlier batches covered",
            )

    def _other_holder(self, stream_id: str, span: DeviceSpan) -> DeviceLease | None:
        tolerance = min(LEASE_TOLERANCE_MS, (span.end_unix_ms - span.start_unix_ms) // 2)
        for lease in self._leases.get(span.device_key, {}).values():
            overlap = min(span.end_unix_ms, lease.last_end_unix_ms) - max(
                span.start_unix_ms, lease.first_start_unix_ms
            )
            if lease.stream_id != stream_id and overlap > tolerance:
                return lease
        return None

    def _widen_lease(self, stream_id: str, span: DeviceSpan) -> None:
        leases = self._leases.setdefault(span.device_key, {})
        lease = leases.get(stream_id)
        if lease is None:
            lease = DeviceLease(
                device_key=span.device_key,
                stream_id=stream_id,
                first_start_unix_ms=span.start_unix_ms,
                last_end_unix_ms=span.end_unix_ms,
            )
        leases[stream_id] = lease.widened(span)
        self._moved_leases.add((span.device_key, stream_id))

    def _audit(self, candidate: Candidate, code: str, message: str) -> None:
        self._audits.append(
            AuditEntry(
                at_unix_ms=self._now_unix_ms,
                code=code,
                stream_id=candidate.header.stream_id,
                sequence=candidate.header.sequence,
                batch_hash=candidate.batch_hash,
                message=message,
            )
        )

    def _answer(
        self, candidate: Candidate, outcome: Outcome, message: str, expected: int | None = None
    ) -> Answer:
        return Answer(
            stream_id=candidate.header.stream_id,
            sequence=candidate.header.sequence,
            batch_hash=candidate.batch_hash,
            outcome=outcome,
            expected_sequence=expected,
            message=message,
        )
