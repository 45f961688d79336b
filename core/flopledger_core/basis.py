"""A record as summable integers: every rule that is not linear is here, and none of the table.

`basis` says what was counted and what could have been: which pipe contains which, what an absent
counter may have hidden, which part of a shared or partitioned device nobody can tell apart. The
amounts add up over records in any order; `flop.work` and `energy.energy_bounds` turn the sums
into bounds with the table of the day, which is how history is restated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, get_args

from flopledger_core.energy import HOST_POWER_LIMIT_WATTS
from flopledger_core.records import (
    Cycles,
    Declaration,
    GapRecord,
    HostBoundary,
    HostRecord,
    ImportedHours,
    UsageRecord,
)
from flopledger_core.units import US_PER_MS, ceil_div, floor_div

if TYPE_CHECKING:
    from flopledger_core.records import Attribution, Device, Record

# Coarse tiers see that SMs or the GPU were busy, not with what. The central share of the tensor
# peak is the middle of what fleets report (docs/methodology.md, "Coarse tiers"); the low end is 0.
SM_ACTIVE_CENTRAL_PER_MILLE: Final = 450
GPU_UTIL_CENTRAL_PER_MILLE: Final = 300

WORK_PIPES: Final = (
    "float_tensor", "fp64_tensor", "int_tensor", "fp64", "fp32", "fp16", "integer",
)  # fmt: skip
_CORE_PIPES: Final = ("fp64", "fp32", "fp16", "integer")
_BOUNDARIES: Final[tuple[HostBoundary, ...]] = get_args(HostBoundary)
_PIPE_TIERS: Final = frozenset({"gpm_cycles", "gpm_util", "dcgm_pipes"})

# HMMA should count what is left of any-tensor activity without integers and FP64. Overlap, skew
# and rounding move the two by some per cent; a counter that misses an instruction family
# (tcgen05 on Blackwell) moves it by nearly all. Half lies far from both.
CROSS_CHECK_PER_MILLE: Final = 500
# Below a thousandth of the elapsed SM-cycles the two are rounding, not work.
CROSS_CHECK_LEAST_PER_MILLE: Final = 1

# Edges are instants, kept as whole milliseconds: a window may be so much longer than they say.
EDGE_MS: Final = 1
# Power limits hold over some tenths of a second: within it a board may draw as much again.
POWER_EDGE_MS: Final = 100
# Float tensor work is any tensor minus two other counters; a rule that cuts a device's counters
# among its sharers rounds each of them by less than one.
_ROUNDINGS: Final = {"float_tensor": 3}

# Why the part of a partitioned GPU that no instance uses has no cycles: nothing can run there.
SLICES_NOT_CONFIGURED: Final = "slices_not_configured"


def basis(record: Record) -> dict[str, int]:
    """The record as summable integers by quantity name; zero quantities are left out.

    For each work pipe the central SM-cycles, and `<pipe>_deficit`, `<pipe>_excess` for how far
    the low and high ends lie from it; `<pipe>_derived` is the part of it that no counter counted,
    with `<pipe>_busy_us` for its high end. Times and energy stand under their own names.
    `gap_time_ms`, `cycles_absent_time_ms` and `energy_absent_time_ms` state conserved time; what
    may have happened in it is in `cycles_possible_time_ms` and `energy_possible_time_ms`, which
    are a little longer, as edges are instants and limits of power are means.
    """
    if isinstance(record, UsageRecord):
        sums = _usage_basis(record)
    elif isinstance(record, GapRecord):
        sums = _gap_basis(record)
    elif isinstance(record, HostRecord):
        sums = _host_basis(record)
    elif isinstance(record, ImportedHours):
        utilization = record.utilization_per_mille
        sums = {
            "hours_time_ms": record.gpu_time_ms,
            "hours_utilised_us": record.gpu_time_ms * (utilization or 0),
        }
    elif isinstance(record, Declaration):
        sums = _declared_basis(record)
    else:
        sums = {}
    return {name: amount for name, amount in sums.items() if amount}


def basis_of_cycles(  # noqa: PLR0913 (what the cycles are, and how sure each part of it is)
    cycles: Cycles,
    tier: str,
    time_ms: int,
    *,
    counted: bool | None = None,
    uncertain_cycles: int = 0,
    shared: bool = False,
) -> dict[str, int]:
    """The part of a usage record's basis that its cycles make in `time_ms` of device time.

    `counted` tells cycles of counters from derived ones; without it, only `gpm_cycles` counts.
    `uncertain_cycles` is how far each pipe may lie from the truth; `shared` says that a rule cut
    these cycles from the device's, each counter rounded for itself.
    """
    elapsed = cycles.elapsed
    if elapsed is None:
        return {}
    time_ms += EDGE_MS
    sums = {"elapsed": elapsed, "sm_active": cycles.sm_active or 0, "cycles_time_ms": time_ms}
    if tier == "gpu_util":
        return sums | _coarse(cycles.sm_active or 0, GPU_UTIL_CENTRAL_PER_MILLE, time_ms)
    if tier not in _PIPE_TIERS or (cycles.any_tensor is None and cycles.hmma is None):
        ceiling = elapsed if cycles.sm_active is None else cycles.sm_active
        return sums | _coarse(ceiling, SM_ACTIVE_CENTRAL_PER_MILLE, time_ms)
    pipes = _tensor_basis(cycles, elapsed, uncertain_cycles)
    for pipe in _CORE_PIPES:
        value: int | None = getattr(cycles, pipe)
        if value is not None:
            pipes[pipe] = value
        pipes[f"{pipe}_excess"] = uncertain_cycles + (elapsed if value is None else 0)
    if counted is None:
        counted = tier == "gpm_cycles"
    if not counted:
        snapshot = tier == "dcgm_pipes"
        pipes = _derived(pipes, elapsed, time_ms, shared=shared, snapshot=snapshot)
    return sums | pipes


def tensor_cross_check(cycles: Cycles) -> bool:
    """True when HMMA counted much less than any-tensor activity leaves to it: worth a flag.

    False where a counter is absent: nothing to compare is no disagreement.
    """
    if None in (cycles.elapsed, cycles.any_tensor, cycles.hmma, cycles.imma):
        return False
    fp64 = [value for value in (cycles.dmma, cycles.dfma) if value is not None]
    if not fp64:
        return False
    left = (cycles.any_tensor or 0) - (cycles.imma or 0) - max(fp64)
    if left * 1000 <= (cycles.elapsed or 0) * CROSS_CHECK_LEAST_PER_MILLE:
        return False
    return (cycles.hmma or 0) * 1000 < left * CROSS_CHECK_PER_MILLE


# --- usage -----------------------------------------------------------------------------------


def _usage_basis(record: UsageRecord) -> dict[str, int]:
    window_ms = record.window_ms
    shared = _is_shared(record.attribution)
    sums = basis_of_cycles(
        record.cycles,
        record.tier,
        _possible_ms(record.device, window_ms),
        counted=record.cycles_origin == "measured",
        uncertain_cycles=record.uncertain_cycles,
        shared=shared,
    )
    if shared:
        _widen_to_device(sums, record.attribution)
    sums["gpu_time_ms"] = record.gpu_time_ms
    sums["allocated_time_ms"] = record.allocated_time_ms or 0
    sums["wall_time_ms"] = record.wall_time_ms
    recovered = "recovered" in record.flags
    if record.cycles.elapsed is None:
        sums["cycles_absent_time_ms"] = record.gpu_time_ms
    unused = _is_rest(record.device) and record.absent.get("cycles") == SLICES_NOT_CONFIGURED
    # Counters that were reset in the dark and overtook themselves look like counters that
    # ran on: what was counted is certain, that nothing else was is not.
    if recovered or (record.cycles.elapsed is None and not unused):
        sums["cycles_possible_time_ms"] = _possible_ms(record.device, window_ms + EDGE_MS)
    _add_energy(sums, record, recovered=recovered)
    _add_first_estimate(sums, record)
    return sums


def _is_shared(attribution: Attribution) -> bool:
    return attribution.weight != attribution.weights


def _is_rest(device: Device) -> bool:
    """Whether these are the slices of a partitioned GPU that no instance uses."""
    return device.slices is not None and device.gpu_instance is None


def _possible_ms(device: Device, time_ms: int) -> int:
    """Time of a whole device in which all its SMs have as many cycles as this one has in `time_ms`.

    A GPU instance has its own SMs, which are not its share of the slices (an H100's 3g has 60 of
    132 SMs, not three sevenths). Where nobody tells how many, it may have had them all.
    """
    slices = device.slices
    if slices is None or slices.sms_of is None or device.sm_count is None:
        return time_ms
    return min(time_ms, ceil_div(time_ms * device.sm_count, slices.sms_of))


def _whole(own: int, attribution: Attribution, roundings: int = 1) -> int:
    """The most the device's amount may be of which `own` is this owner's share.

    Each of the `roundings` that made the share took off less than one.
    """
    return ceil_div((own + roundings) * attribution.weights, attribution.weight)


def _widen_to_device(sums: dict[str, int], attribution: Attribution) -> None:
    """No counter tells sharers apart: each may have done nothing, or all of the device's work."""
    if "elapsed" not in sums or "coarse_time_ms" in sums:
        return
    for pipe in WORK_PIPES:
        if f"{pipe}_busy_us" in sums:
            continue  # shares of time are the device's already
        central = sums.get(pipe, 0)
        sums[f"{pipe}_deficit"] = central
        most = central + sums.get(f"{pipe}_excess", 0)
        sums[f"{pipe}_excess"] = _whole(most, attribution, _ROUNDINGS.get(pipe, 1)) - central


def _derived(
    pipes: dict[str, int], elapsed: int, time_ms: int, *, shared: bool, snapshot: bool
) -> dict[str, int]:
    """Percentages times a sampled clock: the share of time is sure, the clock between is not.

    The low end claims nothing; the high end is that share of the time at maximum clock, kept as
    `<pipe>_busy_us` because the maximum is the table's to say. A gauge that shows only the last
    moments of its own interval (`snapshot`) does not tell the share of the rest either.
    """
    sums: dict[str, int] = {}
    whole_us = time_ms * US_PER_MS
    least = elapsed - 1 if shared else elapsed  # a share of elapsed may be rounded up
    for pipe in WORK_PIPES:
        central = pipes.get(pipe, 0)
        most = central + pipes.get(f"{pipe}_excess", 0)
        if shared:
            most += _ROUNDINGS.get(pipe, 1)
        elif most:
            most += 1  # a share of time became a whole number of cycles
        sums[pipe] = sums[f"{pipe}_derived"] = central
        told = not snapshot and least > 0
        # No pipe is busy for longer than there was time, whatever a record says.
        busy_us = ceil_div(most * whole_us, least) if told else whole_us
        sums[f"{pipe}_busy_us"] = min(busy_us, whole_us)
    return sums


def _tensor_basis(cycles: Cycles, elapsed: int, uncertain_cycles: int) -> dict[str, int]:
    """Float tensor work is any tensor minus integer minus FP64; absent parts widen the ends.

    2:4 sparse products keep the pipe active for the time they take: what it carries out is
    counted, multiplications it skips are not.
    """
    fp64_known = [value for value in (cycles.dmma, cycles.dfma) if value is not None]
    fp64_tensor = max(fp64_known, default=0)
    hmma, imma = cycles.hmma or 0, cycles.imma or 0
    if cycles.any_tensor is None:
        any_low = max(hmma, imma, fp64_tensor)
        any_central = min(elapsed, hmma + imma + fp64_tensor)
        any_high = elapsed
    else:
        any_low = any_central = any_high = cycles.any_tensor
    imma_high = any_high if cycles.imma is None else imma
    # FP64 work is in DMMA on one architecture and in DFMA on another: one alone does not tell.
    # That both read the same work is likely and not documented: they may also add up.
    fp64_high = max(any_high, fp64_tensor)
    if len(fp64_known) == len(("dmma", "dfma")):
        fp64_high = min(fp64_high, sum(fp64_known))
    central = max(0, any_central - imma - fp64_tensor)
    # Each counter in the difference may be off; where one is absent its whole range is in already.
    low = max(0, any_low - imma_high - fp64_high - 3 * uncertain_cycles)
    # Pipes may overlap in time: what HMMA counted is possible whatever the difference says, and
    # without it the whole of any tensor's.
    overlap = any_high if cycles.hmma is None else hmma
    high = max(central, overlap, any_high - imma - fp64_tensor) + 3 * uncertain_cycles
    return {
        "float_tensor": central,
        "float_tensor_deficit": central - min(low, central),
        "float_tensor_excess": high - central,
        "int_tensor": imma,
        "int_tensor_deficit": min(imma, uncertain_cycles),
        "int_tensor_excess": imma_high - imma + uncertain_cycles,
        "fp64_tensor": fp64_tensor,
        "fp64_tensor_deficit": min(fp64_tensor, uncertain_cycles),
        "fp64_tensor_excess": fp64_high - fp64_tensor + uncertain_cycles,
    }


def _coarse(busy: int, central_per_mille: int, time_ms: int) -> dict[str, int]:
    """Something ran: a share of it as the central value, everything possible as the high end."""
    return {
        "coarse_tensor": floor_div(busy * central_per_mille, 1000),
        "coarse_time_ms": time_ms,
    }


# --- energy ----------------------------------------------------------------------------------


def _add_energy(sums: dict[str, int], record: UsageRecord, *, recovered: bool) -> None:
    """Energy by its scope, and how far the truth may lie from it.

    A counter speaks for its whole device: what a rule cuts from it may be nothing, or all.
    Sampled power misses what happens between samples: nothing to the power limit all along.
    """
    window_ms, energy_mj = record.window_ms, record.energy_mj
    possible_ms = _drawing_ms(window_ms) if recovered else 0
    if energy_mj is None:
        sums["energy_absent_time_ms"] = record.gpu_time_ms
        sums["energy_possible_time_ms"] = _drawing_ms(window_ms)
        return
    sums["energy_module_mj" if record.energy_scope == "module" else "energy_mj"] = energy_mj
    shared = _is_shared(record.attribution)
    slices = record.device.slices
    part = slices is not None and slices.count < slices.of_count
    apportioned = "apportioned" in record.flags or part
    if record.energy_origin == "power_integral":
        sums["energy_deficit_mj"] = sums["energy_integral_mj"] = energy_mj
        sums["energy_integral_time_ms"] = _drawing_ms(window_ms)
    elif shared or apportioned:
        whole = _whole(energy_mj, record.attribution) if shared else energy_mj
        if apportioned:
            if slices is None or slices.count == 0:
                possible_ms = _drawing_ms(window_ms)  # of nothing, the whole cannot be told
            else:  # a part lags its share of the whole by less than its own slices
                whole = ceil_div((whole + slices.count) * slices.of_count, slices.count)
        sums["energy_deficit_mj"] = energy_mj
        sums["energy_excess_mj"] = whole - energy_mj
    sums["energy_possible_time_ms"] = possible_ms


def _drawing_ms(window_ms: int) -> int:
    """Time at the power limit that covers whatever a board draws in a window of this length."""
    return window_ms + EDGE_MS + min(window_ms, POWER_EDGE_MS)


def _add_first_estimate(sums: dict[str, int], record: UsageRecord) -> None:
    """What the agent computed when the record was sealed, apart by model and table version."""
    first = record.estimate
    if first is None:
        return
    version = f"{first.model_version}/{first.table_version}"
    sums[f"first_flop_low@{version}"] = int(first.flop_low)
    sums[f"first_flop@{version}"] = int(first.flop_central)
    sums[f"first_flop_records@{version}"] = 1
    if first.flop_high is None:
        sums[f"first_flop_open_records@{version}"] = 1
    else:
        sums[f"first_flop_high@{version}"] = int(first.flop_high)


# --- other records ---------------------------------------------------------------------------


def _gap_basis(record: GapRecord) -> dict[str, int]:
    """Dark time of the device's own part, and everything its SMs could have done in it.

    A gap that is dark only because no instance uses these slices hides no work.
    """
    start_ms = record.start_unix_ms if record.start_boot_ms is None else record.start_boot_ms
    slices, end_ms = record.device.slices, start_ms + record.gap_ms
    own_ms = record.gap_ms if slices is None else slices.part(end_ms) - slices.part(start_ms)
    unused = record.reason == SLICES_NOT_CONFIGURED and _is_rest(record.device)
    if "recovered" in record.flags:
        unused = False  # nobody watched: they may have been configured in between
    possible_ms = _possible_ms(record.device, record.gap_ms + EDGE_MS)
    return {
        "gap_time_ms": own_ms,
        "cycles_possible_time_ms": 0 if unused else possible_ms,
        "energy_possible_time_ms": _drawing_ms(record.gap_ms),
    }


def _host_basis(record: HostRecord) -> dict[str, int]:
    """CPU time and each boundary's energy; boundaries contain each other and are never added.

    A boundary nobody read is absent for the window's time; energy cut by CPU time may have been
    all another owner's, or all this one's.
    """
    window_ms = record.window_ms
    cut = "apportioned" in record.flags or _is_shared(record.attribution)
    sums = {"host_window_ms": window_ms, "host_cpu_time_ms": record.cpu_time_ms or 0}
    if record.cpu_time_ms is None:
        sums["host_cpu_absent_time_ms"] = window_ms
    for boundary in _BOUNDARIES:
        energy_mj = record.energy_mj.get(boundary)
        if energy_mj is None:
            sums[f"host_{boundary}_absent_time_ms"] = window_ms
            continue
        sums[f"host_energy_mj_{boundary}"] = energy_mj
        if cut:
            most = _host_whole(record, energy_mj, HOST_POWER_LIMIT_WATTS[boundary])
            sums[f"host_energy_deficit_mj_{boundary}"] = energy_mj
            sums[f"host_energy_excess_mj_{boundary}"] = most - energy_mj
    return sums


def _host_whole(record: HostRecord, own_mj: int, limit_watts: int) -> int:
    """The most the node's meter may have read, of which `own_mj` went to this owner by CPU time.

    Of an owner with next to no CPU time the whole cannot be told: what no node draws bounds it.
    """
    most = limit_watts * record.window_ms
    if _is_shared(record.attribution):
        most = _whole(own_mj, record.attribution)
    elif record.cpu_time_ms is not None and record.cpu_time_ms > 1:
        # Both the share of time and that of energy were rounded, by less than one each.
        cpus_ms = record.cpu_count * record.window_ms
        most = min(most, ceil_div((own_mj + 1) * cpus_ms, record.cpu_time_ms - 1))
    return max(own_mj, most)


def _declared_basis(record: Declaration) -> dict[str, int]:
    prefix = "declared" if record.flop_basis == "executed" else "model"
    amounts = {
        f"{prefix}_flop_low": record.flop_low,
        f"{prefix}_flop": record.flop_central,
        f"{prefix}_flop_high": record.flop_high,
        "declared_integer_operations": record.integer_operations,
        "declared_energy_mj": record.energy_mj,
        "declared_gpu_time_ms": record.gpu_time_ms,
    }
    sums = {name: int(text) for name, text in amounts.items() if text is not None}
    # What a declaration is silent about is not zero: whoever sums must know how many spoke.
    sums["declared_records"] = 1
    if record.flop_central is not None and record.flop_basis == "executed":
        sums["declared_flop_records"] = 1
    if record.integer_operations is not None:
        sums["declared_integer_records"] = 1
    if record.cost_cents is not None:
        sums[f"declared_cost_cents_{record.currency}"] = int(record.cost_cents)
    return sums
