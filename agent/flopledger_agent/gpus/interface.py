"""The port through which the agent sees GPUs: one sample of every device per tick.

Driver units are already converted here: cycles are integer SM-cycles summed over SMs, energy is in
millijoules, clocks in kilohertz. What could not be read is None and `absent` says why; a source
never raises because of one device and never fills in a zero.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

import msgspec

from flopledger_core.records import Cycles, Device, EnergyScope, Tier


class DeviceNames(msgspec.Struct, frozen=True, kw_only=True):
    """What schedulers call a GPU or a part of it; None where the driver does not tell."""

    index: int | None = None  # NVML's ordinal of the GPU when it was opened
    minor: int | None = None  # of /dev/nvidia<minor>, the GPU's
    pci_bus_id: str | None = None  # the GPU's, as in 00000000:65:00.0
    mig_uuids: tuple[str, ...] = ()  # MIG-... of the compute instances in this GPU instance


class GpuSample(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one device at one instant.

    `cycles` are cumulative counters (tier `gpm_cycles`). `utilization` are means over the time
    since this device's previous sample, as exact ratios 0..1 by `Cycles` field name (tiers
    `gpm_util`, `gpu_util`); a source gives one or the other, or neither with a reason. Only where
    counting begins after samples without cycles does one sample give both: its ratios tell the
    interval that ends and the tier, its cycles are what the next sample is counted from. Tier
    `dcgm_pipes` gives ratios always, and cycles besides where the exporter counts them.
    `processes` None means that they could not be listed; an empty tuple means that none run.
    """

    device: Device
    boot_ns: int
    tier: Tier
    cycles: Cycles | None
    utilization: dict[str, Fraction] | None
    sm_clock_khz: int | None
    energy_mj: int | None
    power_mw: int | None
    processes: tuple[int, ...] | None
    absent: dict[str, str]
    # The whole GPU's raw counter; differs from `energy_mj` only for a part of a partitioned GPU,
    # whose `energy_mj` is `device.slices.part(energy_counter_mj)`. `power_mw` is the whole GPU's.
    energy_counter_mj: int | None = None
    energy_scope: EnergyScope = "gpu"
    uncertain_cycles: int = 0  # see UsageRecord
    xids: tuple[int, ...] = ()  # errors of this device that the driver reported since last time
    # Percent of the SMs by pid since the sample before; who used nothing is not in it. None: the
    # driver tells none (under MIG never).
    process_utilization: dict[int, int] | None = None
    names: DeviceNames | None = None  # None: the source does not ask for them


class DeviceFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was expected and could not be sampled in this tick."""

    device: Device
    reason: str  # a stable word, e.g. gpu_is_lost, timeout, unknown_error
    xids: tuple[int, ...] = ()  # as in GpuSample; each error is told once, here or there


class NodeSample(msgspec.Struct, frozen=True, kw_only=True):
    """Every device of the node in one tick."""

    boot_ns: int
    unix_ns: int
    samples: tuple[GpuSample, ...]
    failures: tuple[DeviceFailure, ...]
    driver: str | None  # driver version, None when the driver does not answer
    failure: str | None  # why no device could be sampled at all
    # Keys of devices that ended on purpose (a GPU was partitioned anew): no longer expected.
    retired: tuple[str, ...] = ()


class GpuSource(Protocol):
    """Something that can sample the node's GPUs."""

    def sample(self) -> NodeSample:
        """One reading of every device; never raises for a device's sake."""
        ...

    def pause(self) -> None:
        """Let go of the driver until `resume`, so that another program has it to itself.

        Meanwhile every expected device is sampled as a failure with the reason `paused`. Nothing
        is bridged: who counts over a pause treats it as time that nobody measured.
        """
        ...

    def resume(self) -> None:
        """Take the driver again at the next sample."""
        ...

    def close(self) -> None:
        """Let go of the driver for good."""
        ...
