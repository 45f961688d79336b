"""What the sums of a group say of the estimates that agents sealed into its records.

A group holds records of one model and table version only, so its sum of first estimates stands
beside one figure of today, for exactly the same records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_core.bounds import Bounds

if TYPE_CHECKING:
    from collections.abc import Mapping


def flop_of(sums: Mapping[str, int], model_version: str, table_version: str) -> Bounds:
    """The sum of a group's first estimates by one model and table; open where one was."""
    version = f"{model_version}/{table_version}"
    high = sums.get(f"first_flop_high@{version}", 0)
    return Bounds(
        low=sums.get(f"first_flop_low@{version}", 0),
        central=sums.get(f"first_flop@{version}", 0),
        high=None if sums.get(f"first_flop_open_records@{version}") else high,
    )
