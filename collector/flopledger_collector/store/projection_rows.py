"""The projections' rows: what is not folded yet, and adding a delta, on one transaction.

Limbs are read, added in Python's unbounded integers and written back inside the same writing
transaction; rollups and fold heads change together or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, bindparam, delete, func, insert, select, update

from flopledger_collector.ledger.delta import ProjectDelta, UnfoldedEntry
from flopledger_collector.store import schema
from flopledger_collector.store.journal_rows import ROWS_PER_SELECT
from flopledger_core import exact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sqlalchemy import Connection

    from flopledger_collector.ledger.delta import Delta, PostedRecord

NOTHING_FOLDED: Final = -1
CARRIED: Final = "*1e30"  # ends the name of a row that holds what another row's limbs could not


def unfolded(connection: Connection, entries_max: int) -> list[UnfoldedEntry]:
    """Journal rows past the fold heads, each stream's in order, at most so many."""
    stream, head, journal = schema.stream.c, schema.fold_head.c, schema.journal.c
    folded = func.coalesce(head.sequence, NOTHING_FOLDED)
    statement = (
        select(
            journal.stream_id,
            journal.sequence,
            journal.batch_hash,
            journal.content,
            journal.findings,
            journal.received_unix_ms,
        )
        .select_from(
            schema.stream.outerjoin(schema.fold_head, head.stream_id == stream.stream_id).join(
                schema.journal,
                and_(journal.stream_id == stream.stream_id, journal.sequence > folded),
            )
        )
        .where(stream.head_sequence > folded)
        .order_by(stream.stream_id, journal.sequence)
        .limit(entries_max)
    )
    return [
        UnfoldedEntry(
            stream_id=row[0],
            sequence=row[1],
            batch_hash=row[2],
            content=row[3],
            findings=row[4],
            received_unix_ms=row[5],
        )
        for row in connection.execute(statement)
    ]


def carried(quantity: str) -> tuple[str, int]:
    """A stored quantity's own name, and what one unit of its limbs stands for."""
    if quantity.endswith(CARRIED):
        return quantity.removesuffix(CARRIED), exact.CARRY
    return quantity, 1


def _limbs(group_id: str, quantity: str, amount: int) -> dict[str, Any]:
    high, low = exact.split(amount)
    return {"group_id": group_id, "quantity": quantity, "high": high, "low": low}


class ProjectionRows:
    """The projections, inside one writing transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def unfolded(self, entries_max: int) -> list[UnfoldedEntry]:
        """Journal rows past the fold heads."""
        return unfolded(self._connection, entries_max)

    def add(self, delta: Delta) -> bool:
        """Add a delta; False, and nothing written, when another folder was there first."""
        heads = self._fold_heads(delta.heads)
        for stream_id, first in delta.from_sequences.items():
            if heads.get(stream_id, NOTHING_FOLDED) + 1 != first:
                return False
        rows = [
            {"stream_id": head.stream_id, "sequence": head.sequence, "batch_hash": head.batch_hash}
            for head in delta.heads.values()
        ]
        self._write(schema.fold_head, ("stream_id",), rows, {(name,) for name in heads})
        self._add_groups(delta)
        self._add_projects(delta)
        self._add_posted(schema.budget, delta.budgets)
        self._add_posted(schema.declaration, delta.declarations)
        return True

    def clear(self) -> None:
        """Drop every projection; the journal is untouched."""
        for table in schema.PROJECTIONS:
            self._connection.execute(delete(table))

    # --- inside ---

    def _fold_heads(self, stream_ids: Iterable[str]) -> dict[str, int]:
        rows = self._select(
            select(schema.fold_head.c.stream_id, schema.fold_head.c.sequence).where(
                schema.fold_head.c.stream_id.in_(bindparam("ids", expanding=True))
            ),
            stream_ids,
        )
        return {row["stream_id"]: row["sequence"] for row in rows}

    def _add_groups(self, delta: Delta) -> None:
        groups = {key.digest: (key, group) for key, group in delta.groups.items()}
        known = {row["group_id"]: row for row in self._select(_GROUPS, groups)}
        rows: list[dict[str, Any]] = []
        for group_id, (key, group) in groups.items():
            before = known.get(group_id)
            row: dict[str, Any] = {"group_id": group_id, **key._asdict()}
            row["records"] = group.records + (before["records"] if before else 0)
            row["first_unix_ms"] = group.first_unix_ms
            row["last_unix_ms"] = group.last_unix_ms
            if before:
                row["first_unix_ms"] = min(row["first_unix_ms"], before["first_unix_ms"])
                row["last_unix_ms"] = max(row["last_unix_ms"], before["last_unix_ms"])
            rows.append(row)
        self._write(schema.rollup_group, ("group_id",), rows, {(name,) for name in known})
        sums: dict[tuple[str, str], int] = {}
        stored: set[tuple[str, ...]] = set()
        for row in self._select(_SUMS, known):
            stored.add((row["group_id"], row["quantity"]))
            name, unit = carried(row["quantity"])
            amount = exact.join(row["high"], row["low"]) * unit
            place = (row["group_id"], name)
            sums[place] = sums.get(place, 0) + amount
        limbs: list[dict[str, Any]] = []
        for group_id, (_, group) in groups.items():
            for quantity, amount in group.sums.items():
                total = amount + sums.get((group_id, quantity), 0)
                carries, rest = exact.split_off(total)
                limbs.append(_limbs(group_id, quantity, rest))
                if carries:
                    limbs.append(_limbs(group_id, quantity + CARRIED, carries))
        self._write(schema.rollup, ("group_id", "quantity"), limbs, stored)

    def _add_projects(self, delta: Delta) -> None:
        seen = delta.projects()
        known = {
            row["project"]: ProjectDelta(
                **{name: row[name] for name in ProjectDelta.__struct_fields__}
            )
            for row in self._select(_PROJECTS, seen)
        }
        rows: list[dict[str, Any]] = []
        for project, change in seen.items():
            merged = change.merged(known[project]) if project in known else change
            fields = {name: getattr(merged, name) for name in ProjectDelta.__struct_fields__}
            rows.append({"project": project, **fields})
        self._write(schema.project, ("project",), rows, {(name,) for name in known})

    def _add_posted(self, table: Any, posted: Sequence[PostedRecord]) -> None:  # noqa: ANN401
        if posted:
            self._connection.execute(
                insert(table),
                [{"project": p.project, "rank": p.rank, "record": p.record} for p in posted],
            )

    def _write(
        self,
        table: Any,  # noqa: ANN401 (a SQLAlchemy table; rows below are its columns)
        keys: tuple[str, ...],
        rows: Sequence[dict[str, Any]],
        known: set[tuple[str, ...]],
    ) -> None:
        """Insert new rows and replace known ones, as two executemany at most."""
        fresh: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for row in rows:
            if tuple(row[name] for name in keys) in known:
                moved.append({f"b_{name}": value for name, value in row.items()})
            else:
                fresh.append(row)
        if fresh:
            self._connection.execute(insert(table), fresh)
        if moved:
            values: dict[str, Any] = {
                name: bindparam(f"b_{name}") for name in rows[0] if name not in keys
            }
            where = and_(*(table.c[name] == bindparam(f"b_{name}") for name in keys))
            self._connection.execute(update(table).where(where).values(values), moved)

    def _select(self, statement: Any, ids: Iterable[str]) -> Iterator[Any]:  # noqa: ANN401
        wanted = sorted(ids)
        for start in range(0, len(wanted), ROWS_PER_SELECT):
            part = wanted[start : start + ROWS_PER_SELECT]
            yield from self._connection.execute(statement, {"ids": part}).mappings()


_GROUPS: Final = select(
    schema.rollup_group.c.group_id,
    schema.rollup_group.c.records,
    schema.rollup_group.c.first_unix_ms,
    schema.rollup_group.c.last_unix_ms,
).where(schema.rollup_group.c.group_id.in_(bindparam("ids", expanding=True)))
_SUMS: Final = select(schema.rollup).where(
    schema.rollup.c.group_id.in_(bindparam("ids", expanding=True))
)
_PROJECTS: Final = select(schema.project).where(
    schema.project.c.project.in_(bindparam("ids", expanding=True))
)
