"""Reading the projections: sums in SQL, joined into exact integers, on one snapshot.

Everything returned is plain values; what a sum means is for `ledger/totals.py` to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from sqlalchemy import func, select

from flopledger_collector.ledger.position import Head
from flopledger_collector.store import schema
from flopledger_collector.store.projection_rows import CARRIED, carried, unfolded
from flopledger_core import exact
from flopledger_core.identity import RESERVED_PROJECTS, OwnerKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection

    from flopledger_collector.ledger.delta import UnfoldedEntry


class RollupSum(msgspec.Struct, frozen=True, kw_only=True):
    """Rollup groups summed over days (and over jobs, unless they were asked apart)."""

    account: str
    kind: OwnerKind
    model: str
    run: str
    job: str  # '' when summed over jobs
    activity: str
    device_name: str
    pci_device_id: str
    compute_capability: str
    tier: str
    energy_scope: str  # 'module' where the energy counter reads more than the GPU
    precision: str
    precision_origin: str
    first_model_version: str  # of the agent's first estimate; '' without one
    first_table_version: str
    standing: Literal["clear", "disputed"]
    simulated: bool
    records: int
    first_unix_ms: int
    last_unix_ms: int
    sums: dict[str, int]


class ProjectRow(msgspec.Struct, frozen=True, kw_only=True):
    """A project as it is stored; `opened_unix_ms` None while nobody opened it."""

    project: str
    entity: str | None
    title: str | None
    opened_unix_ms: int | None
    first_unix_ms: int | None
    last_unix_ms: int | None


_SUMMED_KEYS: Final = tuple(name for name in schema.GROUP_KEYS if name not in {"day", "job"})


# The high limbs reach the end of 64 bits, so their sum is taken in two parts.
_PART: Final = 10**9
_LIMB_SUMS: Final = (
    func.sum(schema.rollup.c.high // _PART),
    func.sum(schema.rollup.c.high % _PART),
    func.sum(schema.rollup.c.low),
)


def _joined(sums: Sequence[int]) -> int:
    """The amount that the three sums of `_LIMB_SUMS` stand for."""
    return exact.join(int(sums[0]) * _PART + int(sums[1]), int(sums[2]))


class Reading:
    """One snapshot of the database."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def rollup(
        self, project: str | None, start_day: int | None, end_day: int | None, *, by_job: bool
    ) -> list[RollupSum]:
        """Sums of a project's groups, or of all, over days `start_day <= day < end_day`."""
        group = schema.rollup_group.c
        names = (*_SUMMED_KEYS, "job") if by_job else _SUMMED_KEYS
        columns = [group[name] for name in names]
        conditions: list[Any] = []
        if project is not None:
            kind = project if project in RESERVED_PROJECTS else "attributed"
            conditions += [group.account == project, group.kind == kind]
        if start_day is not None:
            conditions.append(group.day >= start_day)
        if end_day is not None:
            conditions.append(group.day < end_day)
        groups = select(
            *columns,
            func.sum(group.records),
            func.min(group.first_unix_ms),
            func.max(group.last_unix_ms),
        )
        # Amounts are many times more rows than groups: they are sorted by one number, the place
        # of their sum among the groups as these are listed, and not by every text column.
        ranked = select(
            group.group_id, func.dense_rank().over(order_by=columns).label("place")
        ).where(*conditions)
        places = ranked.cte("places")
        sums = (
            select(places.c.place, schema.rollup.c.quantity, *_LIMB_SUMS)
            .join_from(places, schema.rollup, schema.rollup.c.group_id == places.c.group_id)
            .group_by(places.c.place, schema.rollup.c.quantity)
        )
        found: dict[int, dict[str, int]] = {}
        for place, quantity, *limbs in self._connection.execute(sums):
            amounts = found.setdefault(place, {})
            name, unit = carried(quantity)
            amounts[name] = amounts.get(name, 0) + _joined(limbs) * unit
        listed = groups.where(*conditions).group_by(*columns).order_by(*columns)
        answer: list[RollupSum] = []
        for row in self._connection.execute(listed):
            place = len(answer) + 1
            answer.append(_rollup_sum(names, row, found.get(place, {})))
        return answer

    def projects(self) -> list[ProjectRow]:
        """Every project by id."""
        columns = [schema.project.c[name] for name in ProjectRow.__struct_fields__]
        rows = self._connection.execute(select(*columns).order_by(schema.project.c.project))
        return [ProjectRow(**row) for row in rows.mappings()]

    def entries(self, kind: Literal["budget", "declaration"], project: str | None) -> list[bytes]:
        """Entries of people as their record's JSON, in the order they were posted."""
        table = schema.budget if kind == "budget" else schema.declaration
        statement = select(table.c.record).order_by(table.c.rank)
        if project is not None:
            statement = statement.where(table.c.project == project)
        return [row[0] for row in self._connection.execute(statement)]

    def streams(self) -> Iterator[dict[str, Any]]:
        """Every stream's row but for its hash, by node and id."""
        columns = [column for column in schema.stream.c if column.name != "head_hash"]
        order = (schema.stream.c.node, schema.stream.c.stream_id)
        statement = select(*columns).order_by(*order)
        for row in self._connection.execute(statement).mappings():
            yield {**row, "simulated": bool(row["simulated"])}

    def fold_heads(self) -> list[Head]:
        """How far each stream is folded, by stream id."""
        statement = select(schema.fold_head).order_by(schema.fold_head.c.stream_id)
        return [Head(**row) for row in self._connection.execute(statement).mappings()]

    def journal_entries(self) -> int:
        """How many batches are journaled: streams count from 0 without holes."""
        statement = select(func.sum(schema.stream.c.head_sequence + 1))
        return int(self._connection.execute(statement).scalar() or 0)

    def unfolded(self, entries_max: int) -> list[UnfoldedEntry]:
        """Journal rows past the fold heads, each stream's in order."""
        return unfolded(self._connection, entries_max)

    def record_counts(self) -> dict[str, int]:
        """Folded records by standing."""
        group = schema.rollup_group.c
        rows = self._connection.execute(
            select(group.standing, func.sum(group.records)).group_by(group.standing)
        )
        return {row[0]: int(row[1]) for row in rows}

    def quantity(self, name: str) -> int:
        """The sum of one quantity over every account and standing."""
        rollup = schema.rollup.c
        rows = self._connection.execute(
            select(rollup.quantity, *_LIMB_SUMS)
            .where(rollup.quantity.in_((name, name + CARRIED)))
            .group_by(rollup.quantity)
        )
        return sum(_joined(row[1:]) * carried(row[0])[1] for row in rows)

    def audit_counts(self) -> dict[str, int]:
        """Kept refusals and conflicts by code."""
        audit = schema.audit.c
        rows = self._connection.execute(
            select(audit.code, func.count()).group_by(audit.code).order_by(audit.code)
        )
        return {row[0]: int(row[1]) for row in rows}


def _rollup_sum(names: tuple[str, ...], row: Any, sums: dict[str, int]) -> RollupSum:  # noqa: ANN401
    width = len(names)
    fields: dict[str, Any] = dict(zip(names, row[:width], strict=True))
    fields.setdefault("job", "")
    fields["simulated"] = bool(fields["simulated"])
    return RollupSum(
        **fields,
        records=int(row[width]),
        first_unix_ms=int(row[width + 1]),
        last_unix_ms=int(row[width + 2]),
        sums=dict(sorted(sums.items())),
    )
