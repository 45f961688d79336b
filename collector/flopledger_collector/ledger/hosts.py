"""What the sums of a node's own usage say: CPU time and energy, with what was not read left open.

Amounts were read by the node's meters and cut between owners by a rule. CPU time that nobody read
is limited by the CPUs there were. A boundary of energy that no record read is absent; where only
some records read it, what the others used is open upwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flopledger_collector.ledger.delta import CPU_TIME_POSSIBLE
from flopledger_core.bounds import Bounds
from flopledger_core.energy import host_energy_bounds
from flopledger_core.records import HOST_BOUNDARIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.records import HostBoundary


def cpu_time_was_read(sums: Mapping[str, int]) -> bool:
    """Whether a record of these sums read CPU time at all."""
    return sums.get("host_cpu_absent_time_ms", 0) < sums.get("host_window_ms", 0)


def cpu_time_of(sums: Mapping[str, int], *, disputed: bool) -> Bounds:
    """CPU time in ms: what was read, and up to all CPUs for as long as nobody read it."""
    known = sums.get("host_cpu_time_ms", 0)
    low = 0 if disputed else known
    return Bounds(low=low, central=low, high=known + sums.get(CPU_TIME_POSSIBLE, 0))


def energies_of(sums: Mapping[str, int], *, disputed: bool) -> dict[str, Bounds]:
    """Energy in mJ at each boundary that a record read; never added to each other."""
    found: dict[str, Bounds] = {}
    for boundary in HOST_BOUNDARIES:
        absent_ms = sums.get(f"host_{boundary}_absent_time_ms", 0)
        if absent_ms < sums.get("host_window_ms", 0):
            energy = host_energy_bounds(sums, cast("HostBoundary", boundary))
            found[boundary] = Bounds(low=0, central=0, high=energy.high) if disputed else energy
    return found
