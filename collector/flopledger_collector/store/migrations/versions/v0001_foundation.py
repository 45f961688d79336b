"""The first tables: journal, keys, streams, audit, and the projections folded from the journal.

Written out, not derived from `schema.py`: a migration must keep doing what it did when it was
new. The triggers are SQLite's; they make the journal and the audit refuse to change or lose rows.
A REPLACE deletes without firing delete triggers unless recursive triggers are on, so a row over a
present one is refused before it is inserted, whatever a connection's settings are.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_APPEND_ONLY = {"journal": ("stream_id", "sequence"), "audit": ("id",)}


def upgrade() -> None:
    """Make every table, and guard the append-only ones."""
    _collector_tables()
    _projection_tables()
    if op.get_bind().dialect.name == "sqlite":
        for table, key in _APPEND_ONLY.items():
            _guard(table, key)


def _collector_tables() -> None:
    _create("ledger", _text("ledger_id"), _int("created_unix_ms"), _int("simulated"),
            key=("ledger_id",))  # fmt: skip
    _create(
        "journal",
        _text("stream_id"), _int("sequence"), _text("batch_hash"),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        _int("received_unix_ms"), _text("findings"),
        key=("stream_id", "sequence"), rowid=True,
    )  # fmt: skip
    _create(
        "agent_key",
        _text("fingerprint"), _text("public_key"), _text("node", null=True), _text("state"),
        _int("added_unix_ms"), _text("how"),
        key=("fingerprint",),
    )  # fmt: skip
    _create(
        "stream",
        _text("stream_id"), _text("fingerprint"), _text("node"), _text("cluster", null=True),
        _text("author"), _int("simulated"), _int("head_sequence"), _text("head_hash"),
        _int("last_received_unix_ms"), _int("last_window_end_unix_ms"),
        key=("stream_id",),
    )  # fmt: skip
    _create("entry_stream", _text("scope"), _text("stream_id"), key=("scope",))
    _create(
        "audit",
        sa.Column("id", _int64(), autoincrement=True, nullable=False),
        _int("at_unix_ms"), _text("code"), _text("stream_id"), _int("sequence"),
        _text("batch_hash"), _text("message"),
        sa.UniqueConstraint("code", "stream_id", "sequence", "batch_hash", name="audit_once"),
        key=("id",), rowid=True,
    )  # fmt: skip


def _projection_tables() -> None:
    _create(
        "device_lease",
        _text("device_key"), _text("stream_id"), _int("first_start_unix_ms"),
        _int("last_end_unix_ms"),
        key=("device_key", "stream_id"),
    )  # fmt: skip
    _create("fold_head", _text("stream_id"), _int("sequence"), _text("batch_hash"),
            key=("stream_id",))  # fmt: skip
    _create(
        "project",
        _text("project"), _text("entity", null=True), _text("title", null=True),
        _int("opened_unix_ms", null=True), _text("opened_rank"),
        _int("first_unix_ms", null=True), _int("last_unix_ms", null=True),
        key=("project",),
    )  # fmt: skip
    for name in ("budget", "declaration"):
        record = sa.Column("record", sa.LargeBinary(), nullable=False)
        _create(name, _text("project"), _text("rank"), record, key=("project", "rank"))
    _create(
        "import_key",
        _text("import_key"), _text("stream_id"), _int("sequence"), _int("record_index"),
        key=("import_key",),
    )  # fmt: skip
    texts = ("account", "kind", "model", "run", "job", "activity", "device_name", "pci_device_id",
             "tier", "precision", "precision_origin", "standing")  # fmt: skip
    _create(
        "rollup_group",
        _text("group_id"), _int("day"), *(_text(name) for name in texts), _int("simulated"),
        _int("records"), _int("first_unix_ms"), _int("last_unix_ms"),
        sa.UniqueConstraint("day", *texts, "simulated", name="rollup_group_key"),
        key=("group_id",),
    )  # fmt: skip
    op.create_index("rollup_group_account", "rollup_group", ["account", "day"])
    _create("rollup", _text("group_id"), _text("quantity"), _int("high"), _int("low"),
            key=("group_id", "quantity"))  # fmt: skip


def _guard(table: str, key: tuple[str, ...]) -> None:
    same = " AND ".join(f"{name} = NEW.{name}" for name in key)
    present = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 (names written above)
    op.execute(
        f"CREATE TRIGGER {table}_rows_never_change BEFORE UPDATE ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: rows never change'); END"
    )
    op.execute(
        f"CREATE TRIGGER {table}_rows_stay BEFORE DELETE ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: rows are never removed'); END"
    )
    op.execute(
        f"CREATE TRIGGER {table}_rows_are_not_replaced BEFORE INSERT ON {table} WHEN {present} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: this row is there already'); END"
    )


def _create(name: str, *items: Any, key: tuple[str, ...], rowid: bool = False) -> None:  # noqa: ANN401
    op.create_table(
        name,
        *items,
        sa.PrimaryKeyConstraint(*key),
        sqlite_strict=True,
        sqlite_with_rowid=rowid,
    )


def _int64() -> Any:  # noqa: ANN401 (a type or its variant)
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _int(name: str, *, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, _int64(), nullable=null, autoincrement=False)


def _text(name: str, *, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=null)
