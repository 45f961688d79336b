"""The host's meter: CPU time and every energy meter read together, at one instant.

A sample is cheap to ask for: what is slow or can hang (a management controller, an environment)
has a thread of its own, and a scan of processes ends when its time is up. Whatever one part does,
the others are read.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flopledger_agent.host.cpu import node_totals
from flopledger_agent.host.interface import (
    ENERGY_QUANTITIES,
    EnergyReading,
    HostReadError,
    HostSample,
    OwnerTime,
)

if TYPE_CHECKING:
    from flopledger_agent.clocks import Clock
    from flopledger_agent.host.interface import CpuTotals, EnergyMeter
    from flopledger_agent.host.processes import ProcessScanner
    from flopledger_agent.host.procfs import ProcessFiles
    from flopledger_core.records import HostBoundary

log = logging.getLogger("flopledger.agent")


class HostMeter:
    """Samples the node itself; implements `HostSource`. One caller at a time."""

    def __init__(
        self,
        *,
        clock: Clock,
        files: ProcessFiles,
        scanner: ProcessScanner,
        meters: tuple[EnergyMeter, ...],
        tick_ns: int,
    ) -> None:
        self._clock = clock
        self._files = files
        self._scanner = scanner
        self._meters = meters
        self._tick_ns = tick_ns
        self._said = False

    def sample(self) -> HostSample:
        """One reading; never raises. An extra one between two others costs a scan and no more."""
        boot_ns = self._clock.boottime_ns()
        unix_ns = self._clock.wall_unix_ns()
        absent: dict[str, str] = {}
        energy: dict[HostBoundary, EnergyReading] = {}
        for meter in self._meters:
            said = meter.read(boot_ns)
            energy.update(said.readings)
            for boundary, reason in said.absent.items():
                absent[ENERGY_QUANTITIES[boundary]] = reason
        for boundary, quantity in ENERGY_QUANTITIES.items():
            if boundary not in energy:
                absent.setdefault(quantity, "not_configured" if boundary == "node" else "disabled")
        cpu = self._totals(absent)
        return HostSample(
            boot_ns=boot_ns,
            unix_ns=unix_ns,
            cpu=cpu,
            owners=self._owners(boot_ns),
            energy=energy,
            absent=dict(sorted(absent.items())),
        )

    def close(self) -> None:
        """Let go of what the energy meters hold."""
        for meter in self._meters:
            meter.close()

    def _totals(self, absent: dict[str, str]) -> CpuTotals | None:
        try:
            return node_totals(self._files.node_stat(), self._tick_ns)
        except (OSError, HostReadError):
            absent["cpu_time"] = "proc_not_readable"
            return None

    def _owners(self, boot_ns: int) -> tuple[OwnerTime, ...]:
        """Nobody's work in doubt: an owner that cannot be told must not stop the metering."""
        try:
            return self._scanner.scan(boot_ns)
        except Exception:
            if not self._said:
                self._said = True
                log.exception("processes cannot be scanned", extra={"action": "unexpected_error"})
            return ()
