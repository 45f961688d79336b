"""Builds the host's meter from the configuration, for the daemon and for `check` alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.host.ipmi import IpmiReader
from flopledger_agent.host.meter import HostMeter
from flopledger_agent.host.owners import AttributedProcesses
from flopledger_agent.host.power import NodePowerMeter
from flopledger_agent.host.processes import ProcessScanner
from flopledger_agent.host.procfs import ProcessFiles
from flopledger_agent.host.rapl import RaplMeter
from flopledger_agent.host.redfish import RedfishReader
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.interface import Attributor
    from flopledger_agent.attribution.tags import TagRegistry
    from flopledger_agent.clocks import Clock
    from flopledger_agent.config import HostSection
    from flopledger_agent.host.interface import EnergyMeter

PROC: Final = Path("/proc")
POWERCAP: Final = Path("/sys/class/powercap")


def host_meter(
    section: HostSection,
    *,
    clock: Clock,
    attributor: Attributor,
    registry: TagRegistry,
    monotonic_seconds: Callable[[], float],
) -> HostMeter:
    """The meter of this node; nothing is read before its first sample."""
    tick_ns = NS_PER_SECOND // os.sysconf("SC_CLK_TCK")
    files = ProcessFiles(PROC)
    owners = AttributedProcesses(attributor, registry)
    return HostMeter(
        clock=clock,
        files=files,
        scanner=ProcessScanner(files, owners, tick_ns, monotonic_seconds),
        meters=energy_meters(section, clock),
        tick_ns=tick_ns,
    )


def energy_meters(section: HostSection, clock: Clock) -> tuple[EnergyMeter, ...]:
    """The energy meters that the configuration asks for; at most one of each boundary."""
    meters: list[EnergyMeter] = []
    if section.rapl:
        meters.append(RaplMeter(POWERCAP))
    if section.redfish is not None:
        reader = RedfishReader(section.redfish)
        meters.append(NodePowerMeter(reader, "redfish", clock, section.interval_seconds))
    elif section.ipmi:
        meters.append(NodePowerMeter(IpmiReader(), "ipmi", clock, section.interval_seconds))
    return tuple(meters)
