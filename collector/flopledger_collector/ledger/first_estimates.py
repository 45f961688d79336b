"""What the sums of a group say of the estimates that agents sealed into its records.

A group holds records of one model and table version only, so its sum of first estimates stands
beside one figure of today, for exactly the same records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_core.bounds import Bounds

if TYPE_CHECKING:
    from collections.abc import Mapping


def flop_of(sums: Mapping[str, int]) -> Bounds:
    """The sum of a group's first estimates; open where one was."""
    high = sums.get("first_flop_high", 0)
    return Bounds(
        low=sums.get("first_flop_low", 0),
        central=sums.get("first_flop", 0),
        high=None if sums.get("first_flop_open_records") else high,
    )
