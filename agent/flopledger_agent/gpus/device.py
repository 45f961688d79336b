"""Reads one GPU through the driver; nothing in here is shared with another device.

A reader lives in one thread (later in one process) and is asked for one sample at a time. A field
that cannot be read is None with a reason; only an error that concerns the whole device, or every
field at once, fails the reading. It never fills in a zero and never keeps a handle after the
device was lost: the next reading opens it again by UUID. What a passing error hid at the opening is
asked again at every reading, and whatever the driver allocated is given back on every way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from fractions import Fraction
from typing import TYPE_CHECKING, Final, TypeVar, cast

import msgspec

from flopledger_agent.gpus.gpm import ALL_IDS, PERCENTAGE_IDS, GpmMeter, GpmReading, Scale
from flopledger_agent.gpus.interface import GpuSample
from flopledger_agent.gpus.limits import UNKNOWN_LIMITS, Limits, limits_of
from flopledger_agent.gpus.nvml_errors import NOT_FOUND, DriverError, Scope
from flopledger_core.errors import FlopLedgerError
from flopledger_core.records import Device
from flopledger_core.units import INT64_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.nvml import GpmQuery, GpmSampleBuffer, Handle, Nvml
    from flopledger_core.accelerators import Accelerator, AcceleratorTable
    from flopledger_core.records import Tier

T = TypeVar("T")

NOT_AVAILABLE: Final = frozenset({2**32 - 1, 2**64 - 1})  # NVML_VALUE_NOT_AVAILABLE_*
DEVICE_NAME_MAX: Final = 128  # records.Device.name
UNKNOWN_NAME: Final = "unknown"  # of a device that does not tell it yet
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


class _Gpm:
    """The two sample buffers of a device, and the query over them.

    `_buffers[0]` is the baseline, `_buffers[1]` the newest sample; they are swapped once a sample
    is known to be delivered, so no cycle falls between two means.
    """

    def __init__(self, nvml: Nvml, handle: Handle, meter: GpmMeter) -> None:
        self._nvml = nvml
        self._handle = handle
        self._buffers: list[GpmSampleBuffer] = []
        self._query: GpmQuery = nvml.gpm_query(ALL_IDS)
        self._whole = True
        self._baseline = False  # the baseline buffer holds the last delivered sample
        self._fresh = False
        self.meter = meter
        try:
            for _ in range(2):
                self._buffers.append(nvml.gpm_allocate())
            nvml.gpm_sample(handle, self._buffers[0])  # the first reading has a pair already
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Give the buffers back, as far as the driver takes them; nothing is read afterwards."""
        while self._buffers:
            with contextlib.suppress(DriverError):
                self._nvml.gpm_free(self._buffers.pop())

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous sample."""
        if delivered:
            if self._fresh:
                self._buffers.reverse()
            self._baseline = self._fresh
        self._fresh = False

    def take(self) -> bool:
        """Freeze the counters now."""
        self._nvml.gpm_sample(self._handle, self._buffers[1])
        self._fresh = True
        return True

    def reading(self, boot_ns: int, sm_clock_khz: int | None, *, hand_over: bool) -> GpmReading:
        """What the pair of samples says. `hand_over`: see GpmMeter.interpret."""
        try:
            answers = self._query.answers(*self._buffers)
        except DriverError as error:
            if error.meaning.scope != "field" or not self._whole:
                raise
            # A driver that does not know the newer ids may refuse the whole call.
            narrow = self._nvml.gpm_query(PERCENTAGE_IDS)
            answers = narrow.answers(*self._buffers)
            if error.meaning.reason in {"invalid_argument", "not_supported", "not_found"}:
                self._query, self._whole = narrow, False
        return self.meter.interpret(
            answers,
            boot_ns=boot_ns,
            sm_clock_khz=sm_clock_khz,
            since_delivered=self._baseline,
            hand_over=hand_over,
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class _Opened:
    """A device whose handle is valid, with what does not change while it is."""

    handle: Handle
    device: Device
    row: Accelerator | None = None
    limits: Limits = UNKNOWN_LIMITS
    gpm: _Gpm | None = None
    facts: dict[str, object] = dataclasses.field(default_factory=dict)  # answered, for good
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    lasting: dict[str, str] = dataclasses.field(default_factory=dict)  # not worth asking again
    is_complete: bool = False  # no fact is left to ask for again


class DeviceReader:
    """Samples the GPU with one UUID."""

    def __init__(self, nvml: Nvml, clock: Clock, table: AcceleratorTable, uuid: str) -> None:
        self._nvml = nvml
        self._clock = clock
        self._table = table
        self._uuid = uuid
        self._generation = -1
        self._returns = 0
        self._opened: _Opened | None = None
        self._scale: Scale | None = None
        self._sm_count_known: int | None = None
        self._warm_up = WARM_UP_READINGS
        # Whether the last sample, and the last one that reached the consumer, had cycles to count
        # from; None: there was none.
        self._counted: bool | None = None
        self._delivered_counted: bool | None = None
        self._follows = False  # the tick before this one was delivered

    def read(self, request: Request) -> GpuSample:
        """One sample. Errors: DeviceUnreadable."""
        if request.generation != self._generation:
            self._generation = request.generation
            self.release()
            self._scale = None  # another driver may count otherwise
            self._warm_up = WARM_UP_READINGS
        if request.return_count != self._returns:
            self._returns = request.return_count
            self.release()
        self._follows = request.delivered
        if request.delivered:
            self._delivered_counted = self._counted
        try:
            if self._opened is None:
                handle = self._nvml.handle_by_uuid(self._uuid)
                device = Device(uuid=self._uuid, name=UNKNOWN_NAME)
                self._opened = _Opened(handle=handle, device=device)
            opened = self._opened
            if not opened.is_complete:
                self._complete(opened)
            if opened.gpm is not None:
                opened.gpm.settle(delivered=request.delivered)
            sample = self._sample(opened)
        except DriverError as error:
            opening = self._opened is None
            self.release()
            if opening and error.code == NOT_FOUND:
                raise DeviceUnreadable("device_missing", "device") from error
            raise DeviceUnreadable(error.meaning.reason, error.meaning.scope) from error
        self._counted = sample.cycles is not None
        self._warm_up = 0
        return sample

    def release(self) -> None:
        """Give back what the driver allocated for this device."""
        opened, self._opened = self._opened, None
        if opened is not None and opened.gpm is not None:
            opened.gpm.free()

    def give_back(self) -> GpuSample | None:
        """Release, as a last job."""
        self.release()
        return None

    # --- what does not change -----------------------------------------------------------------

    def _complete(self, opened: _Opened) -> None:
        """Ask for the facts not known yet; what failed in passing is asked again next time."""
        nvml = self._nvml
        opened.absent = {}
        opened.is_complete = True
        name = self._fact(opened, "name", nvml.name) or UNKNOWN_NAME
        pci = self._fact(opened, "pci_device_id", nvml.pci_device_id)
        opened.row = self._table.find(name, pci)
        max_clock_khz = self._fact(opened, "", nvml.max_sm_clock_khz)
        opened.limits = limits_of(opened.row, max_clock_khz)
        sm_count = self._sm_count(opened)
        if sm_count is not None:
            if self._sm_count_known not in (None, sm_count) and self._delivered_counted:
                # Cycles of before may be summed over another number of SMs: count from here.
                self._delivered_counted = False
            self._sm_count_known = sm_count
        opened.device = Device(
            uuid=self._uuid, name=name[:DEVICE_NAME_MAX], pci_device_id=pci, sm_count=sm_count
        )
        if opened.gpm is None:
            self._open_gpm(opened)
        else:
            opened.gpm.meter.learn_device(sm_count, opened.limits)

    def _open_gpm(self, opened: _Opened) -> None:
        supported = self._fact(opened, "gpm", self._nvml.gpm_supported)
        if supported:
            meter = GpmMeter(opened.device.sm_count, self._scale, opened.limits)
            opened.gpm = self._attempt(
                opened, "gpm", lambda handle: _Gpm(self._nvml, handle, meter)
            )
        if opened.gpm is None:
            opened.absent.setdefault("gpm", "gpm_not_supported")

    def _sm_count(self, opened: _Opened) -> int | None:
        """SMs by the driver's core count, else by the table; None with the reason."""
        row = opened.row
        if row is not None:
            cores_per_sm: int | None = self._table.architecture_of(row).cores_per_sm
        else:
            capability = self._fact(opened, "", self._nvml.compute_capability)
            matches = [
                architecture.cores_per_sm
                for architecture in self._table.architectures.values()
                if capability in architecture.compute_capabilities
            ]
            cores_per_sm = matches[0] if matches else None
        cores = self._fact(opened, "", self._nvml.core_count)
        if cores and cores_per_sm and cores % cores_per_sm == 0:
            return cores // cores_per_sm
        if row is not None:
            return row.sm_count
        opened.absent["sm_count"] = "sm_count_unknown"
        return None

    def _fact(self, opened: _Opened, name: str, read: Callable[[Handle], T]) -> T | None:
        """A fact of the device, asked until it is answered or refused for good."""
        key = read.__name__
        if key not in opened.facts:
            value = self._attempt(opened, name, read)
            if value is None:
                return None
            opened.facts[key] = value
        return cast("T", opened.facts[key])

    def _attempt(self, opened: _Opened, name: str, read: Callable[[Handle], T]) -> T | None:
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

    def _sample(self, opened: _Opened) -> GpuSample:
        nvml, gpm = self._nvml, opened.gpm
        absent = dict(opened.absent)
        hand_over = self._delivered_counted is False
        before_ns = self._clock.boottime_ns()
        limits = opened.limits
        highest_mj = limits.energy_mj(before_ns)
        energy_mj = self._number(opened, "energy_mj", nvml.energy_mj, absent, highest_mj)
        taken: bool | None = None
        if gpm is not None:
            before_ns = self._clock.boottime_ns()
            taken = self._field(opened, "gpm", lambda _handle: gpm.take(), absent)
        boot_ns = (before_ns + self._clock.boottime_ns()) // 2
        sm_clock_khz = self._number(
            opened, "sm_clock_khz", nvml.sm_clock_khz, absent, limits.sm_clock_khz
        )
        power_mw = self._number(opened, "power_mw", nvml.power_mw, absent, limits.power_mw)
        processes = self._processes(opened, absent)
        reading: GpmReading | None = None
        if gpm is not None and taken:
            reading = self._field(
                opened,
                "gpm",
                lambda _handle: gpm.reading(boot_ns, sm_clock_khz, hand_over=hand_over),
                absent,
            )
        tier, utilization = self._tier(opened, reading, absent)
        self._require_something(opened, tier, absent)
        self._require_scale(opened, absent)
        return GpuSample(
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
        )

    def _tier(
        self, opened: _Opened, reading: GpmReading | None, absent: dict[str, str]
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

    def _processes(self, opened: _Opened, absent: dict[str, str]) -> tuple[int, ...] | None:
        """Compute processes and clients of MPS; graphics alone does not hold a device."""
        compute = self._field(opened, "processes", self._nvml.compute_pids, absent)
        if compute is None:
            return None
        clients = self._field(opened, "processes.mps", self._nvml.mps_pids, absent)
        if "processes.mps" in opened.lasting:
            del absent["processes.mps"]  # no MPS on this device: nothing is missing
        if not clients:
            return compute
        return tuple(sorted({*compute, *clients}))

    def _number(
        self,
        opened: _Opened,
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
        self, opened: _Opened, name: str, read: Callable[[Handle], T], absent: dict[str, str]
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

    def _require_something(self, opened: _Opened, tier: Tier, absent: dict[str, str]) -> None:
        """A device none of whose fields can be read is not sampled, whatever the code says."""
        if tier != "none" or not all(name in absent for name in FIELDS):
            return
        passing = [absent[name] for name in FIELDS if name not in opened.lasting]
        if passing:
            self.release()
            raise DeviceUnreadable(passing[0], "device")

    def _require_scale(self, opened: _Opened, absent: dict[str, str]) -> None:
        """Hold the first readings back while the scale of the cycle counters is not known yet."""
        if opened.gpm is not None:
            self._scale = opened.gpm.meter.scale
        if absent.get("cycles") == "scale_undetermined" and self._warm_up > 0:
            self._warm_up -= 1
            raise DeviceUnreadable("warming_up", "field")
