"""Reads one GPU through the driver; nothing in here is shared with another device.

A reader lives in one thread (later in one process) and is asked for one sample at a time. A field
that cannot be read is None with a reason; only an error that concerns the whole device, or every
field at once, fails the reading. It never fills in a zero and never keeps a handle after the
device was lost: the next reading opens it again by UUID. What a passing error hid at the opening is
asked again at every reading, and whatever the driver allocated is given back on every way out.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import TYPE_CHECKING, Final, TypeVar, cast

import msgspec

from flopledger_agent.gpus.clock_samples import ClockMean
from flopledger_agent.gpus.gpm import GpmMeter, GpmReading, Scale
from flopledger_agent.gpus.gpm_pair import GpmPair
from flopledger_agent.gpus.interface import GpuSample
from flopledger_agent.gpus.limits import limits_of
from flopledger_agent.gpus.mig import SMS_MAX
from flopledger_agent.gpus.mig_reader import PartitionReader
from flopledger_agent.gpus.nvml_errors import NOT_FOUND, DriverError, Scope
from flopledger_agent.gpus.opened import Opened
from flopledger_agent.gpus.process_use import ProcessUses
from flopledger_core.errors import FlopLedgerError
from flopledger_core.records import Device
from flopledger_core.units import INT64_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.nvml import Handle, Nvml
    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.records import Tier

T = TypeVar("T")

NOT_AVAILABLE: Final = frozenset({2**32 - 1, 2**64 - 1})  # NVML_VALUE_NOT_AVAILABLE_*
DEVICE_NAME_MAX: Final = 128  # records.Device.name
UNKNOWN_NAME: Final = "unknown"  # of a device that does not tell it yet
COMPUTE_CAPABILITY: Final = re.compile(r"[1-9][0-9]?\.[0-9]")  # what records.Device can hold
# Cycles of these tiers are ratios times the clock; counted cycles do not need one.
CLOCK_TIERS: Final = frozenset({"gpm_util", "sm_active", "gpu_util"})
# Readings held back at most while the scale of the cycle counters is found out: counting begins
# with the first sample, which also bridges dark time. Two intervals take three readings, of which
# two are held back. A sleeping GPU may not show its scale for long: then percentages serve first.
WARM_UP_READINGS: Final = 3
PERCENT_MAX: Final = 100
FIELDS: Final = ("energy_mj", "sm_clock_khz", "power_mw", "processes")


class DeviceUnreadable(FlopLedgerError):
    """The device could not be sampled; `scope` node means that the driver itself is gone."""

    def __init__(self, reason: str, scope: Scope) -> None:
        self.reason = reason
        self.scope = scope
        super().__init__(f"the device could not be sampled: {reason}")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader must know to take one sample.

    `generation` counts how often the driver was opened and `return_count` how often the device came
    back into the count: handles of before are void.
    `delivered`: the previous sample reached the consumer, so means begin at it.
    """

    generation: int
    return_count: int
    delivered: bool


class DeviceReader:
    """Samples the GPU with one UUID."""

    def __init__(
        self,
        nvml: Nvml,
        clock: Clock,
        table: AcceleratorTable,
        uuid: str,
        scales: Mapping[str, Scale] | None = None,
    ) -> None:
        self._nvml = nvml
        self._clock = clock
        self._table = table
        self._uuid = uuid
        self._generation = -1
        self._returns = 0
        self._opened: Opened | None = None
        # What an earlier reader found out on this driver: of the GPU, and of its parts by key.
        self._scale: Scale | None = (scales or {}).get(uuid)
        self._part_scales: dict[str, Scale] = {
            key: scale for key, scale in (scales or {}).items() if key.startswith(f"{uuid}/")
        }
        self._told_scales: dict[str, Scale] = {}  # replaced whole: another thread reads it
        self._tell_scales()
        self._sm_count_known: int | None = None
        self._warm_up = WARM_UP_READINGS
        # Whether the last sample, and the last one that reached the consumer, had cycles to count
        # from; None: there was none.
        self._counted: bool | None = None
        self._delivered_counted: bool | None = None
        self._counted_by: Scale | None = None  # the scale of the cycles delivered last
        self._follows = False  # the tick before this one was delivered
        self._clocks = ClockMean()
        self._uses = ProcessUses()

    def read(self, request: Request) -> tuple[GpuSample, ...]:
        """One sample of the GPU, or of each part of a partitioned one. Errors: DeviceUnreadable."""
        self._clocks.settle(delivered=request.delivered)
        self._uses.settle(delivered=request.delivered)
        if self._opened is not None:
            for counters in (self._opened.gpm, self._opened.parts):
                if counters is not None:
                    counters.settle(delivered=request.delivered)
        if request.generation != self._generation:
            self.release()
            if self._generation >= 0:
                self.forget_scales()  # another driver may count otherwise
            self._generation = request.generation
            self._warm_up = WARM_UP_READINGS
        if request.return_count != self._returns:
            self._returns = request.return_count
            self.release()
        self._follows = request.delivered
        if request.delivered:
            self._delivered_counted = self._counted
        try:
            opened = self._open()
            if not opened.is_complete:
                self._complete(opened)
            samples = self._samples(opened)
        except DriverError as error:
            opening = self._opened is None
            self.release()
            if opening and error.code == NOT_FOUND:
                raise DeviceUnreadable("device_missing", "device") from error
            raise DeviceUnreadable(error.meaning.reason, error.meaning.scope) from error
        self._counted = None if opened.partitioned else samples[0].cycles is not None
        self._warm_up = 0
        self._tell_scales()
        return samples

    def scales(self) -> dict[str, Scale]:
        """The scales believed at the last reading, by the key of the GPU or part; any thread."""
        return self._told_scales

    def forget_scales(self) -> None:
        """What was found out holds no longer, or was found out on another driver."""
        self._scale, self._part_scales = None, {}
        self._tell_scales()

    def _tell_scales(self) -> None:
        opened = self._opened
        parts = None if opened is None else opened.parts
        told = dict(self._part_scales if parts is None else parts.scales())
        if self._scale is not None:
            told[self._uuid] = self._scale
        self._told_scales = told

    def release(self) -> None:
        """Give back what the driver allocated for this device."""
        opened, self._opened = self._opened, None
        if opened is not None and opened.gpm is not None:
            self._counted_by = opened.gpm.meter.counted_by
            opened.gpm.free()
        if opened is not None and opened.parts is not None:
            self._part_scales = opened.parts.scales()
            opened.parts.free()

    def give_back(self) -> tuple[GpuSample, ...] | None:
        """Release, as a last job."""
        self.release()
        return None

    # --- what does not change -----------------------------------------------------------------

    def _open(self) -> Opened:
        """The device, opened anew where MIG was switched: then nothing else is as it was."""
        opened = self._opened
        if opened is not None:
            partitioned = self._is_partitioned(opened)
            if partitioned == opened.partitioned:
                return opened
            self.release()
        handle = self._nvml.handle_by_uuid(self._uuid)
        device = Device(uuid=self._uuid, name=UNKNOWN_NAME)
        opened = self._opened = Opened(handle=handle, device=device)
        opened.partitioned = self._is_partitioned(opened)
        return opened

    def _is_partitioned(self, opened: Opened) -> bool:
        """Whether MIG is on; as it was before where that cannot be read."""
        notes: dict[str, str] = {}
        found = self._field(opened, "mig_mode", self._nvml.mig_enabled, notes)
        if found is not None or "mig_mode" in opened.lasting:
            opened.is_mig_told, opened.why_mig_unknown = True, None
        elif not opened.is_mig_told:
            opened.why_mig_unknown = notes["mig_mode"]
        return opened.partitioned if found is None else found

    def _complete(self, opened: Opened) -> None:
        """Ask for the facts not known yet; what failed in passing is asked again next time."""
        nvml = self._nvml
        opened.absent = {}
        opened.is_complete = True
        name = self._fact(opened, "name", nvml.name) or UNKNOWN_NAME
        pci = self._fact(opened, "pci_device_id", nvml.pci_device_id)
        capability = self._compute_capability(opened)
        opened.known = self._table.resolve(name, pci, capability)
        max_clock_khz = self._fact(opened, "", nvml.max_sm_clock_khz)
        opened.limits = limits_of(opened.row, max_clock_khz)
        for read in (nvml.index, nvml.minor, nvml.pci_bus_id):
            self._fact(opened, "", read)
        sm_count = self._sm_count(opened)
        if sm_count is not None:
            if self._sm_count_known not in (None, sm_count) and self._delivered_counted:
                # Cycles of before may be summed over another number of SMs: count from here.
                self._delivered_counted = False
            self._sm_count_known = sm_count
        opened.device = Device(
            uuid=self._uuid,
            name=name[:DEVICE_NAME_MAX],
            pci_device_id=pci,
            compute_capability=capability,
            sm_count=sm_count,
        )
        if opened.gpm is None:
            self._open_counters(opened)
        else:
            opened.gpm.meter.learn_device(sm_count, opened.limits)

    def _open_counters(self, opened: Opened) -> None:
        supported = self._fact(opened, "gpm", self._nvml.gpm_supported)
        if opened.partitioned:
            if opened.parts is None:
                # What the whole GPU counts need not be what its parts count.
                opened.parts = PartitionReader(self._nvml, opened.handle, self._part_scales)
            opened.parts.has_gpm, opened.parts.row = bool(supported), opened.row
        elif supported:
            meter = GpmMeter(
                opened.device.sm_count, self._scale, opened.limits, counted_by=self._counted_by
            )
            opened.gpm = self._attempt(
                opened,
                "gpm",
                lambda handle: GpmPair(
                    self._nvml, functools.partial(self._nvml.gpm_sample, handle), meter
                ),
            )
        if opened.gpm is None and not opened.partitioned:
            opened.absent.setdefault("gpm", "gpm_not_supported")

    def _compute_capability(self, opened: Opened) -> str | None:
        """Names the architecture, also of a model that the hardware table lacks."""
        capability = self._fact(opened, "compute_capability", self._nvml.compute_capability)
        if capability is not None and not COMPUTE_CAPABILITY.fullmatch(capability):
            opened.absent["compute_capability"] = "out_of_range"
            return None
        return capability

    def _sm_count(self, opened: Opened) -> int | None:
        """SMs by the driver's core count, else by the model's row; None with the reason."""
        known = opened.known
        cores = self._fact(opened, "", self._nvml.core_count)
        if cores and known is not None and cores % known.architecture.cores_per_sm == 0:
            sm_count = cores // known.architecture.cores_per_sm
            if sm_count <= SMS_MAX:
                return sm_count
        if known is not None and known.in_table:
            return known.accelerator.sm_count
        opened.absent["sm_count"] = "sm_count_unknown"
        return None

    def _fact(self, opened: Opened, name: str, read: Callable[[Handle], T]) -> T | None:
        """A fact of the device, asked until it is answered or refused for good."""
        key = read.__name__
        if key not in opened.facts:
            value = self._attempt(opened, name, read)
            if value is None:
                return None
            opened.facts[key] = value
        return cast("T", opened.facts[key])

    def _attempt(self, opened: Opened, name: str, read: Callable[[Handle], T]) -> T | None:
        """Ask; the reason is noted under `name`, if it has one. Errors: of a device or a node."""
        try:
            return read(opened.handle)
        except DriverError as error:
            if error.meaning.scope != "field":
                raise
            if name:
                opened.absent[name] = error.meaning.reason
            if not error.meaning.lasting:
                opened.is_complete = False
            return None

    # --- every tick ---------------------------------------------------------------------------

    def _samples(self, opened: Opened) -> tuple[GpuSample, ...]:
        nvml, gpm = self._nvml, opened.gpm
        absent = dict(opened.absent)
        hand_over = self._delivered_counted is False
        if opened.parts is not None:
            unclear = opened.parts.look(opened.device, opened.limits)
            if unclear is not None:
                raise DeviceUnreadable(unclear, "field")
        before_ns = self._clock.boottime_ns()
        limits = opened.limits
        highest_mj = limits.energy_mj(before_ns)
        energy_mj = self._number(opened, "energy_mj", nvml.energy_mj, absent, highest_mj)
        taken: bool | None = None
        if gpm is not None:
            before_ns = self._clock.boottime_ns()
            taken = self._field(opened, "gpm", lambda _handle: gpm.take(), absent)
        elif opened.parts is not None:
            before_ns = self._clock.boottime_ns()
            opened.parts.freeze()
        boot_ns = (before_ns + self._clock.boottime_ns()) // 2
        clock_khz = self._number(
            opened, "sm_clock_khz", nvml.sm_clock_khz, absent, limits.sm_clock_khz
        )
        of_module = opened.energy_scope == "module"
        read_power = nvml.module_power_mw if of_module else nvml.power_mw
        power_mw = self._number(opened, "power_mw", read_power, absent, limits.power_mw)
        processes = self._processes(opened, absent)
        reading: GpmReading | None = None
        if gpm is not None and taken:
            reading = self._field(
                opened,
                "gpm",
                lambda _handle: gpm.reading(boot_ns, clock_khz, hand_over=hand_over),
                absent,
            )
        tier, utilization = self._tier(opened, reading, absent)
        finest = tier if opened.parts is None else opened.parts.finest_tier
        sm_clock_khz = self._mean_clock(opened, finest, clock_khz, absent)
        self._require_something(opened, tier, absent)
        self._require_scale(opened, absent)
        whole = GpuSample(
            device=opened.device,
            boot_ns=boot_ns,
            tier=tier,
            cycles=None if reading is None else reading.cycles,
            utilization=utilization,
            sm_clock_khz=sm_clock_khz,
            energy_mj=energy_mj,
            power_mw=power_mw,
            processes=processes,
            absent=absent,
            energy_counter_mj=energy_mj,
            energy_scope=opened.energy_scope,
            uncertain_cycles=0 if reading is None else reading.uncertain_cycles,
            process_utilization=self._use_by_process(opened, processes),
            names=opened.names,
        )
        if opened.parts is None:
            return (whole,)
        samples = opened.parts.samples(whole, clock_khz)
        for sample in samples:
            self._require_scale(opened, sample.absent)
        return samples

    def _tier(
        self, opened: Opened, reading: GpmReading | None, absent: dict[str, str]
    ) -> tuple[Tier, dict[str, Fraction] | None]:
        counted = reading is not None and reading.cycles is not None
        if reading is not None:
            absent |= reading.absent
            begins = reading.utilization is None and reading.tier != "gpm_cycles"
            if begins and counted and not self._follows:
                absent.pop("utilization", None)
                return "gpm_cycles", None
            # Means begin with this reading: coarse ones, good for one tick, serve until then.
            if reading.tier is not None and not (begins and self._follows):
                return reading.tier, reading.utilization
            absent.pop("utilization", None)
        if not counted:
            absent.setdefault("cycles", absent.pop("gpm", "gpm_not_supported"))
        percent = self._number(
            opened, "utilization", self._nvml.utilization_percent, absent, PERCENT_MAX
        )
        if percent is None:
            return ("gpm_cycles" if counted else "none"), None
        return "gpu_util", {"sm_active": Fraction(percent, 100)}

    def _mean_clock(
        self, opened: Opened, tier: Tier, reading_khz: int | None, absent: dict[str, str]
    ) -> int | None:
        """The mean since the previous sample, see `clock_samples`.

        The driver's buffer is asked only where cycles depend on it. A device without one is noted.
        """
        of_ends = self._clocks.of_ends(reading_khz)
        if tier not in CLOCK_TIERS:
            return of_ends
        notes: dict[str, str] = {}
        of_samples = self._field(
            opened,
            "sm_clock_samples",
            lambda handle: self._clocks.of_samples(
                functools.partial(self._nvml.sm_clock_samples, handle), opened.limits.sm_clock_khz
            ),
            notes,
        )
        if "sm_clock_samples" in opened.lasting:
            absent |= notes
        if of_samples is None:
            return of_ends
        absent.pop("sm_clock_khz", None)
        return of_samples

    def _use_by_process(
        self, opened: Opened, processes: tuple[int, ...] | None
    ) -> dict[int, int] | None:
        """What each of several processes used; the driver tells it of no partitioned GPU."""
        if opened.partitioned or processes is None or len(processes) < 2:
            self._uses.skip()
            return None
        return self._field(
            opened,
            "process_utilization",
            lambda handle: self._uses.since(functools.partial(self._nvml.process_uses, handle)),
            {},
        )

    def _processes(self, opened: Opened, absent: dict[str, str]) -> tuple[int, ...] | None:
        """Compute processes and clients of MPS; graphics alone does not hold a device."""
        compute = self._field(opened, "processes", self._nvml.compute_pids, absent)
        if compute is None:
            return None
        if not compute and opened.why_mig_unknown is not None:
            absent["processes"] = opened.why_mig_unknown  # those of its parts do not show here
            return None
        clients = self._field(opened, "processes.mps", self._nvml.mps_pids, absent)
        if "processes.mps" in opened.lasting:
            del absent["processes.mps"]  # no MPS on this device: nothing is missing
        if not clients:
            return compute
        return tuple(sorted({*compute, *clients}))

    def _number(
        self,
        opened: Opened,
        name: str,
        read: Callable[[Handle], int],
        absent: dict[str, str],
        highest: int,
    ) -> int | None:
        value = self._field(opened, name, read, absent)
        if value is None:
            return None
        if value in NOT_AVAILABLE:
            absent[name] = "not_available"
            return None
        if not 0 <= value <= min(highest, INT64_MAX):
            absent[name] = "out_of_range"
            return None
        return value

    def _field(
        self, opened: Opened, name: str, read: Callable[[Handle], T], absent: dict[str, str]
    ) -> T | None:
        """A reading, or None with the reason noted; errors beyond a field go on up."""
        reason = opened.lasting.get(name)
        if reason is None:
            try:
                return read(opened.handle)
            except DriverError as error:
                if error.meaning.scope != "field":
                    raise
                reason = error.meaning.reason
                if error.meaning.lasting:
                    opened.lasting[name] = reason
        absent[name] = reason
        return None

    def _require_something(self, opened: Opened, tier: Tier, absent: dict[str, str]) -> None:
        """A device none of whose fields can be read is not sampled, whatever the code says."""
        if tier != "none" or not all(name in absent for name in FIELDS):
            return
        passing = [absent[name] for name in FIELDS if name not in opened.lasting]
        if passing:
            self.release()
            raise DeviceUnreadable(passing[0], "device")

    def _require_scale(self, opened: Opened, absent: dict[str, str]) -> None:
        """Hold the first readings back while the scale of the cycle counters is not known yet."""
        if opened.gpm is not None:
            self._scale = opened.gpm.meter.scale
        if absent.get("cycles") == "scale_undetermined" and self._warm_up > 0:
            self._warm_up -= 1
            raise DeviceUnreadable("warming_up", "field")
