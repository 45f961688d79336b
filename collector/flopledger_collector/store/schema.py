"""The tables, once, for every database the ledger can live in.

The journal is the truth: triggers refuse to change or remove its rows. `agent_key`, `stream`,
`entry_stream` and `audit` are the collector's own state. Everything in `PROJECTIONS` can be
dropped and folded again from the journal, and comes out equal. An absent text in a key column of
a projection is '' because NULLs are never equal. There is no float anywhere.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

METADATA: Final = MetaData()
_INT64: Final = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's INTEGER has 64 bits


def _text(name: str, *, key: bool = False, null: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=null)


def _int(name: str, *, key: bool = False, null: bool = False) -> Column[int]:
    return Column(name, _INT64, primary_key=key, nullable=null, autoincrement=False)


def _flag(name: str) -> Column[int]:
    """0 or 1: STRICT tables have no boolean."""
    return Column(name, _INT64, nullable=False)


def _table(name: str, *items: Any, rowid: bool = False) -> Table:  # noqa: ANN401 (SQLAlchemy's own)
    return Table(name, METADATA, *items, sqlite_strict=True, sqlite_with_rowid=rowid)


# --- the journal and the collector's own state --------------------------------------------------

ledger = _table(
    "ledger",
    _text("ledger_id", key=True),
    _int("created_unix_ms"),
    _flag("simulated"),
)

# With a rowid: its rows are large, and SQLite then appends them instead of moving them.
journal = _table(
    "journal",
    _text("stream_id", key=True),
    _int("sequence", key=True),
    _text("batch_hash"),
    Column("content", LargeBinary, nullable=False),  # the batch's bytes, verbatim
    _int("received_unix_ms"),
    _text("findings"),  # JSON list of core.validation.Finding
    rowid=True,
)

agent_key = _table(
    "agent_key",
    _text("fingerprint", key=True),
    _text("public_key"),
    _text("node", null=True),
    _text("state"),  # trusted | revoked
    _int("added_unix_ms"),
    _text("how"),  # config | first_use | collector
)

stream = _table(
    "stream",
    _text("stream_id", key=True),
    _text("fingerprint"),
    _text("node"),
    _text("cluster", null=True),
    _text("author"),
    _flag("simulated"),
    _int("head_sequence"),
    _text("head_hash"),
    _int("last_received_unix_ms"),
    _int("last_window_end_unix_ms"),
)

# Which stream people's entries of a project go to; scope '' is the ledger's own.
entry_stream = _table(
    "entry_stream",
    _text("scope", key=True),
    _text("stream_id"),
)

audit = _table(
    "audit",
    Column("id", _INT64, primary_key=True, autoincrement=True),
    _int("at_unix_ms"),
    _text("code"),
    _text("stream_id"),
    _int("sequence"),
    _text("batch_hash"),
    _text("message"),
    UniqueConstraint("code", "stream_id", "sequence", "batch_hash", name="audit_once"),
    rowid=True,
)

# --- projections ----------------------------------------------------------------------------------

device_lease = _table(
    "device_lease",
    _text("device_key", key=True),
    _text("stream_id", key=True),
    _int("first_start_unix_ms"),
    _int("last_end_unix_ms"),
)

device_reach = _table(
    "device_reach",
    _text("stream_id", key=True),
    _text("device_key", key=True),
    _text("boot_id", key=True),
    _int("end_boot_ms"),
)

fold_head = _table(
    "fold_head",
    _text("stream_id", key=True),
    _int("sequence"),
    _text("batch_hash"),
)

project = _table(
    "project",
    _text("project", key=True),
    _text("entity", null=True),
    _text("title", null=True),
    _int("opened_unix_ms", null=True),
    _text("opened_rank"),  # which opening entry speaks: the greatest rank
    _int("first_unix_ms", null=True),
    _int("last_unix_ms", null=True),
)


def _entry_table(name: str) -> Table:
    """Entries of people, kept whole; `rank` orders them as they were posted."""
    return _table(
        name,
        _text("project", key=True),
        _text("rank", key=True),
        Column("record", LargeBinary, nullable=False),
    )


budget = _entry_table("budget")
declaration = _entry_table("declaration")

import_key = _table(
    "import_key",
    _text("import_key", key=True),
    _text("stream_id"),
    _int("sequence"),
    _int("record_index"),
)

# The columns of a rollup group, in the order their digest `group_id` is taken.
GROUP_KEYS: Final = (
    "day", "account", "kind", "model", "run", "job", "activity", "device_name", "pci_device_id",
    "compute_capability", "tier", "energy_scope", "precision", "precision_origin",
    "first_model_version", "first_table_version", "standing", "simulated",
)  # fmt: skip
_INTEGER_KEYS: Final = frozenset({"day", "simulated"})

rollup_group = _table(
    "rollup_group",
    _text("group_id", key=True),  # SHA-256 over the key columns, so that amounts stay narrow
    *(_int(name) if name in _INTEGER_KEYS else _text(name) for name in GROUP_KEYS),
    _int("records"),
    _int("first_unix_ms"),
    _int("last_unix_ms"),
    UniqueConstraint(*GROUP_KEYS, name="rollup_group_key"),
    Index("rollup_group_account", "account", "day"),
)

rollup = _table(
    "rollup",
    _text("group_id", key=True),
    _text("quantity", key=True),
    _int("high"),  # two exact limbs, see core.exact
    _int("low"),
)

PROJECTIONS: Final = (
    device_lease, device_reach, fold_head, project, budget, declaration, import_key, rollup_group,
    rollup,
)  # fmt: skip
APPEND_ONLY: Final = (journal, audit)
