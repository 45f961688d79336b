"""Compares an interval with a threshold; the one comparison that instruments and budgets share.

A total is known within bounds, so the answer has three values: every value inside the bounds
satisfies the comparator, none does, or some do. The comparator is the text's own (`>` is not
`>=`), and all arithmetic is on exact integers. An open high end is never below anything.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, Literal, get_args

import msgspec

from flopledger_core.bounds import Bounds
from flopledger_core.errors import InvalidInput, UnknownName

Comparator = Literal[">", ">="]
COMPARATORS: Final[tuple[str, ...]] = get_args(Comparator)

Comparison = Literal["below", "may_exceed", "exceeds"]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Value over threshold, exactly; `high` is None where the value's high end is open."""

    low: Fraction
    central: Fraction
    high: Fraction | None


def satisfies(amount: int, comparator: Comparator, threshold: int) -> bool:
    """Whether one amount satisfies the comparator, as the text has it."""
    if comparator == ">":
        return amount > threshold
    if comparator == ">=":
        return amount >= threshold
    raise UnknownName("comparator", comparator, f"use one of: {', '.join(COMPARATORS)}")


def compare(value: Bounds, comparator: Comparator, threshold: int) -> Comparison:
    """`exceeds` when all of the interval satisfies, `below` when none of it, else `may_exceed`."""
    if satisfies(value.low, comparator, threshold):
        return "exceeds"
    if value.high is not None and not satisfies(value.high, comparator, threshold):
        return "below"
    return "may_exceed"


def ratio(value: Bounds, threshold: int) -> Ratio | None:
    """The share of the threshold that is reached; None for a threshold of zero."""
    if threshold < 0:
        raise InvalidInput("threshold", threshold, "a threshold is not negative")
    if threshold == 0:
        return None
    return Ratio(
        low=Fraction(value.low, threshold),
        central=Fraction(value.central, threshold),
        high=None if value.high is None else Fraction(value.high, threshold),
    )
