"""Restatement: first estimates stand as sealed, today's figures follow today's table."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import msgspec

from flopledger_collector.handle import open_ledger
from flopledger_collector.reports.json_form import statement_document
from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.statement import Statement, build_statement
from flopledger_collector.status import load_rules
from flopledger_core.accelerators import AcceleratorTable, RateSpan, load_table
from flopledger_core.bounds import Bounds
from flopledger_core.flop import FLOP_MODEL_VERSION, estimate
from tests.collector.opened import config, folded, opened, outcomes
from tests.collector.sealing import (
    START_UNIX_MS,
    StreamSealer,
    TestClock,
    first_estimate,
    gap,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle
    from flopledger_core.records import UsageRecord

TABLE = load_table()
RULES = load_rules()
LATER_UNIX_MS = START_UNIX_MS + 30 * 86_400_000


def corrected(factor: int = 2) -> AcceleratorTable:
    """The packaged table with one row put right: the H100's BF16 rate divided by `factor`."""
    rate = 4096 // factor
    span = RateSpan(low_per_cycle=rate // 2, central_per_cycle=rate, high_per_cycle=rate)
    rows = tuple(
        msgspec.structs.replace(row, rate_exceptions={"tensor_bf16": span})
        if row.key == "H100 SXM"
        else row
        for row in TABLE.accelerators
    )
    return AcceleratorTable("corrected", TABLE.architectures, rows)


def estimated(record: UsageRecord, table: AcceleratorTable = TABLE) -> UsageRecord:
    """The record as an agent of today seals it."""
    return msgspec.structs.replace(record, estimate=estimate(record, table))


def journal(directory: Path) -> list[tuple[Any, ...]]:
    """Every row of the journal, verbatim."""
    path = f"file:{directory}/ledger.sqlite3?mode=ro"
    with closing(sqlite3.connect(path, uri=True, timeout=10)) as connection:
        return connection.execute("SELECT * FROM journal ORDER BY 1, 2").fetchall()


def stated(handle: LedgerHandle) -> Statement:
    """The statement of atlas."""
    return build_statement(
        handle.ledger, RULES, "atlas", generated_unix_ms=LATER_UNIX_MS
    )  # fmt: skip


def test_the_same_model_and_table_find_what_the_agents_found(tmp_path: Path) -> None:
    """Central and high exactly; low within one FLOP a record, because each rounds down."""
    sealer = StreamSealer()
    with opened(tmp_path) as handle:
        records = [estimated(usage(0, gpu, busy_per_mille=100 + gpu)) for gpu in range(4)]
        outcomes(handle, sealer.seal(records))
        folded(handle)
        (row,) = stated(handle).restatement.rows
    assert not row.is_restated
    low, central, high = row.difference
    assert (central, high) == (0, 0)
    assert 0 <= low <= len(records)
    assert row.records == len(records)


def test_a_corrected_table_restates_totals_and_edits_nothing(tmp_path: Path) -> None:
    """Journal bytes and first estimates stay; totals, and only they, follow the table."""
    sealer = StreamSealer()
    with opened(tmp_path) as handle:
        outcomes(handle, sealer.seal([estimated(usage(minute)) for minute in range(3)]))
        (before,) = folded(handle, "atlas").lines
        first = stated(handle)
    rows = journal(tmp_path)

    clock = TestClock(LATER_UNIX_MS)
    with open_ledger(config(tmp_path), clock, corrected()) as handle:
        totals = folded(handle, "atlas")
        (after,) = totals.lines
        second = stated(handle)
    assert journal(tmp_path) == rows
    assert after.sums == before.sums
    assert after.first_flop == before.first_flop
    assert totals.table_version == "corrected"
    assert after.work.flop_tensor.central * 2 == before.work.flop_tensor.central
    assert after.work.flop_cores == before.work.flop_cores

    (row,) = second.restatement.rows
    assert row.is_restated
    assert (row.first_model_version, row.first_table_version) == (
        FLOP_MODEL_VERSION, TABLE.version,
    )  # fmt: skip
    assert row.first_flop == first.restatement.rows[0].first_flop == before.first_flop
    assert row.flop == after.work.flop
    assert row.difference[1] == after.work.flop.central - before.work.flop.central
    text = statement_markdown(second)
    assert f"model {FLOP_MODEL_VERSION}, table {TABLE.version}" in text
    assert f"model {FLOP_MODEL_VERSION}, table corrected" in text
    document = statement_document(second)["restatement"]
    assert document["rows"][0]["restated"] is True
    assert document["rows"][0]["difference"]["central"] == str(row.difference[1])


def test_records_of_several_agents_are_compared_each_with_its_own(tmp_path: Path) -> None:
    """By model and table version, record for record the same work; the rest is counted."""
    sealer = StreamSealer()
    old, other = first_estimate(5), first_estimate(7, "1", "other")
    records = [
        usage(0, 0, estimate=old),
        usage(0, 1, estimate=old),
        usage(0, 2, estimate=other),
        usage(0, 3),
        usage(0, 4, owner=project_owner("birch"), estimate=old),
    ]
    with opened(tmp_path) as handle:
        outcomes(handle, sealer.seal(records), sealer.seal([gap(1, owner=project_owner())]))
        outcomes(handle, StreamSealer(2).seal([usage(0, 0, estimate=old)]))  # disputed
        lines = folded(handle, "atlas").lines
        found = stated(handle).restatement
        handle.rebuild()
        assert handle.ledger.totals("atlas").lines == lines
    assert [(row.first_table_version, row.records) for row in found.rows] == [
        ("old", 2), ("other", 1),
    ]  # fmt: skip
    assert found.rows[0].first_flop == Bounds(low=4, central=10, high=14)
    assert found.rows[1].first_flop == Bounds(low=3, central=7, high=10)
    assert found.rows[0].flop.central == 2 * found.rows[1].flop.central
    assert (found.unestimated_records, found.disputed_records) == (1, 1)


def test_an_estimate_without_an_upper_end_stays_open(tmp_path: Path) -> None:
    """One open record opens the sum of first estimates, and its difference."""
    opened_end = msgspec.structs.replace(first_estimate(5), flop_high=None)
    with opened(tmp_path) as handle:
        records = [usage(0, 0, estimate=opened_end), usage(0, 1, estimate=first_estimate(5))]
        outcomes(handle, StreamSealer().seal(records))
        folded(handle)
        (row,) = stated(handle).restatement.rows
    assert row.first_flop == Bounds(low=4, central=10, high=None)
    assert row.difference[2] is None


def test_a_version_that_looks_like_a_carried_amount_loses_nothing(tmp_path: Path) -> None:
    """Versions are an agent's own text: they are in a group's key and in no quantity's name."""
    forged = first_estimate(5, "1", "table*1e30")
    sealer = StreamSealer()
    with opened(tmp_path) as handle:
        outcomes(handle, sealer.seal([usage(0, estimate=forged)]))
        folded(handle)  # so that the second is added to the stored first
        outcomes(handle, sealer.seal([usage(1, estimate=forged)]))
        (line,) = folded(handle, "atlas").lines
        handle.rebuild()
        assert handle.ledger.totals("atlas").lines == (line,)
    assert line.first_flop == Bounds(low=4, central=10, high=14)
    assert {name for name in line.sums if name.startswith("first")} == {
        "first_flop", "first_flop_high", "first_flop_low", "first_flop_records",
    }  # fmt: skip


def test_an_estimate_that_its_own_versions_do_not_give_is_told(tmp_path: Path) -> None:
    """It stands as sealed, its counters stay clear, and the statement says not to rely on it."""
    lie = msgspec.structs.replace(
        first_estimate(5), model_version=FLOP_MODEL_VERSION, table_version=TABLE.version
    )
    with opened(tmp_path) as handle:
        outcomes(handle, StreamSealer().seal([estimated(usage(0)), usage(0, 1, estimate=lie)]))
        (line,) = folded(handle, "atlas").lines
        found = stated(handle)
    assert line.standing == "clear"
    (row,) = found.restatement.rows
    assert row.is_contradicted
    assert row.first_flop.central == line.work.flop.central // 2 + 5
    assert "see to the agents that sealed them" in statement_markdown(found)
