"""Folding: exact sums by group, once, in any grouping, and the same again when rebuilt."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, select

from flopledger_collector.journal import Changes, JournalEntry, StreamState
from flopledger_collector.ledger import fold
from flopledger_collector.ledger.delta import Delta, ProjectDelta, UnfoldedEntry
from flopledger_collector.ledger.fold import Folder
from flopledger_collector.store import schema
from flopledger_core import exact
from flopledger_core.batch import BatchHeader, batch_hash
from flopledger_core.bounds import total
from flopledger_core.errors import InvalidInput
from flopledger_core.flop import basis
from flopledger_core.records import DECIMAL_DIGITS_MAX, BudgetSet, Declaration, PersonRecord
from flopledger_core.units import MS_PER_DAY
from tests.collector.opened import folded, opened, opening, outcomes
from tests.collector.sealing import (
    IDLE,
    MINUTE_MS,
    START_UNIX_MS,
    StreamSealer,
    first_estimate,
    gap,
    hosts,
    hours,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle

DAY_MINUTES = 1440


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


def declaration(amount: int, **changes: Any) -> Declaration:
    """An opening balance of some executed FLOP, exactly known."""
    fields: dict[str, Any] = {
        "project": "atlas", "model": "atlas-1", "run": None, "activity": "pretrain",
        "start_unix_ms": START_UNIX_MS, "end_unix_ms": START_UNIX_MS + MS_PER_DAY,
        "flop_low": str(amount), "flop_central": str(amount), "flop_high": str(amount),
        "flop_basis": "executed", "energy_mj": None, "gpu_time_ms": None, "cost_cents": "1250",
        "currency": "EUR", "method": "opening balance", "evidence": "ledger of 2025",
        "at_unix_ms": START_UNIX_MS, "author": "ops",
    }  # fmt: skip
    return Declaration(**(fields | changes))


def budget(limit: int, at: int = START_UNIX_MS) -> BudgetSet:
    """A FLOP budget under one name."""
    return BudgetSet(
        project="atlas", name="q4", quantity="flop", currency=None, limit=str(limit),
        at_unix_ms=at, author="ops",
    )  # fmt: skip


def projections(directory: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every projection, sorted."""
    engine = create_engine(f"sqlite:///{directory}/ledger.sqlite3")
    with engine.connect() as connection:
        rows = {
            table.name: sorted(tuple(row) for row in connection.execute(select(table)))
            for table in schema.PROJECTIONS
        }
    engine.dispose()
    return rows


def test_lines_are_the_exact_sums_of_the_records_bases(ledger: LedgerHandle) -> None:
    """By account, activity, tier and standing; nothing more and nothing less."""
    sealer = StreamSealer()
    atlas = [usage(minute, gpu, busy_per_mille=100 + gpu) for minute in range(3) for gpu in (0, 1)]
    idle = [usage(minute, 2, owner=IDLE, busy_per_mille=0) for minute in range(3)]
    for minute in range(3):
        batch = sealer.seal([*atlas[minute * 2 : minute * 2 + 2], idle[minute], gap(minute, gpu=3)])
        assert outcomes(ledger, batch) == ["admitted"]

    totals = folded(ledger)
    lines = {(line.account, line.tier): line for line in totals.lines}
    assert set(lines) == {("atlas", "gpm_cycles"), ("idle", "gpm_cycles"), ("unattributed", "none")}
    line = lines["atlas", "gpm_cycles"]
    for quantity in basis(atlas[0]):
        assert line.sums[quantity] == sum(basis(record).get(quantity, 0) for record in atlas)
    assert (line.project, line.kind, line.records) == ("atlas", "attributed", 6)
    assert (line.first_unix_ms, line.last_unix_ms) == (START_UNIX_MS, START_UNIX_MS + 3 * MINUTE_MS)
    assert line.accelerator == "H100 SXM"
    assert line.energy_mj.central == 6 * 600 * MINUTE_MS
    assert lines["unattributed", "none"].sums["gap_time_ms"] == 3 * MINUTE_MS
    assert ledger.ledger.health().gap_time_ms == 3 * MINUTE_MS
    assert {found.account for found in ledger.ledger.totals("atlas").lines} == {"atlas"}


def test_a_total_of_ten_to_the_thirty_is_exact_through_sql(ledger: LedgerHandle) -> None:
    """Two limbs carry what 64 bits cannot, across days that SQL adds up."""
    big = 10**29 // 4
    for day in range(4):
        start = START_UNIX_MS + day * MS_PER_DAY
        part = declaration(big + day, start_unix_ms=start, end_unix_ms=start)
        ledger.entries.post(*[part] * 20)

    flop = total(line.work.flop for line in folded(ledger, "atlas").lines)
    expected = 2 * (10**30 + 60)
    assert (flop.low, flop.central, flop.high) == (expected, expected, expected)
    assert max(exact.split(expected)) < 2**63


def test_a_thousand_of_the_largest_amounts_are_exact(tmp_path: Path) -> None:
    """What a row cannot hold is carried; neither the fold nor SQL's own sums overflow."""
    biggest = 10**DECIMAL_DIGITS_MAX - 1
    with opened(tmp_path) as ledger:
        for day in range(5):
            start = START_UNIX_MS + day * MS_PER_DAY
            part = declaration(biggest, start_unix_ms=start, end_unix_ms=start)
            for _ in range(2):
                ledger.entries.post(*[part] * 100)
                ledger.folder.fold()
        before = folded(ledger, "atlas").lines
        flop = total(line.work.flop for line in before)
        assert (flop.low, flop.high) == (1000 * biggest, 1000 * biggest)
        assert ledger.ledger.health().audit_counts == {}
        live = projections(tmp_path)

        ledger.rebuild()
        assert projections(tmp_path) == live
        assert ledger.ledger.totals("atlas").lines == before


def _journaled(ledger: LedgerHandle, sealer: StreamSealer, content: bytes) -> None:
    """Write a batch past admission, as an older program may have."""
    header_bytes = content.partition(b"\n")[0]
    header = msgspec.json.decode(header_bytes, type=BatchHeader)
    name = batch_hash(header_bytes)
    entry = JournalEntry(
        stream_id=sealer.stream_id, sequence=header.sequence, batch_hash=name, content=content,
        received_unix_ms=START_UNIX_MS, findings=(),
    )  # fmt: skip
    state = StreamState.after(header, "f", name, START_UNIX_MS)
    with ledger.database.writing() as writing:
        writing.journal.write(Changes(entries=[entry], streams=[state]))


def test_an_entry_that_cannot_be_read_is_noted_and_never_stops_the_fold(tmp_path: Path) -> None:
    """It adds nothing, what comes after it counts, and a rebuild says the same."""
    with opened(tmp_path) as ledger:
        sealer = StreamSealer(5)
        for amount in (10**59, 7):
            content = sealer.seal([declaration(amount), opening()], author="collector")
            _journaled(ledger, sealer, content)

        totals = folded(ledger)
        assert [line.sums["declared_flop"] for line in totals.lines] == [7]
        assert (totals.position.entries, totals.position.provisional_entries) == (2, 0)
        assert ledger.ledger.health().audit_counts == {"unfoldable": 1}
        live = projections(tmp_path)
        ledger.rebuild()
        assert projections(tmp_path) == live
        assert ledger.ledger.health().audit_counts == {"unfoldable": 1}


def test_a_record_belongs_to_the_utc_day_it_starts_in(ledger: LedgerHandle) -> None:
    """Periods are whole UTC days, half-open."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.minute(DAY_MINUTES - 1, gpus=1), sealer.minute(DAY_MINUTES, gpus=1))
    folded(ledger)
    midnight = START_UNIX_MS + MS_PER_DAY

    before = ledger.ledger.totals(end_unix_ms=midnight).lines
    after = ledger.ledger.totals(start_unix_ms=midnight).lines
    assert [line.records for line in before] == [line.records for line in after] == [1]
    with pytest.raises(InvalidInput, match="midnight"):
        ledger.ledger.totals(start_unix_ms=midnight + 1)


def test_hours_become_a_line_once_however_often_they_are_imported(ledger: LedgerHandle) -> None:
    """The import key is the scheduler's own."""
    posted = ledger.entries.post(hours("west:1"), hours("west:2"))
    assert (posted.outcome, posted.posted_records) == ("posted", 2)

    again = ledger.entries.post(hours("west:1"), hours("west:3"))
    assert (again.posted_records, again.duplicates) == (1, ("west:1",))
    only = ledger.entries.post(hours("west:2"))
    assert (only.outcome, only.sequence, only.batch_hash) == ("duplicate", 0, posted.batch_hash)

    (line,) = folded(ledger, "atlas").lines
    assert (line.tier, line.records, line.accelerator) == ("gpu_hours", 3, "H100 SXM")
    assert line.work.flop.central > 0
    assert {job.job for job in ledger.ledger.jobs("atlas")} == {"west:1", "west:2", "west:3"}


def test_the_budget_posted_last_is_effective_whatever_its_clock_said(ledger: LedgerHandle) -> None:
    """A wall clock that steps back does not bring an old limit back."""
    ledger.entries.post(budget(100))
    ledger.entries.post(budget(200, at=START_UNIX_MS - MS_PER_DAY))
    folded(ledger)

    (effective,) = ledger.ledger.budgets("atlas")
    assert effective.limit == "200"


def test_a_project_is_flagged_until_it_is_opened(ledger: LedgerHandle) -> None:
    """Usage first, a person later; the last title stands."""
    outcomes(ledger, StreamSealer().minute(0))
    folded(ledger)
    assert [project.opened for project in ledger.ledger.projects()] == [False]

    ledger.entries.post(opening(title="one"))
    ledger.entries.post(opening(title="Atlas"))
    folded(ledger)
    (project,) = ledger.ledger.projects()
    assert (project.opened, project.title, project.entity) == (True, "Atlas", "example-lab")
    assert project.first_unix_ms == START_UNIX_MS
    assert ledger.ledger.declarations("atlas") == ()


def test_declarations_are_read_back_whole(ledger: LedgerHandle) -> None:
    """In the order they were posted."""
    ledger.entries.post(declaration(1))
    ledger.entries.post(declaration(2))
    folded(ledger)

    assert ledger.ledger.declarations("atlas") == (declaration(1), declaration(2))
    (line,) = ledger.ledger.totals("atlas").lines
    assert line.sums["declared_cost_cents_EUR"] == 2_500


def test_what_is_not_folded_yet_is_called_provisional(ledger: LedgerHandle) -> None:
    """Totals name the position they cover."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.minute(0))
    covered = folded(ledger).position
    outcomes(ledger, sealer.minute(1))

    position = ledger.ledger.position()
    assert (position.entries, position.provisional_entries) == (1, 1)
    assert position.heads_root == covered.heads_root
    assert folded(ledger).position.heads_root != covered.heads_root


def _mixed_history(ledger: LedgerHandle, seed: int, *, fold_between: bool) -> None:
    """Agents, people, disputes, two streams on a device, folded at random moments."""
    chance = random.Random(seed)
    sealers = [StreamSealer(index, node=f"node-{index % 3}") for index in range(1, 5)]
    ledger.entries.post(budget(1), declaration(1))
    for minute in range(12):
        for sealer in sealers:
            owner = chance.choice([IDLE, project_owner("atlas"), project_owner("b", job="j1")])
            energy = chance.choice([10, None, 10**12])
            records = [
                usage(minute * 200, gpu, owner=owner, node=sealer.node, energy_mj=energy)
                for gpu in range(2)
            ]
            scope = chance.choice(["gpu", "module"])
            first = chance.choice([None, first_estimate(minute), first_estimate(1, "1", "b")])
            records.append(
                usage(minute * 200, 2, node=sealer.node, energy_scope=scope, estimate=first)
            )
            node_minute = hosts(minute * 200, owner=owner) if owner != IDLE else []
            outcomes(ledger, sealer.seal([*records, *node_minute]))
        ledger.entries.post(hours(f"west:{minute % 5}"))
        if chance.random() < 0.4:
            choices: list[PersonRecord] = [budget(minute), opening(), declaration(minute + 1)]
            ledger.entries.post(chance.choice(choices))
        if fold_between and chance.random() < 0.5:
            ledger.folder.fold()


@pytest.mark.parametrize("seed", range(4))
def test_a_rebuild_equals_the_live_projections_exactly(seed: int, tmp_path: Path) -> None:
    """The journal is the only truth; everything else can be made again from it."""
    with opened(tmp_path) as ledger:
        _mixed_history(ledger, seed, fold_between=True)
        before = folded(ledger)
        live = projections(tmp_path)
        assert all(live.values()), [name for name, rows in live.items() if not rows]

        assert ledger.rebuild() == before.position.entries
        assert projections(tmp_path) == live
        assert ledger.ledger.totals().lines == before.lines
        assert ledger.entries.post(hours("west:1")).outcome == "duplicate"


def test_a_rebuild_in_small_chunks_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the journal is cut."""
    monkeypatch.setattr(fold, "CHUNK_ENTRIES_MAX", 3)
    monkeypatch.setattr("flopledger_collector.ledger.rebuild.CHUNK_ENTRIES_MAX", 5)
    with opened(tmp_path) as ledger:
        _mixed_history(ledger, 7, fold_between=True)
        folded(ledger)
        live = projections(tmp_path)

        ledger.rebuild()
        assert projections(tmp_path) == live


def test_folders_at_once_fold_each_entry_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command folding beside the server, chunk against chunk."""
    monkeypatch.setattr(fold, "CHUNK_ENTRIES_MAX", 4)
    with opened(tmp_path) as ledger:
        sealers = [StreamSealer(seed, node=f"node-{seed}") for seed in range(1, 21)]
        for sealer in sealers:
            outcomes(ledger, *(sealer.minute(minute, gpus=1) for minute in range(3)))
        folders = [Folder(ledger.database, interval_seconds=1) for _ in range(4)]
        threads = [threading.Thread(target=folder.fold) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

        (line,) = folded(ledger).lines
        assert line.records == 60
        live = projections(tmp_path)
        ledger.rebuild()
        assert projections(tmp_path) == live


_delta = st.builds(
    ProjectDelta,
    title=st.sampled_from(["x", "y"]),
    opened_unix_ms=st.integers(0, 3),
    opened_rank=st.sampled_from(["", "1", "2"]),
    first_unix_ms=st.none() | st.integers(0, 3),
    last_unix_ms=st.none() | st.integers(0, 3),
)


@given(one=_delta, two=_delta, three=_delta)
@settings(max_examples=60)
def test_project_deltas_merge_in_any_grouping(
    one: ProjectDelta, two: ProjectDelta, three: ProjectDelta
) -> None:
    """Associative, which is what makes chunks harmless."""
    assert one.merged(two).merged(three) == one.merged(two.merged(three))


@given(
    parts=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12),
    cut=st.integers(0, 12),
)
@settings(max_examples=30)
def test_deltas_add_up_however_entries_are_cut(parts: list[int], cut: int) -> None:
    """Two deltas hold what one delta over all entries holds."""
    sealer = StreamSealer()
    entries = [
        UnfoldedEntry(
            stream_id=sealer.stream_id, sequence=index, batch_hash="", findings="[]",
            content=sealer.seal([usage(index, energy_mj=amount)]),
        )
        for index, amount in enumerate(parts)
    ]  # fmt: skip

    def energy(of: list[UnfoldedEntry]) -> int:
        delta = Delta()
        for entry in of:
            delta.take(entry)
        return sum(group.sums.get("energy_mj", 0) for group in delta.groups.values())

    assert energy(entries[:cut]) + energy(entries[cut:]) == energy(entries) == sum(parts)
