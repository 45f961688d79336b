"""Energy: from a cumulative counter that may restart, and the bounds of time nobody read it.

NVML's counter is in millijoules since the driver was loaded. A reading below the one before means
that it restarted; what it counted since is a lower limit of the window's energy, never a
negative amount and never a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.accelerators import Resolved
from flopledger_core.bounds import Bounds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.accelerators import Accelerator
    from flopledger_core.records import HostBoundary


# What no host draws: eight sockets of a kilowatt with their memory, a node twice as hungry as a
# DGX B200 (14.3 kW by its user guide). Above it a meter wrapped, or its unit was misread.
HOST_POWER_LIMIT_WATTS: Final[dict[HostBoundary, int]] = {
    "cpu_package": 10_000,
    "dram": 5_000,
    "platform": 30_000,
    "node": 30_000,
}

_DARK_TIMES: Final = ("energy_possible_time_ms", "hours_time_ms")


class CounterDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a cumulative counter counted between two readings."""

    amount: int
    restarted: bool  # the amount is only what came after the restart


def counter_delta(previous: int, current: int) -> CounterDelta:
    """The amount counted from `previous` to `current`, safe against a restart of the counter."""
    if current >= previous:
        return CounterDelta(amount=current - previous, restarted=False)
    return CounterDelta(amount=current, restarted=True)


def energy_bounds(sums: Mapping[str, int], accelerator: Accelerator | Resolved | None) -> Bounds:
    """Joules in mJ from summed bases: metered and declared, dark time up to the power limit.

    Each amount stands at its own meter's scope, GPU or module (`energy_module_mj` of the sums is
    the part that covers whole modules). One watt for one millisecond is one millijoule, so no
    factor appears.
    """
    known = sum(sums.get(name, 0) for name in ("energy_mj", "energy_module_mj"))
    known += sums.get("declared_energy_mj", 0)
    low = known - sums.get("energy_deficit_mj", 0)
    high = known + sums.get("energy_excess_mj", 0)
    dark_ms = sum(sums.get(name, 0) for name in _DARK_TIMES)
    integral_ms = sums.get("energy_integral_time_ms", 0)
    if not dark_ms and not integral_ms:
        return Bounds(low=low, central=known, high=high)
    if accelerator is None:
        return Bounds(low=low, central=known, high=None)
    row = accelerator.accelerator if isinstance(accelerator, Resolved) else accelerator
    integral = sums.get("energy_integral_mj", 0)
    high += max(integral, integral_ms * row.most_power_watts) - integral
    return Bounds(low=low, central=known, high=high + dark_ms * row.most_power_watts)


def host_energy_bounds(sums: Mapping[str, int], boundary: HostBoundary) -> Bounds:
    """Joules in mJ that the meters of one boundary of the hosts read; None-high where one is off.

    Boundaries contain each other (a package is part of its node): never add them.
    """
    known = sums.get(f"host_energy_mj_{boundary}", 0)
    low = known - sums.get(f"host_energy_deficit_mj_{boundary}", 0)
    high = known + sums.get(f"host_energy_excess_mj_{boundary}", 0)
    absent = sums.get(f"host_{boundary}_absent_time_ms", 0)
    return Bounds(low=low, central=known, high=None if absent else high)
