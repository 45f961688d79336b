"""The ports of the host room: what meters a node's energy and CPU time say, and how they say no.

Every meter gives raw cumulative counters, so that a restarted agent can bridge dark time by them.
What could not be read is absent with a reason word (`reasons.py` has the remedy), never zero.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_core.errors import FlopLedgerError
from flopledger_core.records import HOST_BOUNDARIES, HostBoundary, HostEnergySource

ENERGY_QUANTITIES: Final[dict[HostBoundary, str]] = {
    "cpu_package": "energy.cpu_package",
    "dram": "energy.dram",
    "node": "energy.node",
    "platform": "energy.platform",
}
"""Boundary -> the name of its energy in a record's `absent`."""
assert set(ENERGY_QUANTITIES) == set(HOST_BOUNDARIES)


class HostReadError(FlopLedgerError):
    """A meter of the host did not answer; `reason` is a word of `reasons.REMEDIES`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Counter(msgspec.Struct, frozen=True, kw_only=True):
    """One raw cumulative energy counter; the same name means the same counting."""

    name: str
    energy_uj: int
    range_uj: int | None  # it wraps to zero after this value; None: it never wraps
    limit_watts: int  # more than its boundary can plausibly draw


class EnergyReading(msgspec.Struct, frozen=True, kw_only=True):
    """The counters whose sum is the energy of one boundary."""

    source: HostEnergySource
    counters: tuple[Counter, ...]


class EnergyReadings(msgspec.Struct, frozen=True, kw_only=True):
    """What one meter says now, and why it does not say the rest."""

    readings: dict[HostBoundary, EnergyReading]
    absent: dict[HostBoundary, str]


class OwnerTime(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time that the processes of one owner used since the sample before."""

    claim: Claim
    cpu_ns: int


class CpuTotals(msgspec.Struct, frozen=True, kw_only=True):
    """The node's CPUs as the kernel counts them since boot."""

    cpu_count: int  # logical CPUs that are online
    busy_ns: int  # summed over CPUs; guests are inside, stolen and waiting time is not


class HostSample(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the node without its GPUs."""

    boot_ns: int
    unix_ns: int
    cpu: CpuTotals | None
    owners: tuple[OwnerTime, ...]
    energy: dict[HostBoundary, EnergyReading]
    absent: dict[str, str]  # quantity -> why it is absent


class EnergyMeter(Protocol):
    """Something that counts the energy of one or more boundaries."""

    def read(self, boot_ns: int) -> EnergyReadings:
        """The counters now, at once; never raises."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class PowerReading(msgspec.Struct, frozen=True, kw_only=True):
    """What a management controller says: power, or better, its own energy counter."""

    power_mw: int | None = None
    energy_uj: int | None = None


class PowerReader(Protocol):
    """A slow question to a management controller."""

    def read(self) -> PowerReading:
        """Ask and wait, within its own deadline; raises `HostReadError`."""
        ...


class ProcessOwners(Protocol):
    """Whose work a process is."""

    def version(self) -> int:
        """Another number as soon as an earlier judgement may be another one now."""
        ...

    def tagged(self) -> frozenset[int]:
        """Pids with a tag of their own; their descendants inherit it."""
        ...

    def claim(self, pid: int) -> Claim:
        """The owner of a process, with its evidence."""
        ...


class HostSource(Protocol):
    """Something that can sample the node itself; `meter.HostMeter` is the real one."""

    def sample(self) -> HostSample:
        """One reading; cheap, and never raises."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...
