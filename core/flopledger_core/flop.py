"""From SM-cycles to FLOP: the one function that agent, collector and verifier share.

Two steps, kept apart on purpose. `basis` (its own module) turns one record into summable
integers and holds every rule that is not linear. `work` is linear in those sums, so totals
restate whole histories when the table or the model changes; `estimate` is the same two steps for
one record, as the agent takes them when it seals it. Executed FLOP is what the hardware carried
out, at dense rates; it is never called model FLOP. Integer work is counted apart and never added
to FLOP here.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from flopledger_core.accelerators import TENSOR_FLOAT_PRECISIONS, Accelerator
from flopledger_core.basis import (
    GPU_UTIL_CENTRAL_PER_MILLE,
    SM_ACTIVE_CENTRAL_PER_MILLE,
    WORK_PIPES,
    basis,
    basis_of_cycles,
    tensor_cross_check,
)
from flopledger_core.bounds import ZERO, Bounds, exactly, total
from flopledger_core.records import Estimate
from flopledger_core.units import HZ_PER_MHZ, US_PER_MS, floor_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.accelerators import AcceleratorTable, RateSpan, Resolved
    from flopledger_core.records import PeakBasis, Precision, UsageRecord

__all__ = [
    "FLOP_MODEL_VERSION",
    "GPU_UTIL_CENTRAL_PER_MILLE",
    "SM_ACTIVE_CENTRAL_PER_MILLE",
    "WORK_PIPES",
    "Work",
    "basis",
    "basis_of_cycles",
    "estimate",
    "tensor_cross_check",
    "total_work",
    "work",
]

FLOP_MODEL_VERSION: Final = "2"

_DARK_TIME: Final = "cycles_possible_time_ms"
# Sums that say a device was spoken of; without any, there is nothing to multiply.
_DEVICE_SUMS: Final = ("elapsed", "cycles_time_ms", "hours_time_ms", _DARK_TIME)
# All times in which cycles may have run: what a ceiling of operations per second is applied to.
_RUNNING_TIMES: Final = ("cycles_time_ms", _DARK_TIME, "hours_time_ms")
_CORE_RATES: Final = ("fp64", "fp32", "fp16")


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Operations carried out, in three quantities that are never silently added.

    `flop_tensor` and `flop_cores` are the parts of `flop` that counters of tensor pipes and of
    CUDA cores speak of; what is left of it was declared by people.
    """

    flop: Bounds = ZERO
    tensor_integer_operations: Bounds = ZERO
    integer_operations: Bounds = ZERO
    reasons: tuple[str, ...] = ()  # why a bound is open or wide
    flop_tensor: Bounds = ZERO
    flop_cores: Bounds = ZERO

    def __add__(self, other: Work) -> Work:
        return Work(
            flop=self.flop + other.flop,
            tensor_integer_operations=(
                self.tensor_integer_operations + other.tensor_integer_operations
            ),
            integer_operations=self.integer_operations + other.integer_operations,
            reasons=tuple(dict.fromkeys((*self.reasons, *other.reasons))),
            flop_tensor=self.flop_tensor + other.flop_tensor,
            flop_cores=self.flop_cores + other.flop_cores,
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
            flop_tensor=_only_high(self.flop_tensor),
            flop_cores=_only_high(self.flop_cores),
        )


def total_work(parts: list[Work]) -> Work:
    """The sum of works; nothing when there are none."""
    result = Work()
    for part in parts:
        result = result + part
    return result


def work(
    sums: Mapping[str, int],
    *,
    table: AcceleratorTable,
    accelerator: Resolved | Accelerator | None,
    device_name: str,
    precision: str | None,
) -> Work:
    """Operations from summed bases of one device model and one declared precision.

    `accelerator` is what `table.resolve` (or `find`) gives. A device of no known architecture has
    no FLOP: central 0, an open high end and the reason.
    """
    declared = _declared(sums)
    if not any(sums.get(name) for name in _DEVICE_SUMS):
        return declared
    if accelerator is None:
        open_end = Bounds(low=0, central=0, high=None)
        return declared + Work(
            flop=open_end,
            tensor_integer_operations=open_end,
            integer_operations=open_end,
            reasons=(f"no hardware table row for {device_name}: its FLOP is absent",),
            flop_tensor=open_end,
            flop_cores=open_end,
        )
    device = table.of_row(accelerator) if isinstance(accelerator, Accelerator) else accelerator
    done = _Operations(sums, device, precision)
    tensor, cores = done.tensor_flop().bounds(), done.core_flop().bounds()
    counted = Work(
        flop=tensor + cores,
        tensor_integer_operations=done.tensor_integers().bounds(),
        integer_operations=done.core_integers().bounds(),
        reasons=_reasons(sums, device, precision, device_name),
        flop_tensor=tensor,
        flop_cores=cores,
    )
    return declared + counted


def estimate(record: UsageRecord, table: AcceleratorTable) -> Estimate | None:
    """Executed FLOP of one record from its own counters, for whoever seals or checks it.

    None where FLOP is absent: the table has no row and no architecture for the device. An
    estimate that the record already carries plays no part.
    """
    device = table.resolve(
        record.device.name, record.device.pci_device_id, record.device.compute_capability
    )
    if device is None:
        return None
    done = _Operations(basis(record), device, record.precision)
    tensor, cores = done.tensor_flop(), done.core_flop()
    offered = device.tensor_span(record.precision) is not None
    return Estimate(
        flop_low=str(tensor.low + cores.low),
        flop_central=str(tensor.central + cores.central),
        flop_high=str(tensor.high + cores.high),
        assumed_precision=(
            record.precision
            if offered and record.precision is not None
            else _precision(device.default_precision)
        ),
        peak_basis=peak_basis(record),
        model_version=FLOP_MODEL_VERSION,
        table_version=table.version,
    )


def peak_basis(record: UsageRecord) -> PeakBasis:
    """What turned this record's cycles into FLOP: how their number was come by."""
    if record.cycles.elapsed is None:
        return "dense_at_maximum_clock"  # only what the device could have done
    if record.cycles_origin == "measured":
        return "dense_at_counted_cycles"
    return "dense_at_sampled_clock"


class _Ends(NamedTuple):
    """Bounds as plain numbers: sums of many are formed before they are checked."""

    low: int
    central: int
    high: int

    def bounds(self) -> Bounds:
        return Bounds(low=self.low, central=self.central, high=self.high)


_NOTHING: Final = _Ends(0, 0, 0)
# The names of a pipe's sums, made once: this is the innermost loop of every total.
_SUMS_OF: Final = {
    pipe: (pipe, f"{pipe}_deficit", f"{pipe}_excess", f"{pipe}_derived", f"{pipe}_busy_us")
    for pipe in WORK_PIPES
}


class _Operations:
    """Operations of one device model from its sums, pipe by pipe."""

    def __init__(self, sums: Mapping[str, int], device: Resolved, precision: str | None) -> None:
        self._sums = sums
        self._device = device
        self._precision = precision
        row = device.accelerator
        self._ceilings = row.ceiling_tera_per_second
        self._fastest = row.most_sm_cycles_per_us
        dark_ms = sums.get(_DARK_TIME, 0)
        # Something ran, or was allocated, in this time: clock and pipes are anybody's guess.
        coarse_ms = sums.get("coarse_time_ms", 0) + sums.get("hours_time_ms", 0)
        self._dark = dark_ms * US_PER_MS * self._fastest
        self._unseen = coarse_ms * US_PER_MS * self._fastest

    def tensor_flop(self) -> _Ends:
        """Floating-point work of the tensor pipes, FP64 included."""
        offered = self._device.tensor_span(self._precision)
        span = offered or self._device.any_float
        ends = self._pipe("float_tensor", span, self._guess(span) if self._unseen else 0)
        fp64 = self._pipe("fp64_tensor", self._device.span("tensor_fp64"))
        if self._ceilings:
            names = TENSOR_FLOAT_PRECISIONS if offered is None else (self._precision,)
            ends = self._capped(ends, *(f"tensor_{name}" for name in names))
            fp64 = self._capped(fp64, "tensor_fp64")
        return _plus(ends, fp64) if fp64.high else ends

    def core_flop(self) -> _Ends:
        """Floating-point work of the CUDA cores; one-sided, a busy pipe may do next to nothing."""
        ends = _NOTHING
        for name in _CORE_RATES:
            part = self._pipe(name, self._device.span(name), one_sided=True)
            if part.high:
                ends = _plus(ends, self._capped(part, name) if self._ceilings else part)
        return ends

    def tensor_integers(self) -> _Ends:
        """Integer work of the tensor pipe."""
        ends = self._pipe("int_tensor", self._device.any_integer)
        return self._capped(ends, "tensor_int8") if self._ceilings else ends

    def core_integers(self) -> _Ends:
        """Integer work of the CUDA cores; one-sided like theirs."""
        return self._pipe("integer", self._device.span("integer"), one_sided=True)

    def _pipe(self, pipe: str, span: RateSpan, guess: int = 0, *, one_sided: bool = False) -> _Ends:
        """Operations of one pipe: counted, and whatever dark or unseen time may have held."""
        get = self._sums.get
        counted, short, over, made, busy = _SUMS_OF[pipe]
        central, excess, busy_us = get(counted, 0), get(over, 0), get(busy, 0)
        if not (central or excess or busy_us or self._dark or self._unseen):
            return _NOTHING
        derived = get(made, 0)
        most = central + excess + self._dark
        if busy_us:
            most += max(0, busy_us * self._fastest - derived)
        return _Ends(
            0 if one_sided else (central - derived - get(short, 0)) * span.low_per_cycle,
            central * span.central_per_cycle + guess,
            most * span.high_per_cycle + max(guess, self._unseen * span.high_per_cycle),
        )

    def _guess(self, span: RateSpan) -> int:
        """Central tensor FLOP where no pipe was read: a usual share of busy or allocated time.

        Of imported hours the stated utilisation of the datasheet's peak, at its tensor clock.
        """
        rate, row = span.central_per_cycle, self._device.accelerator
        peak = row.sm_count * row.tensor_clock_mhz * HZ_PER_MHZ * rate
        hours = floor_div(self._sums.get("hours_utilised_us", 0) * peak, 1_000_000)
        return self._sums.get("coarse_tensor", 0) * rate + hours

    def _capped(self, ends: _Ends, *rates: str) -> _Ends:
        """No more than the highest ceiling of these rates, where each that exists has one.

        Concave in the sums, on the few models that have a ceiling: bounds of a total may be
        wider than the sum of its records' bounds, never narrower.
        """
        offered = [rate for rate in rates if rate in self._device.spans]
        if not offered or any(rate not in self._ceilings for rate in offered):
            return ends
        tera = max(Fraction(self._ceilings[rate]) for rate in offered)
        time_ms = sum(self._sums.get(name, 0) for name in _RUNNING_TIMES)
        most = int(tera * 10**9 * time_ms) + 1  # 10^12 a second is 10^9 a millisecond
        return _Ends(min(ends.low, most), min(ends.central, most), min(ends.high, most))


def _plus(one: _Ends, other: _Ends) -> _Ends:
    return _Ends(one.low + other.low, one.central + other.central, one.high + other.high)


def _reasons(
    sums: Mapping[str, int], device: Resolved, precision: str | None, device_name: str
) -> tuple[str, ...]:
    """Why bounds are wider than exact counters of a declared precision would make them."""
    key = device.accelerator.key
    reasons: list[str] = []
    if not device.in_table:
        reasons.append(
            f"no hardware table row for {device_name}: bounds span its architecture "
            f"{device.accelerator.architecture}"
        )
    if precision is None:
        reasons.append(f"{key}: precision not declared; bounds span what the tensor pipe offers")
    elif device.tensor_span(precision) is None:
        reasons.append(
            f"{key}: the tensor pipe lacks declared precision {precision}; bounds span its own"
        )
    if sums.get("float_tensor_busy_us"):
        reasons.append(
            f"{key}: cycles come from percentages and a sampled clock; the low end claims none"
        )
    if device.accelerator.ceiling_tera_per_second:
        reasons.append(
            f"{key}: what an active pipe carries out is not known of this model; the high end is "
            "its datasheet's peak"
        )
    return tuple(reasons)


def _precision(name: str) -> Precision:
    return "bf16" if name == "bf16" else "fp16"


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
