"""Reads the parts of one partitioned GPU (MIG): each GPU instance through GPM, the rest as idle.

Lives inside the reader of the GPU, in its thread. Every part is sampled at the same instant, and
from the same reading of what only the GPU as a whole shows: energy and power are cut along the
compute slices, never repeated. A GPU whose layout cannot be told is metered as one device. Process
lists come from the MIG devices, which show everybody their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.gpm import GpmMeter, GpmReading, Scale
from flopledger_agent.gpus.gpm_pair import GpmPair
from flopledger_agent.gpus.limits import Limits
from flopledger_agent.gpus.mig import (
    LAYOUT_UNCLEAR,
    SLICES_UNKNOWN,
    LayoutUnclear,
    MigDevice,
    Profiles,
    layout,
    profiles_of,
    why_idle,
)
from flopledger_agent.gpus.nvml_errors import INVALID_ARGUMENT, NOT_FOUND, DriverError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from fractions import Fraction

    from flopledger_agent.gpus.interface import DeviceNames, GpuSample
    from flopledger_agent.gpus.nvml import Handle, Nvml
    from flopledger_core.accelerators import Accelerator
    from flopledger_core.records import Device, Tier

# What is known of the whole GPU only, and why a part lacks it.
OF_THE_WHOLE: Final = frozenset({"energy_mj", "sm_clock_khz", "power_mw", "sm_clock_samples"})
GPM_NOT_SUPPORTED: Final = "gpm_not_supported"
UNCLEAR_LOOKS_MAX: Final = 3  # in a row; making instances takes a second or two


@dataclasses.dataclass(slots=True, kw_only=True)
class _Part:
    """One part as it is now: its counters, and what became of its last sample."""

    device: Device
    handles: tuple[Handle, ...]  # of its MIG devices
    gpm: GpmPair | None = None
    why_no_gpm: str = GPM_NOT_SUPPORTED
    refused: bool = False  # for good
    frozen: bool = False  # its counters were taken in this reading
    why_not_frozen: str = GPM_NOT_SUPPORTED
    counted: bool | None = None  # whether the last sample had cycles to count from
    delivered_counted: bool | None = None
    follows: bool = False


class PartitionReader:
    """Samples the parts of one GPU on which MIG is on. Errors of every call: DriverError."""

    def __init__(self, nvml: Nvml, handle: Handle, scales: Mapping[str, Scale]) -> None:
        """`scales`: of counters that are known already, by the key of the part."""
        self._nvml = nvml
        self._handle = handle
        self.has_gpm = False  # the GPU has GPM, as far as it says
        self.row: Accelerator | None = None  # what the hardware table knows of the model
        self._scales = dict(scales)
        self._profiles: Profiles | None = None
        self._parts: dict[str, _Part] = {}
        self._why_whole: str | None = None  # why the GPU is metered as one device
        self._unclear = 0
        self._listed: list[MigDevice] = []  # whose UUIDs are known
        self._uuids: dict[int, tuple[str, ...]] = {}  # of MIG devices, by GPU instance

    def free(self) -> None:
        """Give back what the driver allocated."""
        for part in self._parts.values():
            _free(part)
        self._parts = {}

    @property
    def finest_tier(self) -> Tier:
        """The finest tier any part can have now, apart from counted cycles."""
        meters = [part.gpm.meter for part in self._parts.values() if part.gpm is not None]
        return "gpm_util" if any(meter.scale is None for meter in meters) else "none"

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous samples."""
        for part in self._parts.values():
            part.follows = delivered
            if delivered:
                part.delivered_counted = part.counted
            if part.gpm is not None:
                part.gpm.settle(delivered=delivered)

    def scales(self) -> dict[str, Scale]:
        """The scales of cycle counters that are believed now, by the key of the part."""
        for key, part in self._parts.items():
            if part.gpm is None:
                continue
            if part.gpm.meter.scale is not None:
                self._scales[key] = part.gpm.meter.scale
            else:
                self._scales.pop(key, None)  # contradicted: nobody is to begin with it
        return dict(self._scales)

    def look(self, whole: Device, limits: Limits) -> str | None:
        """Take over the layout as it is now; why it cannot be told this time, else None.

        In passing trouble what was known stays. A GPU that never tells its layout is metered as
        one device.
        """
        try:
            devices, handles = self._layout(whole)
        except LayoutUnclear:
            self._unclear += 1
            if self._unclear < UNCLEAR_LOOKS_MAX:
                return LAYOUT_UNCLEAR
            self._meter_whole(whole, LAYOUT_UNCLEAR, limits)
            return None
        except DriverError as error:
            if error.meaning.scope != "field":
                raise
            if error.meaning.lasting:
                self._meter_whole(whole, error.meaning.reason, limits)
                return None
            return None if self._parts else error.meaning.reason
        self._unclear = 0
        if devices is None:
            self._meter_whole(whole, SLICES_UNKNOWN, limits)
        else:
            self._become(devices, handles, limits)
            self._why_whole = None
        return None

    def freeze(self) -> None:
        """Take every instance's counters now."""
        for part in self._parts.values():
            part.frozen, part.why_not_frozen = False, part.why_no_gpm
            if part.gpm is not None:
                try:
                    part.frozen = part.gpm.take()
                except DriverError as error:
                    part.why_not_frozen = _field_reason(error)

    def samples(self, whole: GpuSample, clock_khz: int | None) -> tuple[GpuSample, ...]:
        """A sample of every part, from the GPU's own sample and the counters just taken.

        `clock_khz` is the SM clock at this instant, as against the mean of the GPU's sample.
        """
        if self._why_whole is not None:
            absent = whole.absent | {"cycles": self._why_whole}
            if not whole.processes:
                # Those of MIG devices show at the GPU to a privileged reader only.
                absent.setdefault("processes", self._why_whole)
            processes = whole.processes or None
            return (msgspec.structs.replace(whole, processes=processes, absent=absent),)
        return tuple(self._sample(part, whole, clock_khz) for part in self._parts.values())

    # --- the layout ---------------------------------------------------------------------------

    def _layout(self, whole: Device) -> tuple[tuple[Device, ...] | None, dict[int, list[Handle]]]:
        """The parts and the MIG devices in each. Errors: LayoutUnclear, DriverError."""
        profiles = self._profiles or self._ask_profiles()
        handles: dict[int, list[Handle]] = {}
        if profiles is None:
            return None, handles
        found: list[MigDevice] = []
        for handle in self._nvml.mig_handles(self._handle):
            try:
                device = self._nvml.mig_device(handle)
            except DriverError as error:
                if error.code in {INVALID_ARGUMENT, NOT_FOUND}:  # destroyed since it was listed
                    raise LayoutUnclear(LAYOUT_UNCLEAR) from error
                raise
            found.append(device)
            handles.setdefault(device.gpu_instance, []).append(handle)
        if found != self._listed:
            self._ask_uuids(found, handles)
        return layout(whole, found, profiles), handles

    def _ask_uuids(self, found: list[MigDevice], handles: Mapping[int, list[Handle]]) -> None:
        """Take over the UUIDs of the MIG devices; those that are refused are asked again."""
        self._listed, self._uuids = found, {}
        for gpu_instance, own in handles.items():
            uuids: list[str] = []
            for handle in own:
                try:
                    uuids.append(self._nvml.uuid(handle))
                except DriverError as error:
                    _field_reason(error)
                    self._listed = []
            self._uuids[gpu_instance] = tuple(uuids)

    def _ask_profiles(self) -> Profiles | None:
        """What the driver tells, for good; else what is known of the model, until it does."""
        try:
            told = self._nvml.mig_profiles(self._handle)
        except DriverError as error:
            _field_reason(error)
            return profiles_of({}, self.row)
        self._profiles = profiles_of(told, self.row)
        return self._profiles

    def _meter_whole(self, whole: Device, reason: str, limits: Limits) -> None:
        self._become((whole,), {}, limits)
        self._why_whole = reason

    def _become(
        self, devices: tuple[Device, ...], handles: Mapping[int, list[Handle]], limits: Limits
    ) -> None:
        before, self._parts = self._parts, {}
        for device in devices:
            own = tuple(handles.get(-1 if device.gpu_instance is None else device.gpu_instance, ()))
            part = before.get(device.key)
            if part is None or not same_counters(part.device, device):
                part = _Part(device=device, handles=own)
            else:
                del before[device.key]
            part.device, part.handles = device, own
            self._parts[device.key] = part
            if part.gpm is not None:
                part.gpm.meter.learn_device(device.sm_count, limits)
            elif device.gpu_instance is not None and self.has_gpm and not part.refused:
                self._open_gpm(part, device.gpu_instance, limits)
        for part in before.values():
            _free(part)

    def _open_gpm(self, part: _Part, gpu_instance: int, limits: Limits) -> None:
        # Parts of one GPU count alike: what one of them has shown holds for all.
        known = self.scales()
        scale = known.get(part.device.key) or next(iter(known.values()), None)
        freeze = functools.partial(self._nvml.gpm_mig_sample, self._handle, gpu_instance)
        try:
            part.gpm = GpmPair(self._nvml, freeze, GpmMeter(part.device.sm_count, scale, limits))
        except DriverError as error:
            part.why_no_gpm, part.refused = _field_reason(error), error.meaning.lasting

    # --- every tick ---------------------------------------------------------------------------

    def _sample(self, part: _Part, whole: GpuSample, clock_khz: int | None) -> GpuSample:
        device, slices = part.device, part.device.slices
        assert slices is not None, "a part has slices"
        absent = {name: why for name, why in whole.absent.items() if name in OF_THE_WHOLE}
        processes: tuple[int, ...] | None = ()
        tier: Tier = "none"
        reading: GpmReading | None = None
        if device.gpu_instance is None:
            absent["cycles"] = why_idle(device, len(self._parts))
        else:
            processes = self._processes(part, device.gpu_instance, absent)
            reading = self._reading(part, whole.boot_ns, clock_khz, absent)
        cycles = None if reading is None else reading.cycles
        ratios: dict[str, Fraction] | None = None
        if reading is not None:
            tier, ratios = _tier(reading, absent, follows=part.follows)
        part.counted = cycles is not None
        energy_mj = whole.energy_counter_mj
        return msgspec.structs.replace(
            whole,
            device=device,
            tier=tier,
            cycles=cycles,
            utilization=ratios,
            energy_mj=None if energy_mj is None else slices.part(energy_mj),
            processes=processes,
            absent=absent,
            uncertain_cycles=0 if reading is None else reading.uncertain_cycles,
            names=self._names(device, whole),
        )

    def _names(self, device: Device, whole: GpuSample) -> DeviceNames | None:
        if whole.names is None or device.gpu_instance is None:
            return whole.names
        uuids = self._uuids.get(device.gpu_instance, ())
        return msgspec.structs.replace(whole.names, mig_uuids=uuids)

    def _reading(
        self, part: _Part, boot_ns: int, clock_khz: int | None, absent: dict[str, str]
    ) -> GpmReading | None:
        if part.gpm is None or not part.frozen:
            absent["cycles"] = part.why_not_frozen
            return None
        try:
            return part.gpm.reading(boot_ns, clock_khz, hand_over=part.delivered_counted is False)
        except DriverError as error:
            absent["cycles"] = _field_reason(error)
            return None

    def _processes(
        self, part: _Part, gpu_instance: int, absent: dict[str, str]
    ) -> tuple[int, ...] | None:
        """Compute processes and clients of MPS on every MIG device of the instance."""
        found: set[int] = set()
        for handle in part.handles:
            compute = self._pids(self._nvml.compute_pids, handle, gpu_instance)
            if isinstance(compute, str):
                absent["processes"] = compute
                return None
            clients = self._pids(self._nvml.mps_pids, handle, gpu_instance)
            found.update(compute, () if isinstance(clients, str) else clients)
        return tuple(sorted(found))

    @staticmethod
    def _pids(
        read: Callable[[Handle, int | None], tuple[int, ...]], handle: Handle, gpu_instance: int
    ) -> tuple[int, ...] | str:
        try:
            return read(handle, gpu_instance)
        except DriverError as error:
            return _field_reason(error)


def same_counters(before: Device, now: Device) -> bool:
    """Whether counters of `before` go on in `now`: the same instance, be it at another place."""
    if before.key != now.key or (before.slices is None) != (now.slices is None):
        return False
    if before.slices is None or now.slices is None:
        return True
    size = before.slices.count, before.sm_count
    return before.gpu_instance is not None and size == (now.slices.count, now.sm_count)


def _tier(
    reading: GpmReading, absent: dict[str, str], *, follows: bool
) -> tuple[Tier, dict[str, Fraction] | None]:
    """The tier of an instance's reading; there is nothing coarser to fall back to under MIG."""
    absent |= reading.absent
    begins = reading.utilization is None and reading.tier != "gpm_cycles"
    if begins and reading.cycles is not None and not follows:
        absent.pop("utilization", None)
        return "gpm_cycles", None
    if reading.tier is not None and not (begins and follows):
        return reading.tier, reading.utilization
    return ("gpm_cycles" if reading.cycles is not None else "none"), None


def _field_reason(error: DriverError) -> str:
    """Why a part's field is absent; errors beyond a field are the GPU's and go on up."""
    if error.meaning.scope != "field":
        raise error
    return error.meaning.reason


def _free(part: _Part) -> None:
    if part.gpm is not None:
        part.gpm.free()
        part.gpm = None
