"""Groups know the architecture, the energy counter's scope and the first estimate's versions.

The four new key columns are '' for everything folded before: no record had them, so a rebuild
gives the same. A group's id is a digest over its key columns, so every id is computed again and
the amounts move with it; nothing is folded again, because a journal may be too long for that.

Down again, groups that only the new columns kept apart are added up. What nodes used themselves
(tier `host`) has no place in the older tables and leaves the rollups; it stays in the journal.
"""

import hashlib
from typing import Any

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_BEFORE = (
    "day", "account", "kind", "model", "run", "job", "activity", "device_name", "pci_device_id",
    "tier", "precision", "precision_origin", "standing", "simulated",
)  # fmt: skip
_AFTER = (
    "day", "account", "kind", "model", "run", "job", "activity", "device_name", "pci_device_id",
    "compute_capability", "tier", "energy_scope", "precision", "precision_origin",
    "first_model_version", "first_table_version", "standing", "simulated",
)  # fmt: skip
_COUNTS = ("records", "first_unix_ms", "last_unix_ms")
_INTEGERS = frozenset({"day", "simulated", "high", "low", *_COUNTS})
_HOST_TIER = "host"
_LIMB = 10**12
_CARRY = 10**30
_CARRIED = "*1e30"  # ends the name of a row that holds what another row's limbs could not
_ROWS_AT_ONCE = 1000


def upgrade() -> None:
    """Give every group the new columns and its new id."""
    groups = _rows("rollup_group", _group_columns(_BEFORE))
    _replace(_AFTER, groups, _amounts())


def downgrade() -> None:
    """Take the columns away; groups that become one are added up."""
    groups = _rows("rollup_group", _group_columns(_AFTER))
    _replace(_BEFORE, [row for row in groups if row["tier"] != _HOST_TIER], _amounts())


def _amounts() -> dict[tuple[str, str], int]:
    """Every amount by group and quantity, carried parts included."""
    found: dict[tuple[str, str], int] = {}
    for row in _rows("rollup", ("group_id", "quantity", "high", "low")):
        quantity = row["quantity"].removesuffix(_CARRIED)
        unit = 1 if quantity == row["quantity"] else _CARRY
        place = (row["group_id"], quantity)
        found[place] = found.get(place, 0) + (row["high"] * _LIMB + row["low"]) * unit
    return found


def _replace(
    keys: tuple[str, ...], groups: list[dict[str, Any]], amounts: dict[tuple[str, str], int]
) -> None:
    """Make the tables with these key columns and fill them; what falls together is added up."""
    moved: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for group in groups:
        row = {key: group.get(key, "") for key in keys}
        name = hashlib.sha256(msgspec.json.encode(tuple(row.values()))).hexdigest()
        names[group["group_id"]] = name
        known = moved.get(name)
        if known is None:
            moved[name] = {"group_id": name, **row, **{key: group[key] for key in _COUNTS}}
            continue
        known["records"] += group["records"]
        known["first_unix_ms"] = min(known["first_unix_ms"], group["first_unix_ms"])
        known["last_unix_ms"] = max(known["last_unix_ms"], group["last_unix_ms"])
    added: dict[tuple[str, str], int] = {}
    for (old_name, quantity), amount in amounts.items():
        if old_name in names:
            place = (names[old_name], quantity)
            added[place] = added.get(place, 0) + amount
    _make_group_table(keys)
    _insert("rollup_group", _group_columns(keys), list(moved.values()))
    op.execute(sa.delete(_table("rollup", ("group_id",))))
    limbs = [row for place, amount in added.items() for row in _limbs(*place, amount)]
    _insert("rollup", ("group_id", "quantity", "high", "low"), limbs)


def _limbs(group_id: str, quantity: str, amount: int) -> list[dict[str, Any]]:
    carries, rest = divmod(amount, _CARRY)
    rows: list[dict[str, Any]] = []
    for name, part in ((quantity, rest), (quantity + _CARRIED, carries)):
        if part or name == quantity:
            high, low = divmod(part, _LIMB)
            rows.append({"group_id": group_id, "quantity": name, "high": high, "low": low})
    return rows


def _make_group_table(keys: tuple[str, ...]) -> None:
    op.drop_index("rollup_group_account", "rollup_group")
    op.drop_table("rollup_group")
    op.create_table(
        "rollup_group",
        *(_column(name) for name in _group_columns(keys)),
        sa.UniqueConstraint(*keys, name="rollup_group_key"),
        sa.PrimaryKeyConstraint("group_id"),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("rollup_group_account", "rollup_group", ["account", "day"])


def _group_columns(keys: tuple[str, ...]) -> tuple[str, ...]:
    return ("group_id", *keys, *_COUNTS)


def _rows(table: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    found = op.get_bind().execute(sa.select(_table(table, columns)))
    return [dict(row) for row in found.mappings()]


def _insert(table: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        op.get_bind().execute(sa.insert(_table(table, columns)), part)


def _table(name: str, columns: tuple[str, ...]) -> sa.Table:
    return sa.Table(name, sa.MetaData(), *(_column(column) for column in columns))


def _column(name: str) -> sa.Column[Any]:
    if name in _INTEGERS:
        kind = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
        return sa.Column(name, kind, nullable=False, autoincrement=False)
    return sa.Column(name, sa.Text(), nullable=False)
