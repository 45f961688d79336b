"""Usage: sums over lines, quantity by quantity and boundary by boundary.

A quantity that no line speaks of is absent, never zero. Energy is kept by the boundary of its
meter: boundaries contain each other (a node contains its CPUs, a module its GPU), so no two of
them are ever added. CPU time of nodes stands beside GPU time; FLOP of CPUs is absent, because no
counter reads it, and enters no bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from flopledger_collector.ledger.totals import GPU_BOUNDARY, MODULE_BOUNDARY, Line
from flopledger_collector.silence import (
    QUANTITIES,
    leaves_open,
    reasons_of_silence,
    silent_records,
    speaks_of,
    unlimited,
)
from flopledger_core.bounds import ZERO, Bounds, total
from flopledger_core.flop import Work, total_work
from flopledger_core.records import HOST_BOUNDARIES

COST_PREFIX: Final = "declared_cost_cents_"
MODEL_FLOP: Final = ("model_flop_low", "model_flop", "model_flop_high")
BOUNDARIES: Final = (GPU_BOUNDARY, MODULE_BOUNDARY, *HOST_BOUNDARIES)
CPU_FLOP_ABSENT: Final = "cpu_flop_not_counted"  # the reason word that host records carry
UNKNOWN_DEVICE: Final = "device_not_in_table"  # and of no architecture that could stand in
NO_CPU_FLOP: Final = f"FLOP of CPUs: absent, no counter reads it ({CPU_FLOP_ABSENT})"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over lines. Amounts are bounds; disputed lines are only in high."""

    works: dict[str, Work]  # by activity, of what GPUs did and people declared
    work: Work
    model_flop: Bounds  # declared by architecture; never mixed with executed FLOP
    energy_mj: Bounds  # at the GPU's boundary
    device_energy_mj: Bounds  # by each device's own meter: its GPU's, or its whole module's
    energy_by_boundary: dict[str, Bounds]  # only those that something was read or stated of
    gpu_time_ms: Bounds
    gap_time_ms: int
    cpu_time_ms: Bounds  # of nodes; 0 where none is metered, which `known` tells from nothing used
    cost_cents: dict[str, Bounds]  # by currency
    records: int
    host_records: int  # of nodes themselves, without their GPUs
    disputed_records: int
    stand_in_records: int  # of devices the hardware table lacks: their architecture stands in
    # Absent is not zero: records of lines that say nothing of a quantity, by quantity.
    silent_records: dict[str, int]

    def known(self, quantity: str, amount: Bounds) -> Bounds | None:
        """`amount` where at least one record speaks of the quantity, else None."""
        return None if self.silent_records.get(quantity, 0) == self.records else amount

    @property
    def known_cpu_time(self) -> Bounds | None:
        """CPU time in ms; None where no node was metered."""
        return self.known("cpu_time_ms", self.cpu_time_ms) if self.host_records else None


def usage_of(lines: Iterable[Line]) -> Usage:
    """The exact sums of lines."""
    chosen = tuple(lines)
    works: dict[str, list[Work]] = {}
    costs: dict[str, Bounds] = {}
    for line in chosen:
        if not line.is_host:
            works.setdefault(line.activity, []).append(line.work)
        for name, amount in line.sums.items():
            if name.startswith(COST_PREFIX):
                currency = name.removeprefix(COST_PREFIX)
                costs[currency] = costs.get(currency, ZERO) + _stands(line, amount, amount)
    by_activity = {activity: total_work(parts) for activity, parts in works.items()}
    return Usage(
        works=by_activity,
        work=total_work(list(by_activity.values())),
        model_flop=total(model_flop_of(line) for line in chosen),
        energy_mj=total(energy_of(line) for line in chosen),
        device_energy_mj=total(device_energy_of(line) for line in chosen),
        energy_by_boundary=_by_boundary(chosen),
        gpu_time_ms=total(gpu_time_of(line) for line in chosen),
        gap_time_ms=sum(line.sums.get("gap_time_ms", 0) for line in chosen),
        cpu_time_ms=total(line.cpu_time_ms for line in chosen if line.cpu_time_ms is not None),
        cost_cents=dict(sorted(costs.items())),
        records=sum(line.records for line in chosen),
        host_records=sum(line.records for line in chosen if line.is_host),
        disputed_records=sum(line.records for line in chosen if line.standing == "disputed"),
        stand_in_records=sum(line.records for line in chosen if line.stand_in),
        silent_records={
            quantity: sum(silent_records(line, quantity) for line in chosen)
            for quantity in QUANTITIES
        },
    )


def gpu_time_of(line: Line) -> Bounds:
    """GPU time of a line in ms: metered, imported, declared; a gap may or may not be use.

    Open where work is declared and its GPU time is not.
    """
    names = ("gpu_time_ms", "hours_time_ms", "declared_gpu_time_ms")
    known = sum(line.sums.get(name, 0) for name in names)
    bounds = _stands(line, known, known + line.sums.get("gap_time_ms", 0))
    return unlimited(bounds) if leaves_open(line, "gpu_time_ms") else bounds


def energy_of(line: Line) -> Bounds:
    """Energy of a line at the GPU's boundary, in mJ.

    Open where work is declared and its energy is not. Of a counter that reads a whole module, the
    GPU's own part is anything from nothing to all of it.
    """
    if line.energy_boundary == MODULE_BOUNDARY:
        return _at_most(line.energy_mj)
    return device_energy_of(line)


def device_energy_of(line: Line) -> Bounds:
    """Energy of a line in mJ as the device's own meter reads it, a GPU or a whole module.

    A device has one such meter, so these can be added over devices, as boundaries cannot.
    """
    if line.is_host:
        return ZERO
    return unlimited(line.energy_mj) if leaves_open(line, "energy_mj") else line.energy_mj


def energies_of(line: Line) -> dict[str, Bounds]:
    """What a line's own meters read, by boundary; empty where nothing speaks of its energy."""
    if line.is_host:
        return line.host_energy_mj
    if line.energy_boundary == MODULE_BOUNDARY:
        return {MODULE_BOUNDARY: line.energy_mj}
    return {GPU_BOUNDARY: energy_of(line)} if speaks_of(line, "energy_mj") else {}


def _by_boundary(lines: tuple[Line, ...]) -> dict[str, Bounds]:
    found: dict[str, Bounds] = {}
    for line in lines:
        for boundary, energy in energies_of(line).items():
            found[boundary] = found.get(boundary, ZERO) + energy
    if GPU_BOUNDARY in found:
        # With what module counters and silent declarations may hide of it.
        found[GPU_BOUNDARY] = total(energy_of(line) for line in lines)
    for line in lines:
        if line.is_host:
            # What this node used at a boundary that its meters lack is not nothing.
            found |= {
                boundary: unlimited(energy)
                for boundary, energy in found.items()
                if boundary in HOST_BOUNDARIES and boundary not in line.host_energy_mj
            }
    return {boundary: found[boundary] for boundary in BOUNDARIES if boundary in found}


def model_flop_of(line: Line) -> Bounds:
    """FLOP that a person declared from an architecture; executed FLOP is apart from it."""
    low, central, high = (line.sums.get(name, 0) for name in MODEL_FLOP)
    if line.standing == "disputed":
        return Bounds(low=0, central=0, high=high)
    return Bounds(low=low, central=central, high=high)


def possible(usage: Usage) -> Usage:
    """What this usage adds to whoever might own it: nothing for certain, all of it at most."""
    return msgspec.structs.replace(
        usage,
        works={activity: work.disputed() for activity, work in usage.works.items()},
        work=usage.work.disputed(),
        model_flop=_at_most(usage.model_flop),
        energy_mj=_at_most(usage.energy_mj),
        device_energy_mj=_at_most(usage.device_energy_mj),
        energy_by_boundary={
            boundary: _at_most(energy) for boundary, energy in usage.energy_by_boundary.items()
        },
        gpu_time_ms=_at_most(usage.gpu_time_ms),
        cpu_time_ms=_at_most(usage.cpu_time_ms),
        cost_cents={currency: _at_most(cost) for currency, cost in usage.cost_cents.items()},
    )


def integer_operations(work: Work) -> Bounds:
    """Integer operations of all pipes; never part of FLOP."""
    return work.tensor_integer_operations + work.integer_operations


def reasons_of(lines: Iterable[Line], usage: Usage, shared: Usage) -> tuple[str, ...]:
    """Why bounds are open or wide and figures absent, each reason once."""
    found = [*usage.work.reasons, *shared.work.reasons]
    for line in lines:
        found.extend(reasons_of_silence(line))
        if line.energy_boundary == MODULE_BOUNDARY:
            found.append(
                f"{line.device_name}: its energy counter reads the whole module; the GPU's own "
                "part is from nothing to all of it"
            )
    if usage.host_records or shared.host_records:
        found.append(NO_CPU_FLOP)
    return tuple(dict.fromkeys(found))


def _stands(line: Line, known: int, high: int) -> Bounds:
    """Disputed amounts are out of low and central, and stay in high."""
    low = 0 if line.standing == "disputed" else known
    return Bounds(low=low, central=low, high=high)


def _at_most(bounds: Bounds) -> Bounds:
    return Bounds(low=0, central=0, high=bounds.high)
