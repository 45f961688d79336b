"""The reference pages say what the rule files say."""

from __future__ import annotations

from pathlib import Path

from flopledger_collector.instruments.definitions import load_instruments
from flopledger_collector.policies.definitions import load_policies
from flopledger_core.activities import ACTIVITIES

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"


def _rows(page: str) -> dict[str, list[list[str]]]:
    """Table rows by their first cell, without the backticks around it."""
    rows: dict[str, list[list[str]]] = {}
    for line in (REFERENCE / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0].strip("`"), []).append(cells[1:])
    return rows


def test_the_policies_page_has_every_verdict_as_the_files_have_it() -> None:
    """A reader of the page and a reader of a statement see the same verdicts."""
    rows, policies = _rows("policies.md"), load_policies()
    (heading,) = rows["activity"]
    columns = [policies[cell.strip("`")] for cell in heading]
    assert {policy.id for policy in columns} == set(policies)
    for activity in ACTIVITIES:
        (cells,) = rows[activity]
        for policy, cell in zip(columns, cells, strict=True):
            said = policy.activities[activity]
            assert cell == f"{said.verdict}{'*' if said.inferred else ''} ({said.rule})"


def test_the_policies_page_has_every_rule_with_its_citation() -> None:
    """Rules are quoted on the page as the files have them."""
    shown = [cells for rows in _rows("policies.md").values() for cells in rows]
    for policy in load_policies().values():
        assert all([rule.text, rule.citation] in shown for rule in policy.rules.values())


def test_the_instruments_page_has_every_threshold_and_deadline() -> None:
    """Comparator and threshold stand on the page digit by digit."""
    rows = _rows("instruments.md")
    for instrument in load_instruments(load_policies()).values():
        ((version, jurisdiction, test, scope, *_),) = rows[instrument.id]
        assert (version, jurisdiction) == (instrument.version, instrument.jurisdiction)
        assert test == f"{instrument.quantity} {instrument.comparator} {instrument.threshold}"
        assert scope == f"`{instrument.scope_policy}`"
        for trigger in instrument.triggers:
            assert [trigger.duty, trigger.deadline, trigger.citation] in rows[trigger.event]
