"""People's entries: sealed, signed with the collector's key, journaled in one transaction.

A project's entries go to a stream of the project's own, everything else to the ledger's. They are
records like any other: never changed, superseded by later ones. A scheduler's record that was
imported before is answered as a duplicate and not posted again.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_collector.journal import Changes, JournalEntry, LedgerIdentity, StreamState
from flopledger_core import __version__
from flopledger_core.batch import (
    RECORDS_PER_BATCH_MAX,
    BatchHeader,
    ClockState,
    Predecessor,
    Salts,
    account_of,
    batch_hash,
    decode,
    make_leaves,
    make_manifest,
    merkle_root,
    seal,
)
from flopledger_core.errors import InvalidInput
from flopledger_core.records import ImportedHours, PersonRecord
from flopledger_core.signing import fingerprint
from flopledger_core.units import NS_PER_MS
from flopledger_core.validation import findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flopledger_collector.clocks import Clock
    from flopledger_collector.store.interface import Database
    from flopledger_collector.store.journal_rows import JournalRows
    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.records import Record
    from flopledger_core.signing import SigningKey

LEDGER_SCOPE: Final = ""  # entries that belong to no project
NODE: Final = "collector"
_SALT_BYTES: Final = 16


class PostedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where records were posted; for duplicates alone, where the first of them had been."""

    stream_id: str
    sequence: int
    batch_hash: str
    posted_records: int
    duplicates: tuple[str, ...] = ()  # import keys that had been posted before, equal in all terms
    differing: tuple[str, ...] = ()  # import keys posted before with other terms: the first stand

    @property
    def outcome(self) -> Literal["posted", "duplicate", "differing"]:
        """`duplicate` or `differing` when nothing new was posted."""
        if self.posted_records:
            return "posted"
        return "differing" if self.differing else "duplicate"


class _ImportedLeaf(msgspec.Struct, frozen=True, kw_only=True):
    """What comparing imports needs of a leaf."""

    record: ImportedHours


class Entries:
    """Posts people's entries. Safe to use from several threads and processes."""

    def __init__(
        self,
        database: Database,
        *,
        key: SigningKey,
        table: AcceleratorTable,
        clock: Clock,
        identity: LedgerIdentity,
    ) -> None:
        self._database = database
        self._key = key
        self._fingerprint = fingerprint(key.public_key)
        self._table = table
        self._clock = clock
        self._identity = identity
        self._boot_id = secrets.token_hex(_SALT_BYTES)

    def post(self, record: PersonRecord, *records: PersonRecord) -> PostedEntry:
        """Journal records of one project (or of none) as one entry; durable when this returns.

        Raises `InvalidInput` when a record cannot stand, and posts none of them then.
        """
        posted = (record, *records)
        if len(posted) > RECORDS_PER_BATCH_MAX:
            raise InvalidInput("records", len(posted), f"post at most {RECORDS_PER_BATCH_MAX}")
        scopes = {_scope(one) for one in posted}
        if len(scopes) > 1:
            raise InvalidInput("records", sorted(scopes), "post each project's entries apart")
        checked = tuple(_checked(one) for one in posted)
        with self._database.writing() as writing:
            return self._post(writing.journal, scopes.pop(), checked)

    def post_many(self, records: Iterable[PersonRecord]) -> tuple[PostedEntry, ...]:
        """Post any number of records of any projects, as few entries as their limits allow."""
        by_scope: dict[str, list[PersonRecord]] = {}
        for record in records:
            by_scope.setdefault(_scope(record), []).append(record)
        entries: list[PostedEntry] = []
        for group in by_scope.values():
            entries.extend(
                self.post(*group[start : start + RECORDS_PER_BATCH_MAX])
                for start in range(0, len(group), RECORDS_PER_BATCH_MAX)
            )
        return tuple(entries)

    def _post(
        self, journal: JournalRows, scope: str, records: Sequence[PersonRecord]
    ) -> PostedEntry:
        fresh, duplicates, differing = _without_duplicates(records, journal)
        if not fresh:
            first = (*duplicates, *differing)[0]
            stream_id, sequence, _ = journal.import_places([first])[first]
            return PostedEntry(
                stream_id=stream_id,
                sequence=sequence,
                batch_hash=journal.batch_hash(stream_id, sequence) or "",
                posted_records=0,
                duplicates=duplicates,
                differing=differing,
            )
        content, header = self._sealed(journal, scope, fresh)
        name = batch_hash(content.partition(b"\n")[0])
        now_unix_ms = self._now_unix_ms()
        entry = JournalEntry(
            stream_id=header.stream_id,
            sequence=header.sequence,
            batch_hash=name,
            content=content,
            received_unix_ms=now_unix_ms,
            findings=findings(decode(content), self._table),
        )
        state = StreamState.after(header, self._fingerprint, name, now_unix_ms)
        journal.write(Changes(entries=(entry,), streams=(state,)))
        journal.write_import_keys(
            [
                (record.import_key, header.stream_id, header.sequence, index)
                for index, record in enumerate(fresh)
                if isinstance(record, ImportedHours)
            ]
        )
        return PostedEntry(
            stream_id=header.stream_id,
            sequence=header.sequence,
            batch_hash=name,
            posted_records=len(fresh),
            duplicates=duplicates,
            differing=differing,
        )

    def _sealed(
        self, journal: JournalRows, scope: str, records: Sequence[PersonRecord]
    ) -> tuple[bytes, BatchHeader]:
        """The batch that continues the scope's stream."""
        before, predecessor = self._stream(journal, scope)
        now_unix_ms = self._now_unix_ms()
        if before is not None:
            # Entries are ordered by when they were posted; the wall clock may step back.
            now_unix_ms = max(now_unix_ms, before.last_window_end_unix_ms)
        accounts = {account_of(record): _salt() for record in records}
        salts = Salts(
            leaf=tuple(_salt() for _ in records),
            account=accounts,
            name=tuple(_salt() for _ in records),
        )
        everything: Sequence[Record] = records
        leaves = make_leaves(everything, (None,) * len(records), salts)
        header = BatchHeader(
            schema_version=1,
            ledger_id=self._identity.ledger_id,
            stream_id=secrets.token_hex(16) if before is None else before.stream_id,
            sequence=0 if before is None else before.head_sequence + 1,
            previous_hash=None if before is None else before.head_hash,
            predecessor=predecessor,
            author="collector",
            public_key=self._key.public_key,
            node=NODE,
            cluster=None,
            program=f"flopledger {__version__}",
            boot_id=self._boot_id,
            window_start_unix_ms=now_unix_ms,
            window_end_unix_ms=now_unix_ms,
            sealed=ClockState(
                boot_ms=self._clock.boottime_ns() // NS_PER_MS,
                unix_ms=now_unix_ms,
                synchronised=None,
            ),
            simulated=self._identity.simulated,
            record_count=len(records),
            merkle_root=merkle_root(leaves),
            manifest=make_manifest(everything, accounts),
        )
        if before is None:
            journal.set_entry_stream(scope, header.stream_id)
        return seal(header, leaves, self._key), header

    def _stream(
        self, journal: JournalRows, scope: str
    ) -> tuple[StreamState | None, Predecessor | None]:
        """The scope's stream; none where it has to begin, after a stream of a lost key or none."""
        stream_id = journal.entry_stream(scope)
        if stream_id is None:
            return None, None
        state = journal.streams([stream_id])[stream_id]
        if state.fingerprint == self._fingerprint:
            return state, None
        return None, Predecessor(
            stream_id=state.stream_id, sequence=state.head_sequence, batch_hash=state.head_hash
        )

    def _now_unix_ms(self) -> int:
        return self._clock.wall_unix_ns() // NS_PER_MS


def _scope(record: PersonRecord) -> str:
    """The project a record belongs to."""
    if isinstance(record, ImportedHours):
        return record.owner.project or LEDGER_SCOPE
    return record.project


def _checked(record: PersonRecord) -> PersonRecord:
    """The record, as strict as the wire will be with it; raises `InvalidInput`."""
    try:
        # Constructing a Struct checks no types; decoding does.
        decoded: PersonRecord = msgspec.json.decode(msgspec.json.encode(record), type=PersonRecord)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise InvalidInput(type(record).__name__, str(error), "correct this field") from error
    return decoded


def _without_duplicates(
    records: Sequence[PersonRecord], journal: JournalRows
) -> tuple[tuple[PersonRecord, ...], tuple[str, ...], tuple[str, ...]]:
    """Records not imported before; the import keys of equal others; those of differing others."""
    keys = [record.import_key for record in records if isinstance(record, ImportedHours)]
    known = _imported(keys, journal) if keys else {}
    fresh: list[PersonRecord] = []
    duplicates: list[str] = []
    differing: list[str] = []
    for record in records:
        if isinstance(record, ImportedHours):
            terms = _terms(record)
            if record.import_key in known:
                same = known[record.import_key] == terms
                (duplicates if same else differing).append(record.import_key)
                continue
            known[record.import_key] = terms
        fresh.append(record)
    return tuple(fresh), tuple(duplicates), tuple(differing)


def _imported(keys: Sequence[str], journal: JournalRows) -> dict[str, ImportedHours | None]:
    """The terms that keys were posted with; None where this program cannot read them."""
    by_entry: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for key, (stream_id, sequence, index) in journal.import_places(keys).items():
        by_entry.setdefault((stream_id, sequence), []).append((key, index))
    found: dict[str, ImportedHours | None] = {}
    for place, members in by_entry.items():
        leaves = (journal.content(*place) or b"").split(b"\n")[2:]
        for key, index in members:
            try:
                record = msgspec.json.decode(leaves[index], type=_ImportedLeaf).record
            except (msgspec.MsgspecError, IndexError):
                found[key] = None
            else:
                found[key] = _terms(record)
    return found


def _terms(record: ImportedHours) -> ImportedHours:
    """A record without what may differ between two imports of the same: who, when, which file."""
    return msgspec.structs.replace(record, source="-", at_unix_ms=0, author="-")


def _salt() -> str:
    return secrets.token_hex(_SALT_BYTES)
