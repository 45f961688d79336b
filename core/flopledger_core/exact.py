"""Sums without an upper limit in a database that has 64-bit integers: two exact limbs.

SQLite adds integers exactly up to 2^63. A total is stored as `high * LIMB + low` with
`0 <= low < LIMB`, so summing either column stays exact for nine million rows and totals reach
9e30; `join` turns two summed columns back into one Python integer. What one row cannot hold is
carried: `split_off` takes whole multiples of `CARRY` away, to be kept in a row of their own.
"""

from __future__ import annotations

from typing import Final

LIMB: Final = 10**12  # decimal, so that a person with a database shell can read the limbs
CARRY: Final = 10**30  # below the 9.2e30 that two limbs hold


def split_off(amount: int) -> tuple[int, int]:
    """`(carries, rest)`: whole multiples of `CARRY`, and what fits two limbs in any case."""
    return divmod(amount, CARRY)


def split(amount: int) -> tuple[int, int]:
    """`(high, low)` of an amount of either sign; `low` is never negative."""
    return divmod(amount, LIMB)


def join(high: int, low: int) -> int:
    """The amount that two summed limb columns stand for."""
    return high * LIMB + low
