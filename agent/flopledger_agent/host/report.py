"""What `flopledger-agent check` says about the host's meters, and the remedy for what is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.host.interface import ENERGY_QUANTITIES
from flopledger_agent.host.reasons import remedy

if TYPE_CHECKING:
    from flopledger_agent.host.interface import HostSample


class BoundaryReport(msgspec.Struct, frozen=True, kw_only=True):
    """One boundary: what meters it, or why nothing does."""

    boundary: str
    source: str | None
    reason: str | None
    remedy: str | None


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """The host as the agent would meter it."""

    cpu_count: int | None  # None: CPU time cannot be read
    boundaries: tuple[BoundaryReport, ...]


def describe(sample: HostSample) -> HostReport:
    """The report of one sample."""
    boundaries: list[BoundaryReport] = []
    for boundary, quantity in ENERGY_QUANTITIES.items():
        reading = sample.energy.get(boundary)
        reason = None if reading is not None else sample.absent.get(quantity, "not_configured")
        boundaries.append(
            BoundaryReport(
                boundary=boundary,
                source=None if reading is None else reading.source,
                reason=reason,
                remedy=None if reason is None else remedy(reason),
            )
        )
    return HostReport(
        cpu_count=None if sample.cpu is None else sample.cpu.cpu_count,
        boundaries=tuple(boundaries),
    )


def lines(report: HostReport | None) -> list[str]:
    """The host for people."""
    if report is None:
        return ["host: not metered"]
    cpus = "CPU time cannot be read: mount /proc with all processes visible"
    if report.cpu_count is not None:
        cpus = f"{report.cpu_count} CPUs, CPU time by owner"
    told = [f"host: {cpus}"]
    for one in report.boundaries:
        if one.source is not None:
            told.append(f"  energy {one.boundary}: read through {one.source}")
        else:
            told.append(f"  energy {one.boundary}: absent ({one.reason}): {one.remedy}")
    return told
