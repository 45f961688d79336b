"""Device time counts once, in its own time, and only from those who may write of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_core.units import MS_PER_DAY
from tests.collector.ledgers import declaration
from tests.collector.opened import folded, opened, opening, outcomes
from tests.collector.sealing import (
    MINUTE_MS,
    START_UNIX_MS,
    StreamSealer,
    TestClock,
    gap,
    hours,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle
    from flopledger_core.records import Record


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


def _standings(handle: LedgerHandle) -> dict[str, int]:
    """Folded records by standing."""
    counts: dict[str, int] = {}
    for line in folded(handle).lines:
        counts[line.standing] = counts.get(line.standing, 0) + line.records
    return counts


def test_records_their_author_may_not_write_count_nowhere(ledger: LedgerHandle) -> None:
    """Journaled and listed, but in no bound, no project and no import key; also when rebuilt."""
    eve = StreamSealer(4)
    records: list[Record] = [
        declaration("victim"), opening("victim"), hours("w:1", project="victim"), usage(0)
    ]  # fmt: skip
    assert outcomes(ledger, eve.seal(records)) == ["admitted"]
    own = ledger.entries.post(hours("w:1", project="victim"))
    assert own.outcome == "posted"
    before = folded(ledger)

    for again in (False, True):
        if again:
            ledger.rebuild()
        assert {line.account: line.tier for line in ledger.ledger.totals().lines} == {
            "atlas": "gpm_cycles",
            "victim": "gpu_hours",
        }
        projects = {one.project: one.opened for one in ledger.ledger.projects()}
        assert projects == {"atlas": False, "victim": False}
        assert ledger.ledger.health().audit_counts == {"wrong_author": 1}
    assert ledger.ledger.totals().lines == before.lines


def test_a_minute_metered_again_by_its_own_stream_is_disputed(tmp_path: Path) -> None:
    """However often; the honest minute after it is clear, in one request or in many."""
    with opened(tmp_path) as handle:
        sealer = StreamSealer()
        again = [sealer.minute(0, gpus=1) for _ in range(3)]
        assert set(outcomes(handle, *again[:2])) == {"admitted"}
        outcomes(handle, again[2])
        half = usage(
            0, start_boot_ms=1_000 + MINUTE_MS // 2, end_boot_ms=1_000 + MINUTE_MS * 3 // 2
        )
        outcomes(handle, sealer.seal([half]), sealer.minute(1, gpus=1))
        outcomes(handle, sealer.seal([gap(1, owner=project_owner())]))
        assert _standings(handle) == {"clear": 2, "disputed": 4}

        handle.rebuild()
        assert _standings(handle) == {"clear": 2, "disputed": 4}
        outcomes(handle, sealer.minute(1, gpus=1))
        assert _standings(handle) == {"clear": 2, "disputed": 5}


def test_windows_of_the_boot_before_do_not_dispute_the_new_boots(ledger: LedgerHandle) -> None:
    """After a reboot an agent seals what it had closed under the new boot's id, then a gap."""
    sealer = StreamSealer()
    outcomes(ledger, sealer.minute(50, gpus=1))
    dark = msgspec.structs.replace(gap(52), start_boot_ms=None)
    reborn = usage(53, start_boot_ms=5_000, end_boot_ms=5_000 + MINUTE_MS)
    later = usage(54, start_boot_ms=5_000 + MINUTE_MS, end_boot_ms=5_000 + 2 * MINUTE_MS)
    outcomes(
        ledger,
        sealer.seal([usage(51), dark], boot_id="boot-2"),
        sealer.seal([reborn], boot_id="boot-2"),
        sealer.seal([later], boot_id="boot-2"),
    )
    assert _standings(ledger) == {"clear": 5}

    outcomes(ledger, sealer.seal([reborn], boot_id="boot-2"))
    assert _standings(ledger) == {"clear": 5, "disputed": 1}


def test_work_that_begins_in_the_collectors_future_is_disputed(tmp_path: Path) -> None:
    """More than a day ahead; such a record holds no lease and the skewed one below it does."""
    with opened(tmp_path, clock=TestClock(START_UNIX_MS)) as handle:
        far = usage(0, start_unix_ms=START_UNIX_MS + MS_PER_DAY + 1)
        near = usage(1, start_unix_ms=START_UNIX_MS + MS_PER_DAY)
        first = StreamSealer(1)
        outcomes(handle, first.seal([far]), first.seal([near]))
        assert _standings(handle) == {"disputed": 1, "clear": 1}

        outcomes(handle, StreamSealer(2).seal([near]))
        assert _standings(handle) == {"disputed": 2, "clear": 1}
