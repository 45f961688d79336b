"""Phases: stretches of time in which nothing changes, read from a scenario's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from fractions import Fraction
from typing import Final

from flopledger_agent.gpus.simulated.tables import ScenarioError, Table
from flopledger_core.records import PIPES

IDLE_SM_CLOCK_MHZ: Final = 345
IDLE_POWER_WATTS: Final = 75


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of time in which nothing changes; `owners` are process names with shares of 1."""

    duration_ns: int
    sm_clock_mhz: int
    power_watts: Fraction
    sm_active: Fraction
    pipes: Mapping[str, Fraction]  # every pipe, as a share of elapsed SM-cycles
    memory_used_mib: int
    owners: tuple[tuple[str, Fraction], ...]
    gpu_active: Fraction  # share of time that anything runs, what utilization.gpu shows
    sm_occupancy: Fraction
    dram_active: Fraction


def idle_phase(row: Table) -> Phase:
    """What a GPU does where no phase says otherwise, by its own keys. Errors: ScenarioError."""
    return Phase(
        duration_ns=0,
        sm_clock_mhz=row.integer("idle_sm_clock_mhz", IDLE_SM_CLOCK_MHZ),
        power_watts=row.number("idle_power_watts", IDLE_POWER_WATTS),
        sm_active=Fraction(0),
        pipes=dict.fromkeys(PIPES, Fraction(0)),
        memory_used_mib=0,
        owners=(),
        gpu_active=Fraction(0),
        sm_occupancy=Fraction(0),
        dram_active=Fraction(0),
    )


def read_phase(row: Table, idle: Phase, processes: Container[str]) -> Phase:
    """One phase; what it does not say is as when idle. Errors: ScenarioError."""
    duration_ns = row.nanoseconds("seconds")
    if duration_ns == 0:
        raise ScenarioError(row.field("seconds"), 0, "give a phase a length above 0")
    pipes = _pipes(row.table("pipes"))
    sm_active = row.ratio("sm_active", max(pipes.values()))
    phase = Phase(
        duration_ns=duration_ns,
        sm_clock_mhz=row.integer("sm_clock_mhz", idle.sm_clock_mhz),
        power_watts=row.number("power_watts", idle.power_watts),
        sm_active=sm_active,
        pipes=pipes,
        memory_used_mib=row.integer("memory_used_mib", 0),
        owners=_owners(row, processes),
        gpu_active=row.ratio("gpu_active", 1 if sm_active else 0),
        sm_occupancy=row.ratio("sm_occupancy", 0),
        dram_active=row.ratio("dram_active", 0),
    )
    row.finish()
    return phase


def _pipes(table: Table) -> dict[str, Fraction]:
    ratios = {pipe: table.ratio(pipe, 0) for pipe in PIPES}
    if "any_tensor" not in table:
        fp64_tensor = max(ratios["dmma"], ratios["dfma"])
        total = ratios["hmma"] + ratios["imma"] + fp64_tensor
        if total > 1:
            remedy = "make hmma + imma + max(dmma, dfma) at most 1, or give any_tensor"
            raise ScenarioError(table.field("any_tensor"), float(total), remedy)
        ratios["any_tensor"] = total
    table.finish()
    return ratios


def _owners(row: Table, processes: Container[str]) -> tuple[tuple[str, Fraction], ...]:
    names = row.texts("processes")
    refuse_twins(row.field("processes"), list(names))
    for name in names:
        if name not in processes:
            raise ScenarioError(row.field("processes"), name, f"add a [processes.{name}] table")
    shares = row.table("shares")
    weights = {name: shares.number(name, 1) for name in names}
    shares.finish()
    for name, weight in weights.items():
        if weight == 0:
            raise ScenarioError(shares.field(name), 0, "give a weight above 0")
    total = sum(weights.values(), Fraction(0))
    return tuple((name, weight / total) for name, weight in weights.items())


def refuse_twins(field: str, values: list[str]) -> None:
    """Every value once. Errors: ScenarioError."""
    for value in values:
        if values.count(value) > 1:
            raise ScenarioError(field, value, "give each one its own")
