"""Energy: from a cumulative counter that may restart, and the bounds of time nobody read it.

NVML's counter is in millijoules since the driver was loaded. A reading below the one before means
that it restarted; what it counted since is a lower limit of the window's energy, never a
negative amount and never a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.bounds import Bounds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.accelerators import Accelerator


_DARK_TIMES: Final = (
    "gap_time_ms", "energy_absent_time_ms", "energy_possible_time_ms", "hours_time_ms",
)  # fmt: skip


class CounterDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a cumulative counter counted between two readings."""

    amount: int
    restarted: bool  # the amount is only what came after the restart


def counter_delta(previous: int, current: int) -> CounterDelta:
    """The amount counted from `previous` to `current`, safe against a restart of the counter."""
    if current >= previous:
        return CounterDelta(amount=current - previous, restarted=False)
    return CounterDelta(amount=current, restarted=True)


def energy_bounds(sums: Mapping[str, int], accelerator: Accelerator | None) -> Bounds:
    """Joules in mJ from summed bases: metered and declared, dark time up to the power limit.

    One watt for one millisecond is one millijoule, so no factor appears.
    """
    known = sums.get("energy_mj", 0) + sums.get("declared_energy_mj", 0)
    low = known - sums.get("energy_deficit_mj", 0)
    high = known + sums.get("energy_excess_mj", 0)
    dark_ms = sum(sums.get(name, 0) for name in _DARK_TIMES)
    if not dark_ms:
        return Bounds(low=low, central=known, high=high)
    if accelerator is None:
        return Bounds(low=low, central=known, high=None)
    return Bounds(low=low, central=known, high=high + dark_ms * accelerator.power_limit_watts)
