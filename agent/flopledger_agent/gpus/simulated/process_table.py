"""A scenario's imagined processes behind the attribution port.

Processes that the scenario calls real are left to the operating system's own table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_agent.attribution.interface import Process
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver


class ScenarioProcessTable:
    """Answers for the pids that exist only in the scenario."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self._processes = {
            process.pid: Process(
                pid=process.pid,
                create_time_ms=process.create_time_unix_ns // NS_PER_MS,
                user=process.user,
                environ=dict(process.environ),
                ancestors=(),
                reason=None,
            )
            for process in driver.processes()
            if not process.real
        }

    def identify(self, pid: int) -> Process | None:
        """The imagined process; None for pids of the real world."""
        return self._processes.get(pid)
