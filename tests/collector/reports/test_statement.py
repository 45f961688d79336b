"""Statements: complete, exact, itemised; and their two written forms."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flopledger_collector.handle import LedgerHandle
from flopledger_collector.reports.json_form import encode, statement_document
from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.markdown_table import text
from flopledger_collector.reports.statement import Period, Statement, build_statement
from flopledger_collector.status import load_rules
from flopledger_core.bounds import total
from flopledger_core.errors import InvalidInput, UnknownName
from tests.collector.ledgers import HOSTILE, rich_ledger
from tests.collector.opened import send
from tests.collector.sealing import START_UNIX_MS, StreamSealer

GOLDEN = Path(__file__).parents[2] / "golden" / "statements"
UPDATE = "UPDATE_GOLDEN"  # set it to write the golden files again, then read the difference
RULES = load_rules()
GENERATED_UNIX_MS = START_UNIX_MS + 40 * 86_400_000
DAY_MS = 86_400_000


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[LedgerHandle]:
    """The ledger with something of everything."""
    with rich_ledger(tmp_path) as found:
        yield found


def statement(handle: LedgerHandle, project: str = "atlas", **options: object) -> Statement:
    """A project's statement at a fixed instant."""
    return build_statement(
        handle.ledger,
        RULES,
        project,
        generated_unix_ms=GENERATED_UNIX_MS,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("project", ["atlas", "birch", "empty", "stray"])
def test_the_items_are_the_total_exactly(handle: LedgerHandle, project: str) -> None:
    """An auditor adds the lines up and gets the total, to the last FLOP."""
    found = statement(handle, project)
    assert total(item.line.work.flop for item in found.items) == found.usage.work.flop
    assert total(item.energy_mj for item in found.items) == found.usage.energy_mj
    assert total(item.gpu_time_ms for item in found.items) == found.usage.gpu_time_ms
    for policy in found.policies:
        assert total(line.contribution for line in policy.view.lines) == policy.view.total
        own = total(line.amount for line in policy.view.lines)
        assert own == found.usage.work.flop + found.shared.work.flop


def test_a_bridge_leads_from_one_policy_to_another(handle: LedgerHandle) -> None:
    """First total plus the steps is the second total."""
    for bridge in statement(handle).bridges:
        for bound in ("low", "central"):
            steps = sum(getattr(step, bound) for step in bridge.steps)
            assert getattr(bridge.from_total, bound) + steps == getattr(bridge.to_total, bound)


def test_gaps_and_disputes_are_named_items(handle: LedgerHandle) -> None:
    """What nobody metered and what is in doubt can be found by number."""
    found = statement(handle)
    assert [item.line.tier for item in found.gaps] == ["none"]
    assert [item.line.standing for item in found.disputed] == ["disputed"]
    assert found.gaps[0].line.work.flop.low == 0


def test_no_other_project_is_on_a_statement(handle: LedgerHandle) -> None:
    """A statement goes to outsiders; it shows one project and the ledger's own accounts."""
    for project in ("birch", "empty"):
        found = statement(handle, project)
        assert "stray" not in statement_markdown(found)
        assert b"atlas" not in encode(statement_document(found))


def test_a_period_holds_what_began_in_it(handle: LedgerHandle) -> None:
    """Items belong to days; instruments still speak of the whole life."""
    inside = Period(start_unix_ms=START_UNIX_MS, end_unix_ms=START_UNIX_MS + DAY_MS)
    after = Period(start_unix_ms=START_UNIX_MS + DAY_MS)
    whole = statement(handle)
    assert statement(handle, period=inside).items == whole.items
    later = statement(handle, period=after)
    assert later.items == ()
    assert later.assessments == whole.assessments
    assert "whole life" in statement_markdown(later)
    assert statement(handle, "birch", period=after).declarations == ()
    with pytest.raises(InvalidInput, match="midnight"):
        statement(handle, period=Period(start_unix_ms=5))


def test_policies_can_be_chosen(handle: LedgerHandle) -> None:
    """Only the views asked for; an unknown policy or project is an error."""
    found = statement(handle, policies=("us-state-1e26", "ec-training"))
    assert [one.view.policy_id for one in found.policies] == ["us-state-1e26", "ec-training"]
    assert len(found.bridges) == 1
    with pytest.raises(UnknownName, match="policy"):
        statement(handle, policies=("nope",))
    with pytest.raises(UnknownName, match="flopledger project create"):
        statement(handle, "nope")


def test_unfolded_entries_make_a_statement_provisional(handle: LedgerHandle) -> None:
    """A statement that lacks journaled entries says how many."""
    send(handle, StreamSealer(3, node="node-3").minute(0))
    assert "**Provisional.** 1 journal entries" in statement_markdown(statement(handle))


def test_hostile_text_cannot_break_a_table(handle: LedgerHandle) -> None:
    """A title with pipes, line breaks and markup stays in its cell."""
    line = next(
        one
        for one in statement_markdown(statement(handle, "birch")).splitlines()
        if one.startswith("| Title |")
    )
    assert "<script>" not in line
    assert line.count("|") - line.count("\\|") == 3
    assert "\n" not in text(HOSTILE)


def test_json_amounts_are_decimal_strings(handle: LedgerHandle) -> None:
    """No amount loses a digit in a reader that has floating point only."""
    document = json.loads(encode(statement_document(statement(handle))))
    for item in document["items"]:
        assert all(isinstance(amount, str) for amount in item["sums"].values())
        assert isinstance(item["flop"]["low"], str)
    assert document["instruments"][0]["threshold"] == str(10**25)
    assert document["instruments"][0]["ratio"]["central"].startswith("0.00000")
    assert document["position"]["entries"] == 15


def test_provenance_is_printed(handle: LedgerHandle) -> None:
    """Where the inputs come from stands at the end."""
    found = statement(handle, provenance=("power: recorded",))
    assert statement_markdown(found).endswith("- power: recorded\n")
    assert statement_document(found)["provenance"] == ["power: recorded"]


@pytest.mark.parametrize("project", ["atlas", "birch", "empty"])
@pytest.mark.parametrize("form", ["markdown", "json"])
def test_a_statement_is_as_it_was(handle: LedgerHandle, project: str, form: str) -> None:
    """The two forms are golden files: a change of what auditors read is seen and meant.

    Write them again with UPDATE_GOLDEN=1 and read the difference.
    """
    found = statement(handle, project)
    position = msgspec.structs.replace(
        found.position,
        ledger_id="00" * 16,
        heads_root="00" * 32,
        at_unix_ms=GENERATED_UNIX_MS,
    )
    found = msgspec.structs.replace(found, position=position)
    if form == "markdown":
        content = statement_markdown(found).encode()
    else:
        content = encode(statement_document(found))
    file = GOLDEN / f"{project}.{'md' if form == 'markdown' else 'json'}"
    if os.environ.get(UPDATE):
        file.write_bytes(content)
    assert content.decode() == file.read_text(encoding="utf-8")
