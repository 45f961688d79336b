"""Budgets: exceeded by using more than the limit, compared over the whole interval."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest

from flopledger_collector.budgets import evaluate_budget
from flopledger_core.bounds import Bounds, exactly
from flopledger_core.records import BudgetSet


def _budget(
    limit: int, quantity: Literal["flop", "energy_mj", "cost_cents", "gpu_time_ms"] = "flop"
) -> BudgetSet:
    return BudgetSet(
        project="atlas",
        name="first quarter",
        quantity=quantity,
        currency="EUR" if quantity == "cost_cents" else None,
        limit=str(limit),
        at_unix_ms=0,
        author="someone",
    )


def test_reaching_a_budget_is_not_exceeding_it() -> None:
    """A budget is what may be used."""
    at = evaluate_budget(_budget(10**20), exactly(10**20))
    assert at.verdict == "below"
    assert at.reached is not None
    assert at.reached.central == Fraction(1)
    assert evaluate_budget(_budget(10**20), exactly(10**20 + 1)).verdict == "exceeds"


@pytest.mark.parametrize("quantity", ["flop", "energy_mj", "cost_cents", "gpu_time_ms"])
def test_every_quantity_is_compared_in_the_same_way(
    quantity: Literal["flop", "energy_mj", "cost_cents", "gpu_time_ms"],
) -> None:
    """The unit is the quantity's own; the currency travels with a cost."""
    found = evaluate_budget(_budget(100, quantity), Bounds(low=40, central=50, high=120))
    assert found.verdict == "may_exceed"
    assert found.reached is not None
    assert (found.reached.low, found.reached.high) == (Fraction(2, 5), Fraction(6, 5))
    assert found.currency == ("EUR" if quantity == "cost_cents" else None)


def test_no_share_of_a_zero_budget_can_be_reached_but_any_use_exceeds_it() -> None:
    """The share is absent, not zero."""
    assert evaluate_budget(_budget(0), exactly(0)).verdict == "below"
    found = evaluate_budget(_budget(0), exactly(1))
    assert (found.verdict, found.reached) == ("exceeds", None)
