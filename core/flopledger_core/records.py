"""Records: the immutable facts the journal keeps. Integers only, absent is None with a reason.

A usage record's truth is integer SM-cycles per pipe, millijoules and milliseconds; FLOP is not in
it, because a better FLOP model must be able to restate history without touching a record. Times
are half-open intervals. People's entries (a project, a declaration, a budget, imported hours) are
records too, so that one journal and one verifier serve all.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from flopledger_core.activities import require_activity
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import Owner, require_project
from flopledger_core.units import INT64_MAX, UNIX_MS_MAX

Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
UnixMs = Annotated[int, Meta(ge=0, le=UNIX_MS_MAX)]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
# Patterns end with \Z, not $: a dollar also matches before a final newline, a second byte form.
Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
ComputeCapability = Annotated[str, Meta(pattern=r"\A[1-9][0-9]?\.[0-9]\Z")]
PciDeviceId = Annotated[str, Meta(pattern=r"\A[0-9A-F]{4}\Z")]
# Below 1e29: a thousand times the largest threshold in any law, and ninety of them still fit the
# two limbs (9.2e30) that the collector keeps a sum in.
DECIMAL_DIGITS_MAX: Final = 29
DecimalAmount = Annotated[str, Meta(pattern=r"\A(0|[1-9][0-9]*)\Z", max_length=DECIMAL_DIGITS_MAX)]
Currency = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]
FlagList = Annotated[tuple[str, ...], Meta(max_length=16)]

Tier = Literal[
    "gpm_cycles", "gpm_util", "dcgm_pipes", "sm_active", "gpu_util", "gpu_hours", "declared", "none"
]
Precision = Literal["fp64", "tf32", "fp16", "bf16", "fp8", "fp6", "fp4", "int8"]
PrecisionOrigin = Literal["declared", "configured", "unknown"]
CyclesOrigin = Literal["measured", "derived", "absent"]
EnergyOrigin = Literal["counter", "power_integral", "absent"]
EnergyScope = Literal["gpu", "module"]  # of the counter: the GPU alone, or CPU, GPU and memory
HostBoundary = Literal["cpu_package", "dram", "platform", "node"]
HostEnergySource = Literal["rapl", "redfish", "ipmi"]
# What turned cycles into FLOP; rates are dense in every one.
PeakBasis = Literal[
    "dense_at_counted_cycles",
    "dense_at_sampled_clock",
    "dense_at_maximum_clock",
    "dense_at_datasheet_clock",
]
AttributionSource = Literal[
    "tag",
    "environment",
    "scheduler",
    "rule",
    "default",
    "idle",
    "none",
    "import",
    "declaration",
]

TIERS: Final[tuple[str, ...]] = get_args(Tier)
HOST_BOUNDARIES: Final[tuple[str, ...]] = get_args(HostBoundary)

FLAGS: Final[dict[str, str]] = {
    "recovered": "spans dark time of the agent, bridged by counters that kept counting",
    "counter_reset": "a cumulative counter restarted inside the window; its part before is lost",
    "shared": "several owners held the device; the split is a rule, not a measurement",
    "clock_stepped": "wall time stepped inside the window; durations come from boot time",
    "invalid_tag": "a tag was refused as an id and ignored",
    "tag_conflict": "a tag contradicted what the scheduler says of the job; the scheduler won",
    "outside_allocation": "a process used the device outside the job that the scheduler gave it to",
    "apportioned": "energy of the whole device, cut by a rule: no counter reads it for the part",
    "energy_cross_check": "the energy counter and integrated power differ by more than a tenth",
    "tensor_cross_check": "the tensor pipes do not add up to the counter of any tensor work",
    "xid_error": "the driver reported an error (XID) of this device inside the window",
    "device_not_in_table": "the hardware table lacks this model; bounds are its architecture's",
}


class Cycles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SM-cycles of one window, summed over SMs; a pipe that could not be read is None.

    `elapsed` counts every SM, idle ones included; each other field counts the SM-cycles in which
    that pipe was active. `any_tensor` contains `hmma`, `imma`, `dmma` and `dfma`.
    """

    elapsed: Count | None = None
    sm_active: Count | None = None
    any_tensor: Count | None = None
    hmma: Count | None = None
    imma: Count | None = None
    dmma: Count | None = None
    dfma: Count | None = None
    fp64: Count | None = None
    fp32: Count | None = None
    fp16: Count | None = None
    integer: Count | None = None

    def as_dict(self) -> dict[str, int | None]:
        """Every field by name, in the declared order."""
        return {name: getattr(self, name) for name in CYCLE_FIELDS}


CYCLE_FIELDS: Final[tuple[str, ...]] = Cycles.__struct_fields__
PIPES: Final = tuple(name for name in CYCLE_FIELDS if name not in {"elapsed", "sm_active"})
NO_CYCLES: Final = Cycles()


class Attribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why the owner of a record is its owner, and its part of a shared device.

    The record's amounts are `weight / weights` of the device's, whole where nobody shared it.
    """

    source: AttributionSource
    sharers: Annotated[int, Meta(ge=1, le=4096)] = 1  # owners of the device in this window
    weight: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    weights: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    evidence: Annotated[str, Meta(max_length=256)] | None = None

    def __post_init__(self) -> None:
        if self.weight > self.weights or (self.sharers == 1) != (self.weight == self.weights):
            raise InvalidInput(
                "attribution.weight",
                (self.weight, self.weights, self.sharers),
                "a sole owner has all weights, one of several has some",
            )


class Slices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a partitioned GPU (MIG) a device is, in compute slices.

    The parts of a GPU lie side by side from 0 to `of_count`; the last one holds the slices that
    no GPU instance uses. Whatever is only known of the whole GPU (its time, its energy) is dealt
    out to the slices unit by unit, unit k to slice k modulo `of_count`: so the parts sum exactly
    to the whole, and no part of a counter that grows ever falls.
    """

    first_index: Annotated[int, Meta(ge=0, le=64)]
    count: Annotated[int, Meta(ge=0, le=64)]
    of_count: Annotated[int, Meta(ge=1, le=64)]
    sms_of: Annotated[int, Meta(ge=1, le=4096)] | None = None  # SMs of the whole GPU

    def __post_init__(self) -> None:
        if self.first_index + self.count > self.of_count:
            raise InvalidInput("slices.count", self.count, "end within the GPU's slices")

    def part(self, whole: int) -> int:
        """This part of a cumulative whole, exactly: over all parts it sums to `whole`."""
        rounds, rest = divmod(whole, self.of_count)
        return rounds * self.count + min(max(rest - self.first_index, 0), self.count)


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The GPU, or MIG instance of one, that a record speaks of."""

    uuid: Annotated[str, Meta(min_length=1, max_length=96)]
    gpu_instance: Annotated[int, Meta(ge=0, le=64)] | None = None
    name: Annotated[str, Meta(min_length=1, max_length=128)]  # the product name as NVML gives it
    pci_device_id: PciDeviceId | None = None
    compute_capability: ComputeCapability | None = None  # names the architecture of any model
    sm_count: Annotated[int, Meta(ge=1, le=4096)] | None = None
    slices: Slices | None = None  # only of a partitioned GPU

    @property
    def key(self) -> str:
        """One string for the metered thing: the UUID, with the GPU instance where there is one."""
        return self.uuid if self.gpu_instance is None else f"{self.uuid}/{self.gpu_instance}"


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Executed FLOP as the agent computed it from a record's own counters when it was sealed.

    The counters stay the truth: a better model or table row restates them, and a statement shows
    this first estimate beside the restated one. It is never edited.
    """

    flop_low: DecimalAmount
    flop_central: DecimalAmount
    flop_high: DecimalAmount | None  # None: open
    assumed_precision: Precision  # of the central value
    peak_basis: PeakBasis
    model_version: Text
    table_version: Text


class UsageRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="usage",
    tag_field="kind",
):
    """One measurement window of one device for one owner.

    `gpu_time_ms` is conserved: over the owners of a device it sums exactly to the window's length
    `end_boot_ms - start_boot_ms`. `allocated_time_ms` and `wall_time_ms` are not conserved.
    """

    device: Device
    start_unix_ms: UnixMs
    start_boot_ms: Count
    end_boot_ms: Count
    owner: Owner
    attribution: Attribution
    gpu_time_ms: Count
    allocated_time_ms: Count | None
    wall_time_ms: Count
    tier: Tier
    precision: Precision | None
    precision_origin: PrecisionOrigin
    cycles: Cycles
    cycles_origin: CyclesOrigin
    energy_mj: Count | None
    energy_origin: EnergyOrigin
    energy_counter_mj: Count | None  # the device's own counter at the window's end, raw
    energy_scope: EnergyScope = "gpu"
    power_integral_mj: Count | None = None  # sampled power times time, beside the counter
    sm_clock_khz: Count | None  # mean over the window, where it was sampled
    # How far each counted pipe may lie from the truth, in SM-cycles: 0 where counters are exact
    # integers, more once they passed 2^53 as doubles or count the mean SM.
    uncertain_cycles: Count = 0
    estimate: Estimate | None = None
    absent: dict[str, str]  # quantity -> why it is absent
    flags: FlagList
    user_commitment: Hex64 | None

    def __post_init__(self) -> None:
        _require_interval(self.start_unix_ms, self.start_boot_ms, self.end_boot_ms)
        _require_flags(self.flags)
        if list(self.absent) != sorted(self.absent):
            raise InvalidInput("absent", list(self.absent), "sort the quantities by name")
        if (self.cycles == NO_CYCLES) != (self.cycles_origin == "absent"):
            raise InvalidInput("cycles_origin", self.cycles_origin, "absent, and only it, has none")
        if (self.energy_mj is None) != (self.energy_origin == "absent"):
            raise InvalidInput("energy_origin", self.energy_origin, "absent, and only it, has none")

    @property
    def window_ms(self) -> int:
        """Length of the measurement window."""
        return self.end_boot_ms - self.start_boot_ms

    @property
    def end_unix_ms(self) -> int:
        """Where the window ends in wall time, by its start and its own length."""
        return self.start_unix_ms + self.window_ms


class GapRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="gap",
    tag_field="kind",
):
    """Device time that nobody metered, with the owner that held the device and the reason.

    A gap contributes from zero up to the device's peak at maximum clock. `start_boot_ms` is None
    where the boot before it was another one; its length then comes from wall time.
    """

    device: Device
    start_unix_ms: UnixMs
    start_boot_ms: Count | None
    gap_ms: Count
    owner: Owner
    attribution: Attribution
    precision: Precision | None
    reason: Text
    flags: FlagList
    user_commitment: Hex64 | None

    def __post_init__(self) -> None:
        _require_flags(self.flags)
        if self.start_unix_ms + self.gap_ms > UNIX_MS_MAX:
            raise InvalidInput("gap_ms", self.gap_ms, "the gap must end before the year 10000")

    @property
    def end_unix_ms(self) -> int:
        """Where the gap ends in wall time."""
        return self.start_unix_ms + self.gap_ms


class HostRecord(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="host",
    tag_field="kind",
):
    """One measurement window of the node itself, without its GPUs, for one owner.

    Over the owners of a window, `idle` among them, `cpu_time_ms` sums exactly to
    `cpu_count * window_ms`. Energy is that of each boundary's own meter, cut by CPU time and
    flagged `apportioned`; boundaries contain each other and are never added. FLOP of CPUs is
    absent, with the reason.
    """

    start_unix_ms: UnixMs
    start_boot_ms: Count | None  # None: the window began in an earlier boot
    window_ms: Count
    owner: Owner
    attribution: Attribution
    cpu_count: Annotated[int, Meta(ge=1, le=65536)]  # logical CPUs
    cpu_time_ms: Count | None
    energy_mj: dict[HostBoundary, Count]
    energy_sources: dict[HostBoundary, HostEnergySource]
    absent: dict[str, str]  # quantity -> why it is absent
    flags: FlagList
    user_commitment: Hex64 | None

    def __post_init__(self) -> None:
        _require_flags(self.flags)
        if list(self.absent) != sorted(self.absent):
            raise InvalidInput("absent", list(self.absent), "sort the quantities by name")
        for name, found in (("energy_mj", self.energy_mj), ("energy_sources", self.energy_sources)):
            if list(found) != sorted(found):
                raise InvalidInput(name, list(found), "sort the boundaries by name")
        if list(self.energy_mj) != list(self.energy_sources):
            raise InvalidInput(
                "energy_sources", list(self.energy_sources), "give each energy its source"
            )
        if self.start_unix_ms + self.window_ms > UNIX_MS_MAX:
            raise InvalidInput("window_ms", self.window_ms, "windows end before the year 10000")

    @property
    def end_unix_ms(self) -> int:
        """Where the window ends in wall time."""
        return self.start_unix_ms + self.window_ms


class ProjectOpened(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="project",
    tag_field="kind",
):
    """A person opened a project: from here on it is known, and its usage is no longer flagged."""

    project: Text
    entity: Text | None
    title: Text | None
    at_unix_ms: UnixMs
    author: Text

    def __post_init__(self) -> None:
        require_project(self.project)


class Declaration(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="declaration",
    tag_field="kind",
):
    """What meters cannot see, stated by a person with evidence; never upgraded to measured."""

    project: Text
    model: Text | None
    run: Text | None
    activity: str
    start_unix_ms: UnixMs
    end_unix_ms: UnixMs
    flop_low: DecimalAmount | None
    flop_central: DecimalAmount | None
    flop_high: DecimalAmount | None
    flop_basis: Literal["executed", "model"]
    integer_operations: DecimalAmount | None = None  # None: not stated, which is not zero
    energy_mj: DecimalAmount | None
    gpu_time_ms: DecimalAmount | None
    cost_cents: DecimalAmount | None  # hundredths of the currency unit
    currency: Currency | None
    method: Text
    evidence: Text | None
    at_unix_ms: UnixMs
    author: Text

    def __post_init__(self) -> None:
        require_project(self.project)
        require_activity(self.activity)
        if self.end_unix_ms < self.start_unix_ms:
            raise InvalidInput("end_unix_ms", self.end_unix_ms, "end the period after its start")
        parts = [part for part in (self.flop_low, self.flop_central, self.flop_high) if part]
        if 0 < len(parts) < 3:
            raise InvalidInput("flop", parts, "declare low, central and high together")
        if len(parts) == 3 and not int(parts[0]) <= int(parts[1]) <= int(parts[2]):
            raise InvalidInput("flop", parts, "give low <= central <= high")
        if (self.cost_cents is None) != (self.currency is None):
            raise InvalidInput("currency", self.currency, "give a cost and its currency together")


class BudgetSet(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="budget",
    tag_field="kind",
):
    """A threshold of one's own on a project; a later entry with the same name replaces it."""

    project: Text
    name: Text
    quantity: Literal["flop", "energy_mj", "cost_cents", "gpu_time_ms"]
    currency: Currency | None
    limit: DecimalAmount
    at_unix_ms: UnixMs
    author: Text

    def __post_init__(self) -> None:
        require_project(self.project)
        if (self.quantity == "cost_cents") != (self.currency is not None):
            raise InvalidInput("currency", self.currency, "a cost budget, and only it, has one")


class ImportedHours(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="hours",
    tag_field="kind",
):
    """GPU time that a scheduler's record states; FLOP follows from a stated utilisation.

    `import_key` names the scheduler's own record (cluster, job, start), so that the same record
    imported twice is posted once.
    """

    import_key: Text
    cluster: Text
    owner: Owner
    accelerator: Text | None  # a key of the hardware table
    gpus: Annotated[int, Meta(ge=1, le=10_000_000)]
    start_unix_ms: UnixMs
    end_unix_ms: UnixMs
    gpu_time_ms: Count
    precision: Precision | None
    utilization_per_mille: Annotated[int, Meta(ge=0, le=1000)] | None
    utilization_source: Text | None
    source: Text
    at_unix_ms: UnixMs
    author: Text

    def __post_init__(self) -> None:
        if self.end_unix_ms < self.start_unix_ms:
            raise InvalidInput("end_unix_ms", self.end_unix_ms, "a job ends after its start")


AgentRecord = UsageRecord | GapRecord | HostRecord
PersonRecord = ProjectOpened | Declaration | BudgetSet | ImportedHours
Record = (
    UsageRecord | GapRecord | HostRecord | ProjectOpened | Declaration | BudgetSet | ImportedHours
)


def _require_interval(start_unix_ms: int, start_boot_ms: int, end_boot_ms: int) -> None:
    if end_boot_ms < start_boot_ms:
        raise InvalidInput("end_boot_ms", end_boot_ms, "a window ends at or after its start")
    if start_unix_ms + end_boot_ms - start_boot_ms > UNIX_MS_MAX:
        raise InvalidInput("start_unix_ms", start_unix_ms, "windows end before the year 10000")


def _require_flags(flags: tuple[str, ...]) -> None:
    if list(flags) != sorted(set(flags)):
        raise InvalidInput("flags", flags, "sort them and give each once")
    for flag in flags:
        if flag not in FLAGS:
            raise InvalidInput("flags", flag, f"use only: {', '.join(FLAGS)}")
