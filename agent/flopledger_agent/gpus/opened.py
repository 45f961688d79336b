"""A GPU whose handle is valid, and what was found out about it since it was opened."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.gpus.interface import DeviceNames
from flopledger_agent.gpus.limits import UNKNOWN_LIMITS, Limits

if TYPE_CHECKING:
    from flopledger_agent.gpus.gpm_pair import GpmPair
    from flopledger_agent.gpus.mig_reader import PartitionReader
    from flopledger_agent.gpus.nvml import Handle
    from flopledger_core.accelerators import Accelerator, Resolved
    from flopledger_core.records import Device, EnergyScope


@dataclasses.dataclass(slots=True, kw_only=True)
class Opened:
    """A device whose handle is valid, with what does not change while it is."""

    handle: Handle
    device: Device
    known: Resolved | None = None  # the table's row, or the stand-in of the architecture
    limits: Limits = UNKNOWN_LIMITS
    partitioned: bool = False  # MIG is on: read by parts, not as a whole
    is_mig_told: bool = False  # the driver said whether it is
    why_mig_unknown: str | None = None
    gpm: GpmPair | None = None
    parts: PartitionReader | None = None
    facts: dict[str, object] = dataclasses.field(default_factory=dict)  # answered, for good
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    lasting: dict[str, str] = dataclasses.field(default_factory=dict)  # not worth asking again
    is_complete: bool = False  # no fact is left to ask for again

    @property
    def row(self) -> Accelerator | None:
        """What the table says of the device, be it only its architecture."""
        return None if self.known is None else self.known.accelerator

    @property
    def names(self) -> DeviceNames:
        """What schedulers call the GPU, as far as it was told when it was opened."""
        told = {name: self.facts.get(name) for name in ("index", "minor", "pci_bus_id")}
        return msgspec.convert(told, DeviceNames)

    @property
    def energy_scope(self) -> EnergyScope:
        """What the energy counter covers; power is read at the same scope."""
        return "gpu" if self.row is None else self.row.energy_scope
