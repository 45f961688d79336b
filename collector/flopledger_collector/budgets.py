"""Budgets: thresholds of one's own, compared in the same way as a law's.

A budget is exceeded when more than its limit is used, never by reaching it. The comparison is
over the whole interval, so a budget that only might be exceeded says so. A budget never decides
what counts: whoever calls hands in the total that the budget's project is measured by.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flopledger_collector.instruments.comparison import (
    Comparator,
    Comparison,
    Ratio,
    compare,
    ratio,
)
from flopledger_core.bounds import Bounds
from flopledger_core.records import BudgetSet

BUDGET_COMPARATOR: Final[Comparator] = ">"


class BudgetEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """A budget beside what was used, in the quantity's own unit (FLOP, mJ, cents, ms).

    `reached` is used over limit; None for a limit of zero, of which no share can be reached.
    """

    project: str
    name: str
    quantity: str
    currency: str | None
    limit: int
    used: Bounds
    verdict: Comparison
    reached: Ratio | None


def evaluate_budget(budget: BudgetSet, used: Bounds) -> BudgetEvaluation:
    """The verdict on `used`, a total in the budget's own quantity (and currency)."""
    limit = int(budget.limit)
    return BudgetEvaluation(
        project=budget.project,
        name=budget.name,
        quantity=budget.quantity,
        currency=budget.currency,
        limit=limit,
        used=used,
        verdict=compare(used, BUDGET_COMPARATOR, limit),
        reached=ratio(used, limit),
    )
