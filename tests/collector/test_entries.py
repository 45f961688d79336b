"""People's entries: a stream a project, signed by the collector, refused if they cannot stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flopledger_collector.keys import load_or_create_key
from flopledger_core.batch import decode
from flopledger_core.errors import InvalidInput
from flopledger_core.records import DECIMAL_DIGITS_MAX
from flopledger_core.signing import verify
from tests.collector.ledgers import budget, declaration
from tests.collector.opened import amounts, folded, opened, opening
from tests.collector.sealing import START_UNIX_MS, TestClock, hours, project_owner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flopledger_collector.ledger.delta import UnfoldedEntry
    from flopledger_core.records import ProjectOpened


def _journal(directory: Path) -> list[UnfoldedEntry]:
    with opened(directory) as handle, handle.database.reading() as reading:
        return reading.unfolded(100)


def test_each_project_has_a_stream_of_its_own_that_links(tmp_path: Path) -> None:
    """Everything verifies with the collector's public key alone."""
    with opened(tmp_path) as handle:
        first = handle.entries.post(opening("atlas"))
        second = handle.entries.post(opening("atlas", title="Atlas"))
        other = handle.entries.post(opening("borealis"))
        nobodys = handle.entries.post(hours("west:9", project=None))

    assert first.stream_id == second.stream_id
    assert len({first.stream_id, other.stream_id, nobodys.stream_id}) == 3
    assert (first.sequence, second.sequence) == (0, 1)
    batches = [decode(entry.content) for entry in _journal(tmp_path)]
    for batch in batches:
        verify(batch.header.public_key, batch.signature, batch.header_bytes)
        assert batch.header.author == "collector"
    linked = next(batch for batch in batches if batch.header.sequence == 1)
    assert linked.header.previous_hash == first.batch_hash


def test_a_clock_that_steps_back_does_not_reorder_entries(tmp_path: Path) -> None:
    """A stream's posting times never fall."""
    clock = TestClock(START_UNIX_MS + 1_000)
    with opened(tmp_path, clock=clock) as handle:
        handle.entries.post(opening(title="one"))
        clock.unix_ms = START_UNIX_MS
        handle.entries.post(opening(title="two"))
        folded(handle)
        assert [project.title for project in handle.ledger.projects()] == ["two"]


def test_a_lost_key_begins_a_successor_stream_that_names_its_predecessor(tmp_path: Path) -> None:
    """Old entries stay; the new stream says what it continues."""
    with opened(tmp_path) as handle:
        first = handle.entries.post(opening())
        key_file = handle.config.key_file
    key_file.unlink()
    with opened(tmp_path) as handle:
        second = handle.entries.post(opening(title="again"))

    assert second.stream_id != first.stream_id
    header = next(
        batch.header
        for batch in (decode(entry.content) for entry in _journal(tmp_path))
        if batch.header.stream_id == second.stream_id
    )
    assert header.predecessor is not None
    assert header.predecessor.batch_hash == first.batch_hash


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (lambda: opening("idle"), "project"),
        (lambda: opening("<script>"), "project"),
        (lambda: msgspec.structs.replace(opening(), author=""), "author"),
        (lambda: msgspec.structs.replace(opening(), at_unix_ms=-1), "at_unix_ms"),
    ],
)
def test_an_entry_that_cannot_stand_is_refused_and_posts_nothing(
    record: Callable[[], ProjectOpened], field: str, tmp_path: Path
) -> None:
    """The sentence names the field."""
    with opened(tmp_path) as handle:
        with pytest.raises(InvalidInput, match=field):
            handle.entries.post(opening(), record())
        assert handle.ledger.position().provisional_entries == 0


def test_one_entry_speaks_of_one_project(tmp_path: Path) -> None:
    """`post_many` groups what `post` refuses to mix."""
    with opened(tmp_path) as handle:
        with pytest.raises(InvalidInput, match="apart"):
            handle.entries.post(opening("atlas"), opening("borealis"))
        posted = handle.entries.post_many([opening("atlas"), opening("borealis"), hours("w:1")])
        assert [entry.posted_records for entry in posted] == [2, 1]


def test_an_amount_beyond_the_cap_is_refused_before_it_is_journaled(tmp_path: Path) -> None:
    """One digit too many; the largest amount is taken and folded."""
    with opened(tmp_path) as handle:
        with pytest.raises(InvalidInput, match="flop_high"):
            handle.entries.post(declaration(flop_high="1" + "0" * DECIMAL_DIGITS_MAX))
        with pytest.raises(InvalidInput, match="limit"):
            handle.entries.post(budget(limit=str(10**59)))
        assert handle.ledger.position().provisional_entries == 0
        handle.entries.post(declaration(flop_high="9" * DECIMAL_DIGITS_MAX))
        (line,) = folded(handle).lines
        assert line.work.flop.high == 10**DECIMAL_DIGITS_MAX - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"accelerator": "A100"},
        {"precision": "fp16"},
        {"utilization_per_mille": 500},
        {"owner": project_owner("borealis", job="w:1")},
    ],
    ids=["accelerator", "precision", "utilisation", "project"],
)
def test_an_import_with_other_terms_is_called_differing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """The first import stands; who, when and which file may differ."""
    with opened(tmp_path) as handle:
        first = handle.entries.post(hours("w:1"), hours("w:2"))
        before = amounts(handle)

        other = msgspec.structs.replace(hours("w:1"), **changes)
        answer = handle.entries.post(other)
        assert (answer.outcome, answer.differing, answer.duplicates) == ("differing", ("w:1",), ())
        assert (answer.stream_id, answer.sequence) == (first.stream_id, first.sequence)
        same = msgspec.structs.replace(hours("w:2"), source="sacct b", at_unix_ms=5, author="eve")
        again = handle.entries.post(same)
        assert (again.outcome, again.differing, again.duplicates) == ("duplicate", (), ("w:2",))
        assert amounts(handle) == before


def test_two_terms_for_one_job_in_one_import_differ(tmp_path: Path) -> None:
    """The first of them is posted."""
    with opened(tmp_path) as handle:
        answer = handle.entries.post(hours("w:1"), hours("w:1", gpus=4), hours("w:1"))
        assert (answer.posted_records, answer.differing) == (1, ("w:1",))
        assert answer.duplicates == ("w:1",)


def test_the_key_file_is_private_and_made_once(tmp_path: Path) -> None:
    """Mode 0600, no temporary left; a readable one is refused."""
    path = tmp_path / "state" / "collector.key"
    key = load_or_create_key(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["collector.key"]
    assert load_or_create_key(path).public_key == key.public_key
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        load_or_create_key(path)
