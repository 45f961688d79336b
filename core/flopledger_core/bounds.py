"""Bounds: a quantity that is not known exactly, as the limits it must lie between.

Bounds are limits, not standard deviations: they add linearly, low rounds down and high rounds
up. An open high end (`None`) means that nothing known limits it; it stays open in every sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_core.errors import InvalidInput
from flopledger_core.units import ceil_div, floor_div

if TYPE_CHECKING:
    from collections.abc import Iterable


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """`low <= central <= high`, exact integers without an upper limit; `high` None is open."""

    low: int
    central: int
    high: int | None

    def __post_init__(self) -> None:
        if self.low > self.central or (self.high is not None and self.central > self.high):
            raise InvalidInput(
                "bounds",
                (self.low, self.central, self.high),
                "give them in order: low <= central <= high",
            )

    def __add__(self, other: Bounds) -> Bounds:
        high = None if self.high is None or other.high is None else self.high + other.high
        return Bounds(low=self.low + other.low, central=self.central + other.central, high=high)

    def scaled(self, numerator: int, denominator: int) -> Bounds:
        """These bounds times a non-negative rational: low rounds down, high up, central down."""
        if numerator < 0 or denominator <= 0:
            raise InvalidInput("scale", (numerator, denominator), "give a non-negative rational")
        return Bounds(
            low=floor_div(self.low * numerator, denominator),
            central=floor_div(self.central * numerator, denominator),
            high=None if self.high is None else ceil_div(self.high * numerator, denominator),
        )

    def possibly_none(self) -> Bounds:
        """What a rule that may or may not count this contributes: from zero up to all of it."""
        high = None if self.high is None else max(0, self.high)
        return Bounds(low=min(0, self.low), central=self.central, high=high)

    @property
    def is_exact(self) -> bool:
        """True when the limits leave no room."""
        return self.low == self.high


ZERO = Bounds(low=0, central=0, high=0)


def exactly(amount: int) -> Bounds:
    """Bounds that leave no room: a count, or a sum of counters."""
    return Bounds(low=amount, central=amount, high=amount)


def total(parts: Iterable[Bounds]) -> Bounds:
    """The linear sum of bounds; zero when there are none."""
    result = ZERO
    for part in parts:
        result = result + part
    return result
