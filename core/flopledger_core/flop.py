"""From SM-cycles to FLOP: the one function that agent, collector and verifier share.

Two steps, kept apart on purpose. `basis` turns one record into summable integers and holds every
rule that is not linear (which pipe contains which, what an absent counter could have been).
`work` is linear in those sums, so totals restate whole histories when the table or the model
changes. Executed FLOP is what the hardware carried out; it is never called model FLOP. Integer
work is counted apart and never added to FLOP here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.bounds import ZERO, Bounds, exactly, total
from flopledger_core.records import Cycles, Declaration, GapRecord, ImportedHours, UsageRecord
from flopledger_core.units import HZ_PER_MHZ, US_PER_MS, ceil_div, floor_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.accelerators import Accelerator, AcceleratorTable, Architecture
    from flopledger_core.records import Record

FLOP_MODEL_VERSION: Final = "1"

# Coarse tiers see that SMs or the GPU were busy, not with what. The central share of the tensor
# peak is the middle of what fleets report (docs/methodology.md, "Coarse tiers"); the low end is 0.
SM_ACTIVE_CENTRAL_PER_MILLE: Final = 450
GPU_UTIL_CENTRAL_PER_MILLE: Final = 300

WORK_PIPES: Final = (
    "float_tensor", "fp64_tensor", "int_tensor", "fp64", "fp32", "fp16", "integer",
)  # fmt: skip
_DARK_TIMES: Final = ("gap_time_ms", "cycles_absent_time_ms", "cycles_possible_time_ms")
_PIPE_TIERS: Final = frozenset({"gpm_cycles", "gpm_util", "dcgm_pipes"})


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Operations carried out, in three quantities that are never silently added."""

    flop: Bounds = ZERO
    tensor_integer_operations: Bounds = ZERO
    integer_operations: Bounds = ZERO
    reasons: tuple[str, ...] = ()  # why a bound is open or wide

    def __add__(self, other: Work) -> Work:
        return Work(
            flop=self.flop + other.flop,
            tensor_integer_operations=(
                self.tensor_integer_operations + other.tensor_integer_operations
            ),
            integer_operations=self.integer_operations + other.integer_operations,
            reasons=tuple(dict.fromkeys((*self.reasons, *other.reasons))),
        )

    @property
    def operations(self) -> Bounds:
        """Integer or floating-point operations, the quantity of the US texts."""
        return total((self.flop, self.tensor_integer_operations, self.integer_operations))

    def disputed(self) -> Work:
        """This work while its records are disputed: out of low and central, in high."""
        return Work(
            flop=_only_high(self.flop),
            tensor_integer_operations=_only_high(self.tensor_integer_operations),
            integer_operations=_only_high(self.integer_operations),
            reasons=self.reasons,
        )


def total_work(parts: list[Work]) -> Work:
    """The sum of works; nothing when there are none."""
    result = Work()
    for part in parts:
        result = result + part
    return result


# --- step one: a record's summable basis -----------------------------------------------------


def basis(record: Record) -> dict[str, int]:
    """The record as summable integers by quantity name; zero quantities are left out.

    For each work pipe the central SM-cycles, and `<pipe>_deficit`, `<pipe>_excess` for how far
    the low and high ends lie from it; times and energy under their own names.
    """
    if isinstance(record, UsageRecord):
        sums = _usage_basis(record)
    elif isinstance(record, GapRecord):
        sums = {"gap_time_ms": record.gap_ms}
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


def basis_of_cycles(cycles: Cycles, tier: str, time_ms: int) -> dict[str, int]:
    """The part of a usage record's basis that its cycles make in `time_ms` of device time."""
    elapsed = cycles.elapsed
    if elapsed is None:
        return {}
    sums = {"elapsed": elapsed, "sm_active": cycles.sm_active or 0}
    if tier == "gpu_util":
        return sums | _coarse(cycles.sm_active or 0, GPU_UTIL_CENTRAL_PER_MILLE, time_ms)
    if tier not in _PIPE_TIERS or (cycles.any_tensor is None and cycles.hmma is None):
        ceiling = elapsed if cycles.sm_active is None else cycles.sm_active
        return sums | _coarse(ceiling, SM_ACTIVE_CENTRAL_PER_MILLE, time_ms)
    pipes = _tensor_basis(cycles, elapsed)
    for pipe in ("fp64", "fp32", "fp16", "integer"):
        value: int | None = getattr(cycles, pipe)
        pipes[pipe if value is not None else f"{pipe}_excess"] = elapsed if value is None else value
    if tier != "gpm_cycles":
        pipes = _derived(pipes, elapsed, time_ms)
    return sums | pipes


def _usage_basis(record: UsageRecord) -> dict[str, int]:
    time_ms = record.gpu_time_ms
    sums = basis_of_cycles(record.cycles, record.tier, time_ms)
    sums["gpu_time_ms"] = time_ms
    sums["allocated_time_ms"] = record.allocated_time_ms or 0
    sums["wall_time_ms"] = record.wall_time_ms
    sums["energy_mj"] = record.energy_mj or 0
    if record.energy_mj is None:
        sums["energy_absent_time_ms"] = time_ms
    if record.cycles.elapsed is None:
        sums["cycles_absent_time_ms"] = time_ms
    if "recovered" in record.flags:
        # Counters that were reset in the dark and overtook themselves look like counters that
        # ran on: what was counted is certain, that nothing else was is not.
        sums["cycles_possible_time_ms"] = time_ms
        sums["energy_possible_time_ms"] = time_ms
    if record.attribution.weight != record.attribution.weights:
        _widen_to_device(sums, record)
    return sums


def _widen_to_device(sums: dict[str, int], record: UsageRecord) -> None:
    """No counter tells sharers apart: each may have done nothing, or all of the device's work."""
    weight, weights = record.attribution.weight, record.attribution.weights

    def whole(own: int) -> int:
        return ceil_div((own + 1) * weights, weight)  # own was rounded down by less than one

    others_ms = record.window_ms - record.gpu_time_ms
    if "coarse_time_ms" in sums:
        sums["coarse_time_ms"] += others_ms
    elif record.cycles.elapsed is not None:
        for pipe in WORK_PIPES:
            central = sums.get(pipe, 0)
            sums[f"{pipe}_deficit"] = central
            if f"{pipe}_busy_us" in sums:
                sums[f"{pipe}_busy_us"] = whole(sums[f"{pipe}_busy_us"])
            else:
                sums[f"{pipe}_excess"] = whole(central + sums.get(f"{pipe}_excess", 0)) - central
    else:
        sums["cycles_possible_time_ms"] = sums.get("cycles_possible_time_ms", 0) + others_ms
    if record.energy_mj is None:
        sums["energy_possible_time_ms"] = sums.get("energy_possible_time_ms", 0) + others_ms
    else:
        sums["energy_deficit_mj"] = record.energy_mj
        sums["energy_excess_mj"] = whole(record.energy_mj) - record.energy_mj


def _derived(pipes: dict[str, int], elapsed: int, time_ms: int) -> dict[str, int]:
    """Percentages times a sampled clock: the share of time is sure, the clock between is not.

    The low end claims nothing; the high end is that share of the time at maximum clock, kept as
    `<pipe>_busy_us` because the maximum is the table's to say.
    """
    sums: dict[str, int] = {}
    for pipe in WORK_PIPES:
        central = pipes.get(pipe, 0)
        most = central + pipes.get(f"{pipe}_excess", 0)
        sums[pipe] = central
        sums[f"{pipe}_deficit"] = central
        if elapsed:
            sums[f"{pipe}_busy_us"] = ceil_div(most * (time_ms + 1) * US_PER_MS, elapsed)
    return sums


def _tensor_basis(cycles: Cycles, elapsed: int) -> dict[str, int]:
    """Float tensor work is any tensor minus integer minus FP64; absent parts widen the ends."""
    fp64_known = [value for value in (cycles.dmma, cycles.dfma) if value is not None]
    fp64_tensor = max(fp64_known, default=0)
    hmma = cycles.hmma or 0
    if cycles.any_tensor is None:
        any_low = max(hmma, cycles.imma or 0, fp64_tensor)
        any_central = min(elapsed, hmma + (cycles.imma or 0) + fp64_tensor)
        any_high = elapsed
    else:
        any_low = any_central = any_high = cycles.any_tensor
    imma_high = any_high if cycles.imma is None else cycles.imma
    fp64_high = fp64_tensor if fp64_known else any_high
    central = max(0, any_central - (cycles.imma or 0) - fp64_tensor)
    low = max(0, any_low - imma_high - fp64_high)
    # Pipes may overlap in time: what HMMA counted is possible whatever the difference says.
    high = max(central, hmma, any_high - (cycles.imma or 0) - fp64_tensor)
    return {
        "float_tensor": central,
        "float_tensor_deficit": central - min(low, central),
        "float_tensor_excess": high - central,
        "int_tensor": cycles.imma or 0,
        "int_tensor_excess": imma_high - (cycles.imma or 0),
        "fp64_tensor": fp64_tensor,
        "fp64_tensor_excess": fp64_high - fp64_tensor,
    }


def _coarse(busy: int, central_per_mille: int, time_ms: int) -> dict[str, int]:
    """Something ran: a share of it as the central value, everything possible as the high end."""
    return {
        "coarse_tensor": floor_div(busy * central_per_mille, 1000),
        "coarse_time_ms": time_ms,
    }


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


# --- step two: linear in the sums ------------------------------------------------------------


def work(
    sums: Mapping[str, int],
    *,
    table: AcceleratorTable,
    accelerator: Accelerator | None,
    device_name: str,
    precision: str | None,
) -> Work:
    """Operations from summed bases of one device model and one declared precision.

    A device the table lacks has no FLOP: central 0, an open high end and the reason.
    """
    declared = _declared(sums)
    if not any(sums.get(name) for name in ("elapsed", "hours_time_ms", *_DARK_TIMES)):
        return declared
    if accelerator is None:
        return declared + Work(
            flop=Bounds(low=0, central=0, high=None),
            tensor_integer_operations=Bounds(low=0, central=0, high=None),
            integer_operations=Bounds(low=0, central=0, high=None),
            reasons=(f"no hardware table row for {device_name}: its FLOP is absent",),
        )
    architecture = table.architecture_of(accelerator)
    rates, reason = _tensor_rates(architecture, precision)
    parts = [declared, _from_cycles(sums, accelerator, architecture, rates)]
    dark_ms = sum(sums.get(name, 0) for name in _DARK_TIMES)
    if dark_ms:
        parts.append(_could_have_done(dark_ms, accelerator, architecture, rates))
    if sums.get("coarse_time_ms"):
        parts.append(_from_coarse(sums, accelerator, architecture, rates))
    if sums.get("hours_time_ms"):
        parts.append(_from_hours(sums, accelerator, architecture, rates))
    reasons = [reason] if reason else []
    if sums.get("float_tensor_busy_us"):
        reasons.append("cycles come from percentages and a sampled clock; the low end claims none")
    return total_work(parts) + Work(reasons=tuple(f"{accelerator.key}: {why}" for why in reasons))


class _Rates(msgspec.Struct, frozen=True, kw_only=True):
    """FLOP per SM-cycle of the float tensor pipe, the low end as a rational."""

    low_numerator: int
    low_denominator: int
    central: int
    high: int


def _tensor_rates(architecture: Architecture, precision: str | None) -> tuple[_Rates, str | None]:
    offered = architecture.tensor_float_rates()
    floor = architecture.legacy_mma_floor_per_mille
    if precision is not None and precision in offered:
        rate = offered[precision]
        return _Rates(
            low_numerator=rate * floor, low_denominator=1000, central=rate, high=rate
        ), None
    reason = (
        "precision not declared; bounds span what the tensor pipe offers"
        if precision is None
        else f"the tensor pipe lacks declared precision {precision}; bounds span its own"
    )
    return (
        _Rates(
            low_numerator=min(offered.values()) * floor,
            low_denominator=1000,
            central=offered.get("bf16", offered["fp16"]),
            high=max(offered.values()),
        ),
        reason,
    )


def _from_cycles(
    sums: Mapping[str, int], accelerator: Accelerator, architecture: Architecture, rates: _Rates
) -> Work:
    fastest = accelerator.sm_count * accelerator.max_sm_clock_mhz  # SM-cycles a microsecond

    def cycles(pipe: str) -> tuple[int, int, int]:
        central, deficit = sums.get(pipe, 0), sums.get(f"{pipe}_deficit", 0)
        faster = sums.get(f"{pipe}_busy_us", 0) * fastest - deficit
        high = central + sums.get(f"{pipe}_excess", 0) + max(0, faster)
        return central - deficit, central, high

    low, central, high = cycles("float_tensor")
    flop = Bounds(
        low=floor_div(low * rates.low_numerator, rates.low_denominator),
        central=central * rates.central,
        high=high * rates.high,
    )
    fp64_rate = architecture.tensor_rate("fp64") or 0
    low, central, high = cycles("fp64_tensor")
    flop = flop + Bounds(low=low * fp64_rate, central=central * fp64_rate, high=high * fp64_rate)
    for pipe in ("fp64", "fp32", "fp16"):
        rate = architecture.flop_per_cycle_per_sm.get(pipe, 0)
        _, central, high = cycles(pipe)
        flop = flop + Bounds(low=0, central=central * rate, high=high * rate)
    int_rate = architecture.operations_per_cycle_per_sm.get("tensor_int8", 0)
    core_rate = architecture.operations_per_cycle_per_sm.get("integer", 0)
    int_low, int_central, int_high = cycles("int_tensor")
    _, core_central, core_high = cycles("integer")
    return Work(
        flop=flop,
        tensor_integer_operations=Bounds(
            low=int_low * int_rate, central=int_central * int_rate, high=int_high * int_rate
        ),
        integer_operations=Bounds(
            low=0, central=core_central * core_rate, high=core_high * core_rate
        ),
    )


def _could_have_done(
    time_ms: int, accelerator: Accelerator, architecture: Architecture, rates: _Rates
) -> Work:
    """From nothing to every pipe fully active at maximum clock: what dark time contributes."""
    dark = {f"{pipe}_excess": accelerator.max_sm_cycles(time_ms) for pipe in WORK_PIPES}
    return _from_cycles(dark, accelerator, architecture, rates)


def _from_coarse(
    sums: Mapping[str, int], accelerator: Accelerator, architecture: Architecture, rates: _Rates
) -> Work:
    """Something ran in a share of the time; the clock and the pipes are anybody's guess."""
    most = _could_have_done(sums["coarse_time_ms"], accelerator, architecture, rates)
    central = sums.get("coarse_tensor", 0) * rates.central
    high = max(central, most.flop.high or 0)
    return msgspec.structs.replace(most, flop=Bounds(low=0, central=central, high=high))


def _from_hours(
    sums: Mapping[str, int], accelerator: Accelerator, architecture: Architecture, rates: _Rates
) -> Work:
    """GPU time x peak x stated utilisation; the peak is the datasheet's, at its tensor clock.

    The utilisation is a claim: the low end is nothing, the high end everything possible.
    """
    cycles_per_second = accelerator.sm_count * accelerator.tensor_clock_mhz * HZ_PER_MHZ
    utilised_us = sums.get("hours_utilised_us", 0)
    central = floor_div(utilised_us * cycles_per_second * rates.central, 1_000_000)
    most = _could_have_done(sums["hours_time_ms"], accelerator, architecture, rates)
    high = max(central, most.flop.high or 0)
    return msgspec.structs.replace(most, flop=Bounds(low=0, central=central, high=high))


def _declared(sums: Mapping[str, int]) -> Work:
    integers = sums.get("declared_integer_operations", 0)
    return Work(
        flop=Bounds(
            low=sums.get("declared_flop_low", 0),
            central=sums.get("declared_flop", 0),
            high=sums.get("declared_flop_high", 0),
        ),
        integer_operations=exactly(integers),
    )


def _only_high(bounds: Bounds) -> Bounds:
    return Bounds(low=0, central=0, high=bounds.high)
