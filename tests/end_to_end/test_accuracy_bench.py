"""The accuracy bench on the simulated driver: bounds hold; the document says what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from benchmarks.accuracy import simulated, tables
from benchmarks.accuracy.cases import ACCEPTED_PPM, Outcome, Run

VALIDATION: Final = Path(__file__).parents[2] / "docs" / "validation.md"
EXPLAINED: Final = {
    "product-fp8-undeclared": "central assumes BF16",
    "additions-fp32-cores": "a busy pipe is taken for multiply-adds",
    "legacy-mma-bf16": "a busy pipe is taken for its fastest instructions",
    "mixed-pipes": "precision is not declared",
}


@pytest.fixture(scope="module", params=simulated.DRIVERS)
def run(request: pytest.FixtureRequest) -> Run:
    """Every case on one driver."""
    driver: str = request.param
    return simulated.run(driver)


def test_bounds_hold_the_truth_in_every_case(run: Run) -> None:
    """Low <= truth <= high, whatever ran."""
    assert [outcome.case for outcome in run.outcomes if not outcome.contained] == []


def test_declared_products_are_within_the_target(run: Run) -> None:
    """Central lies within 2 % of the truth where the rate is known; other cases are explained."""
    off = {
        outcome.case
        for outcome in run.outcomes
        if outcome.error_ppm is not None and abs(outcome.error_ppm) > ACCEPTED_PPM
    }
    assert off <= set(EXPLAINED)
    assert "additions-fp32-cores" in off, "a case that must be off is, or the bench cannot fail"


def test_energy_is_the_counters(run: Run) -> None:
    """Metered energy is the simulated truth to the millijoule of its edges."""
    for outcome in run.outcomes:
        assert outcome.energy_mj is not None
        assert outcome.energy_check_mj is not None
        assert abs(outcome.energy_mj - outcome.energy_check_mj) <= 1, outcome.case


def test_the_document_shows_this_table(run: Run) -> None:
    """docs/validation.md holds what the bench prints today (make bench-accuracy writes it)."""
    assert tables.markdown_section(run) in VALIDATION.read_text(encoding="utf-8")


def test_an_outcome_outside_its_bounds_is_called_so() -> None:
    """The bench can fail."""
    wrong = Outcome(case="x", precision=None, tier="gpm_cycles", seconds=1.0, quantity="flop",
                    truth=100, truth_method="", low=101, central=110, high=120, energy_mj=None,
                    energy_check_mj=None)  # fmt: skip
    assert not wrong.contained
    assert wrong.error_ppm == 100_000
