"""Sums without an upper limit in a database that has 64-bit integers: two exact limbs.

SQLite adds integers exactly up to 2^63. A total is stored as `high * LIMB + low` with
`0 <= low < LIMB`, so summing either column stays exact for nine million rows and totals reach
9e30; `join` turns two summed columns back into one Python integer.
"""

from __future__ import annotations

from typing import Final

LIMB: Final = 10**12  # decimal, so that a person with a database shell can read the limbs


def split(amount: int) -> tuple[int, int]:
    """`(high, low)` of an amount of either sign; `low` is never negative."""
    return divmod(amount, LIMB)


def join(high: int, low: int) -> int:
    """The amount that two summed limb columns stand for."""
    return high * LIMB + low
