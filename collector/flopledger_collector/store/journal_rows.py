"""The journal's rows: the SQL behind `flopledger_collector.journal.Journal`, on one transaction.

Statements that run once per batch are executed as one executemany per transaction. Nothing here
decides what may be written, and nothing here changes or removes a journal row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import BindParameter, and_, bindparam, func, insert, select, update

from flopledger_collector.journal import (
    AuditEntry,
    Changes,
    DeviceLease,
    DeviceReach,
    JournalEntry,
    KeyEntry,
    LedgerIdentity,
    StreamState,
)
from flopledger_collector.store import schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import Connection

ROWS_PER_SELECT: Final = 500  # names in one IN list; SQLite takes 32766, planners prefer fewer
AUDIT_ROWS_MAX: Final = 100_000  # a hostile or broken sender must not fill the disk with refusals


class JournalRows:
    """The journal and the collector's own state, inside one writing transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # What this transaction has read already, so that writing need not ask again.
        self._streams_known: dict[str, bool] = {}
        self._leases_asked: set[str] = set()
        self._leases_known: set[tuple[str, str]] = set()
        self._reaches_asked: set[tuple[str, str]] = set()  # stream and boot
        self._reaches_known: set[tuple[str, str, str]] = set()

    # --- what admission asks ---

    def streams(self, stream_ids: Iterable[str]) -> dict[str, StreamState]:
        """Those of the streams that exist."""
        wanted = set(stream_ids)
        found = {row[0]: _stream_state(row) for row in self._select(_STREAMS, wanted)}
        self._streams_known.update((stream_id, stream_id in found) for stream_id in wanted)
        return found

    def keys(self, fingerprints: Iterable[str]) -> dict[str, KeyEntry]:
        """Those of the keys that were decided about."""
        return {row[0]: _key_entry(row) for row in self._select(_KEYS, fingerprints)}

    def batch_hash(self, stream_id: str, sequence: int) -> str | None:
        """The hash journaled at a place; None where nothing is."""
        place = {"stream_id": stream_id, "sequence": sequence}
        found = self._connection.execute(_BATCH_HASH, place).scalar()
        return None if found is None else str(found)

    def leases(self, device_keys: Iterable[str]) -> list[DeviceLease]:
        """Every lease of these devices."""
        wanted = set(device_keys)
        found = [
            DeviceLease(
                device_key=row[0],
                stream_id=row[1],
                first_start_unix_ms=row[2],
                last_end_unix_ms=row[3],
            )
            for row in self._select(_LEASES, wanted)
        ]
        self._leases_asked |= wanted
        self._leases_known.update((lease.device_key, lease.stream_id) for lease in found)
        return found

    def reaches(self, stream_ids: Iterable[str], boot_ids: Iterable[str]) -> list[DeviceReach]:
        """How far these streams have come in these boots, by device."""
        streams, boots = set(stream_ids), sorted(set(boot_ids))
        found: list[DeviceReach] = []
        for start in range(0, len(boots), ROWS_PER_SELECT):
            part = boots[start : start + ROWS_PER_SELECT]
            found += [
                DeviceReach(stream_id=row[0], device_key=row[1], boot_id=row[2], end_boot_ms=row[3])
                for row in self._select(_REACHES, streams, boots=part)
            ]
        self._reaches_asked.update((stream, boot) for stream in streams for boot in boots)
        self._reaches_known.update(_reach_place(reach) for reach in found)
        return found

    def write(self, changes: Changes) -> None:
        """Write all of it, or raise and leave the transaction to be rolled back."""
        self._insert(schema.journal, [_journal_row(entry) for entry in changes.entries])
        self._write_streams(changes.streams)
        self._insert(schema.agent_key, [msgspec.structs.asdict(key) for key in changes.keys])
        self.write_leases(changes.leases)
        self._write_reaches(changes.reaches)
        self._write_audits(changes.audits)

    # --- what the composition and people's entries ask ---

    def ledger(self) -> LedgerIdentity | None:
        """Which ledger this is; None before it has been founded."""
        row = self._connection.execute(select(schema.ledger)).mappings().first()
        if row is None:
            return None
        return LedgerIdentity(
            ledger_id=row["ledger_id"],
            created_unix_ms=row["created_unix_ms"],
            simulated=bool(row["simulated"]),
        )

    def found_ledger(self, row: LedgerIdentity) -> None:
        """Write the one row of a new ledger."""
        self._insert(schema.ledger, [_integers(msgspec.structs.asdict(row))])

    def all_keys(self) -> list[KeyEntry]:
        """Every key that was decided about, by fingerprint."""
        statement = select(schema.agent_key).order_by(schema.agent_key.c.fingerprint)
        return [_key_entry(row) for row in self._connection.execute(statement)]

    def change_key(self, key: KeyEntry) -> None:
        """Replace what was decided about a known key."""
        self._connection.execute(
            update(schema.agent_key).where(
                schema.agent_key.c.fingerprint == bindparam("b_fingerprint")
            ),
            [{"b_fingerprint": key.fingerprint, **msgspec.structs.asdict(key)}],
        )

    def entry_stream(self, scope: str) -> str | None:
        """The stream that people's entries of a project (or '' for the ledger) go to."""
        statement = select(schema.entry_stream.c.stream_id).where(
            schema.entry_stream.c.scope == bindparam("scope")
        )
        found = self._connection.execute(statement, {"scope": scope}).scalar()
        return None if found is None else str(found)

    def set_entry_stream(self, scope: str, stream_id: str) -> None:
        """Point a scope to its stream, a new one or the successor of one with a lost key."""
        if self.entry_stream(scope) is None:
            self._insert(schema.entry_stream, [{"scope": scope, "stream_id": stream_id}])
        else:
            self._connection.execute(
                update(schema.entry_stream)
                .where(schema.entry_stream.c.scope == bindparam("b_scope"))
                .values(stream_id=bindparam("b_stream_id")),
                {"b_scope": scope, "b_stream_id": stream_id},
            )

    def import_places(self, import_keys: Iterable[str]) -> dict[str, tuple[str, int, int]]:
        """Where scheduler records were posted: key to (stream id, sequence, record index)."""
        return {row[0]: (row[1], row[2], row[3]) for row in self._select(_IMPORTS, import_keys)}

    def content(self, stream_id: str, sequence: int) -> bytes | None:
        """The batch journaled at a place, verbatim; None where nothing is."""
        place = {"stream_id": stream_id, "sequence": sequence}
        found = self._connection.execute(_CONTENT, place).scalar()
        return None if found is None else bytes(found)

    def write_import_keys(self, rows: Sequence[tuple[str, str, int, int]]) -> None:
        """Remember posted imports: (key, stream id, sequence, record index)."""
        names = ("import_key", "stream_id", "sequence", "record_index")
        self._insert(schema.import_key, [dict(zip(names, row, strict=True)) for row in rows])

    def write_leases(self, leases: Sequence[DeviceLease]) -> None:
        """Write leases, each pair of device and stream once."""
        if not leases:
            return
        self.leases({lease.device_key for lease in leases} - self._leases_asked)
        fresh: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for lease in leases:
            row = msgspec.structs.asdict(lease)
            if (lease.device_key, lease.stream_id) in self._leases_known:
                moved.append(_bound(row))
            else:
                fresh.append(row)
                self._leases_known.add((lease.device_key, lease.stream_id))
        self._insert(schema.device_lease, fresh)
        if moved:
            self._connection.execute(_MOVE_LEASE, moved)

    # --- inside ---

    def _write_streams(self, streams: Sequence[StreamState]) -> None:
        if not streams:
            return
        self.streams({state.stream_id for state in streams} - self._streams_known.keys())
        fresh: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for state in streams:
            row = _integers(msgspec.structs.asdict(state))
            if self._streams_known[state.stream_id]:
                moved.append(_bound(row))
            else:
                fresh.append(row)
                self._streams_known[state.stream_id] = True
        self._insert(schema.stream, fresh)
        if moved:
            self._connection.execute(_MOVE_STREAM, moved)

    def _write_reaches(self, reaches: Sequence[DeviceReach]) -> None:
        unasked = [r for r in reaches if (r.stream_id, r.boot_id) not in self._reaches_asked]
        if unasked:
            self.reaches({r.stream_id for r in unasked}, {r.boot_id for r in unasked})
        fresh: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for reach in reaches:
            row = msgspec.structs.asdict(reach)
            if _reach_place(reach) in self._reaches_known:
                moved.append(_bound(row))
            else:
                fresh.append(row)
                self._reaches_known.add(_reach_place(reach))
        self._insert(schema.device_reach, fresh)
        if moved:
            self._connection.execute(_MOVE_REACH, moved)

    def _write_audits(self, audits: Sequence[AuditEntry]) -> None:
        if not audits:
            return
        count = self._connection.execute(select(func.max(schema.audit.c.id))).scalar() or 0
        for entry in audits:
            if count >= AUDIT_ROWS_MAX or self._is_audited(entry):
                continue
            self._insert(schema.audit, [msgspec.structs.asdict(entry)])
            count += 1

    def _is_audited(self, entry: AuditEntry) -> bool:
        columns = schema.audit.c
        statement = select(columns.id).where(
            columns.code == entry.code,
            columns.stream_id == entry.stream_id,
            columns.sequence == entry.sequence,
            columns.batch_hash == entry.batch_hash,
        )
        return self._connection.execute(statement).first() is not None

    def _insert(self, table: Any, rows: Sequence[dict[str, Any]]) -> None:  # noqa: ANN401
        if rows:
            self._connection.execute(_INSERTS[table.name], rows)

    def _select(
        self,
        statement: Any,  # noqa: ANN401 (a SQLAlchemy select)
        ids: Iterable[str],
        **more: Any,  # noqa: ANN401 (its other parameters)
    ) -> Iterator[Any]:
        wanted = sorted(set(ids))
        for start in range(0, len(wanted), ROWS_PER_SELECT):
            part = wanted[start : start + ROWS_PER_SELECT]
            yield from self._connection.execute(statement, {"ids": part, **more})


_IDS: Final[BindParameter[Any]] = bindparam("ids", expanding=True)
# Statements are made once: compiling one costs more than running it.
_INSERTS: Final = {table.name: insert(table) for table in schema.METADATA.tables.values()}
_STREAMS: Final = select(schema.stream).where(schema.stream.c.stream_id.in_(_IDS))
_KEYS: Final = select(schema.agent_key).where(schema.agent_key.c.fingerprint.in_(_IDS))
_LEASES: Final = select(schema.device_lease).where(schema.device_lease.c.device_key.in_(_IDS))
_REACHES: Final = select(schema.device_reach).where(
    schema.device_reach.c.stream_id.in_(_IDS),
    schema.device_reach.c.boot_id.in_(bindparam("boots", expanding=True)),
)
_MOVE_REACH: Final = (
    update(schema.device_reach)
    .where(
        schema.device_reach.c.stream_id == bindparam("b_stream_id"),
        schema.device_reach.c.device_key == bindparam("b_device_key"),
        schema.device_reach.c.boot_id == bindparam("b_boot_id"),
    )
    .values(end_boot_ms=bindparam("b_end_boot_ms"))
)
_IMPORTS: Final = select(schema.import_key).where(schema.import_key.c.import_key.in_(_IDS))
_BATCH_HASH: Final = select(schema.journal.c.batch_hash).where(
    and_(
        schema.journal.c.stream_id == bindparam("stream_id"),
        schema.journal.c.sequence == bindparam("sequence"),
    )
)
_CONTENT: Final = select(schema.journal.c.content).where(
    and_(
        schema.journal.c.stream_id == bindparam("stream_id"),
        schema.journal.c.sequence == bindparam("sequence"),
    )
)
_STREAM_FIELDS: Final = tuple(column.name for column in schema.stream.c)
_KEY_FIELDS: Final = tuple(column.name for column in schema.agent_key.c)
_STREAM_COLUMNS: Final = tuple(c.name for c in schema.stream.c if c.name != "stream_id")
_MOVE_STREAM: Final = (
    update(schema.stream)
    .where(schema.stream.c.stream_id == bindparam("b_stream_id"))
    .values({name: bindparam(f"b_{name}") for name in _STREAM_COLUMNS})
)
_MOVE_LEASE: Final = (
    update(schema.device_lease)
    .where(
        schema.device_lease.c.device_key == bindparam("b_device_key"),
        schema.device_lease.c.stream_id == bindparam("b_stream_id"),
    )
    .values(
        first_start_unix_ms=bindparam("b_first_start_unix_ms"),
        last_end_unix_ms=bindparam("b_last_end_unix_ms"),
    )
)


def _reach_place(reach: DeviceReach) -> tuple[str, str, str]:
    return reach.stream_id, reach.device_key, reach.boot_id


def _stream_state(row: Sequence[Any]) -> StreamState:
    fields = dict(zip(_STREAM_FIELDS, row, strict=True))
    fields["simulated"] = bool(fields["simulated"])
    return StreamState(**fields)


def _key_entry(row: Sequence[Any]) -> KeyEntry:
    return KeyEntry(**dict(zip(_KEY_FIELDS, row, strict=True)))


def _journal_row(entry: JournalEntry) -> dict[str, Any]:
    return {
        "stream_id": entry.stream_id,
        "sequence": entry.sequence,
        "batch_hash": entry.batch_hash,
        "content": entry.content,
        "received_unix_ms": entry.received_unix_ms,
        "findings": msgspec.json.encode(entry.findings).decode() if entry.findings else "[]",
    }


def _integers(row: dict[str, Any]) -> dict[str, Any]:
    """Booleans as the integers that STRICT tables take."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in row.items()}


def _bound(row: dict[str, Any]) -> dict[str, Any]:
    """A row as parameters of an update, whose column names are taken."""
    return {f"b_{name}": value for name, value in row.items()}
