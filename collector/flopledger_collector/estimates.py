"""Estimates of training compute from hours or from an architecture, offline and exact.

These are the European Commission's two methods (C(2025) 5045, Annex A.2). An estimate is never a
measurement and says so: it names its method, its inputs as they were given, the basis of the
peak it used and every assumption. Arithmetic is rational; rounding happens once, low and central
down, high up. Hours give executed FLOP; 6 x parameters x tokens gives model FLOP. They are
different quantities, never mixed and never averaged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final, Literal

import msgspec

from flopledger_core.accelerators import (
    TENSOR_FLOAT_PRECISIONS,
    Accelerator,
    AcceleratorTable,
    RateSpan,
)
from flopledger_core.bounds import Bounds
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.flop import FLOP_MODEL_VERSION
from flopledger_core.units import HZ_PER_MHZ, ceil_div, floor_div

SECONDS_PER_HOUR: Final = 3600
DECIMAL_CHARACTERS_MAX: Final = 64  # more digits than any amount of hours, tokens or FLOP/s has
EXPONENT_MAX: Final = 40  # 1e40 FLOP/s or tokens is beyond anything; it bounds the work of parsing

# Annex A.2: an estimate should be accurate within an overall error margin of 30 % of itself.
MARGIN_PER_CENT: Final = 30

# Operations per parameter and token: 2 forward, 4 backward (Annex A.2.2 gives the sum, 6).
PASSES: Final[dict[str, int]] = {"training": 6, "forward": 2}

_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:[eE]\+?(?P<exponent>[0-9]{1,3}))?")

Amount = Fraction | int | str


class PeakBasis(msgspec.Struct, frozen=True, kw_only=True):
    """The peak rate that utilisation is a share of: without it a utilisation means nothing."""

    accelerator: str
    precision: str
    pipe: Literal["tensor", "cores", "stated"]
    sparsity: Literal["dense", "stated"]
    flop_per_second: Fraction  # of one device; C = N L H U calls it H
    sm_count: int
    flop_per_cycle_per_sm: int | None
    clock_mhz: int | None
    maximum_clock_mhz: int
    datasheet_teraflop_per_second: str | None
    table_version: str
    source: str


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """An estimated amount of FLOP, with all that a reader needs to make it again."""

    flop: Bounds
    basis: Literal["executed", "model"]
    method: str
    model_version: str
    peak_basis: PeakBasis | None
    inputs: dict[str, str]
    assumptions: tuple[str, ...]


def estimate_hardware(  # noqa: PLR0913 - the method has four factors, and a table and a basis
    table: AcceleratorTable,
    accelerator: str,
    gpu_hours: Amount,
    precision: str,
    utilization: Amount,
    *,
    peak_flop_per_second: Amount | None = None,
) -> Estimate:
    """Executed FLOP of GPU-hours at a stated utilisation: C = N x L x H x U.

    `utilization` is a share from 0 to 1 of the peak named in `peak_basis`. It is a claim, so it
    moves only the central figure; low is zero, and high is every device at its maximum clock with
    the pipe always active. `peak_flop_per_second` replaces the table's peak as the basis.
    UnknownName for an accelerator or precision that the table lacks; InvalidInput for an amount
    that is no plain decimal, negative, or a share above one.
    """
    device = table.by_key(accelerator)
    hours = require_amount("gpu_hours", gpu_hours)
    share = require_amount("utilization", utilization)
    if share > 1:
        raise InvalidInput("utilization", str(utilization), "give a share from 0 to 1")
    peak = _peak(table, device, precision, peak_flop_per_second)
    seconds = hours * SECONDS_PER_HOUR
    ceiling = max(peak.flop_per_second, _peak_at_maximum_clock(table, device, precision))
    return Estimate(
        flop=Bounds(
            low=0,
            central=_floor(seconds * peak.flop_per_second * share),
            high=_ceil(seconds * ceiling),
        ),
        basis="executed",
        method="hardware: C = N x L x H x U (C(2025) 5045, Annex A.2.1)",
        model_version=FLOP_MODEL_VERSION,
        peak_basis=peak,
        inputs={
            "accelerator": accelerator,
            "gpu_hours": str(gpu_hours),
            "precision": precision,
            "utilization": str(utilization),
        },
        assumptions=(
            f"utilisation is a share of {_rate_text(peak.flop_per_second)} FLOP/s, not of time",
            "low is 0, because a stated utilisation is a claim and not a measurement",
            "high is every device at maximum clock with the pipe active in every cycle",
            f"all of the work ran at {precision} without structured sparsity",
        ),
    )


def estimate_architecture(
    parameters: Amount,
    tokens: Amount,
    passes: str = "training",
) -> Estimate:
    """Model FLOP of a dense transformer: 6 x parameters x tokens, or 2 for forward passes only.

    A mixture of experts takes its active parameters. Low and high lie at the 30 % that the
    Commission allows an estimate to be off; they limit a compliant estimate, not the hardware.
    """
    if passes not in PASSES:
        raise UnknownName("passes", passes, f"use one of: {', '.join(PASSES)}")
    factor = PASSES[passes]
    flop = factor * require_amount("parameters", parameters) * require_amount("tokens", tokens)
    return Estimate(
        flop=Bounds(
            low=_floor(flop * (100 - MARGIN_PER_CENT) / 100),
            central=_floor(flop),
            high=_ceil(flop * (100 + MARGIN_PER_CENT) / 100),
        ),
        basis="model",
        method=f"architecture: C = {factor} x P x D (C(2025) 5045, Annex A.2.2)",
        model_version=FLOP_MODEL_VERSION,
        peak_basis=None,
        inputs={"parameters": str(parameters), "tokens": str(tokens), "passes": passes},
        assumptions=(
            "a dense transformer, or the active parameters of a mixture of experts",
            "parameters far outnumber a twelfth of the context's tokens, so attention adds little",
            "tokens are counted once per epoch; recomputation of activations is not in it",
            f"low and high are the {MARGIN_PER_CENT} % that Annex A.2 allows, not hardware limits",
        ),
    )


def estimate_document(estimate: Estimate) -> dict[str, object]:
    """The estimate as the stable JSON document: every amount a decimal string."""
    flop = estimate.flop
    return {
        "flop": {
            "low": str(flop.low),
            "central": str(flop.central),
            "high": None if flop.high is None else str(flop.high),
        },
        "flop_basis": estimate.basis,
        "method": estimate.method,
        "model_version": estimate.model_version,
        "peak_basis": None if estimate.peak_basis is None else _peak_document(estimate.peak_basis),
        "inputs": dict(estimate.inputs),
        "assumptions": list(estimate.assumptions),
    }


def require_amount(field: str, value: Amount) -> Fraction:
    """`value` as an exact non-negative amount; text is a plain decimal, an exponent allowed."""
    if isinstance(value, bool) or not isinstance(value, str | int | Fraction):
        raise InvalidInput(field, value, "give a decimal number as text; floats are not exact")
    if isinstance(value, str):
        found = _DECIMAL.fullmatch(value) if len(value) <= DECIMAL_CHARACTERS_MAX else None
        if found is None or int(found["exponent"] or 0) > EXPONENT_MAX:
            raise InvalidInput(
                field, value, "give a plain non-negative decimal such as 370000, 0.5 or 1.5e9"
            )
        return Fraction(value)
    if value < 0:
        raise InvalidInput(field, str(value), "give an amount of zero or more")
    return Fraction(value)


def precisions_of(table: AcceleratorTable, device: Accelerator) -> dict[str, tuple[str, int, int]]:
    """What a device offers, by precision: pipe, FLOP per cycle and SM, clock of its peak in MHz.

    Rates are the model's own, where it is an exception to its architecture; clocks those that its
    datasheet quotes each peak at.
    """
    names = {precision: f"tensor_{precision}" for precision in TENSOR_FLOAT_PRECISIONS}
    spans = table.of_row(device).spans
    tensor, cores = (_central(spans, name) for name in ("tensor_fp64", "fp64"))
    names |= {"fp64": "tensor_fp64" if tensor >= cores else "fp64", "fp32": "fp32"}
    return {
        precision: (
            "tensor" if name.startswith("tensor_") else "cores",
            _central(spans, name),
            device.quoted_clock_mhz(name),
        )
        for precision, name in names.items()
        if _central(spans, name)
    }


def _central(spans: Mapping[str, RateSpan], name: str) -> int:
    return spans[name].central_per_cycle if name in spans else 0


def _offer(table: AcceleratorTable, device: Accelerator, precision: str) -> tuple[str, int, int]:
    offered = precisions_of(table, device)
    if precision not in offered:
        remedy = f"{device.key} has FLOP at: {', '.join(offered)}"
        if precision == "int8":
            remedy += "; int8 work is integer operations, not FLOP"
        raise UnknownName("precision", precision, remedy)
    return offered[precision]


def _peak(
    table: AcceleratorTable, device: Accelerator, precision: str, stated: Amount | None
) -> PeakBasis:
    pipe, rate, clock_mhz = _offer(table, device, precision)
    sheet = device.datasheet_teraflop_per_second
    datasheet = sheet.get(f"tensor_{precision}") if pipe == "tensor" else sheet.get(precision)
    if stated is None:
        return PeakBasis(
            accelerator=device.key,
            precision=precision,
            pipe="tensor" if pipe == "tensor" else "cores",
            sparsity="dense",
            flop_per_second=Fraction(device.sm_count * rate * clock_mhz * HZ_PER_MHZ),
            sm_count=device.sm_count,
            flop_per_cycle_per_sm=rate,
            clock_mhz=clock_mhz,
            maximum_clock_mhz=device.max_sm_clock_mhz,
            datasheet_teraflop_per_second=datasheet,
            table_version=table.version,
            source=device.source,
        )
    return PeakBasis(
        accelerator=device.key,
        precision=precision,
        pipe="stated",
        sparsity="stated",
        flop_per_second=require_amount("peak_flop_per_second", stated),
        sm_count=device.sm_count,
        flop_per_cycle_per_sm=None,
        clock_mhz=None,
        maximum_clock_mhz=device.max_sm_clock_mhz,
        datasheet_teraflop_per_second=datasheet,
        table_version=table.version,
        source="stated by whoever asked for the estimate",
    )


def _peak_at_maximum_clock(
    table: AcceleratorTable, device: Accelerator, precision: str
) -> Fraction:
    """The most a device could reach: its fastest instructions, or the ceiling of its model."""
    pipe, _, _ = _offer(table, device, precision)
    name = f"tensor_{precision}" if pipe == "tensor" else precision
    rate = table.of_row(device).span(name).high_per_cycle
    most = Fraction(device.max_sm_cycles_per_us * rate * HZ_PER_MHZ)
    ceiling = device.ceiling_tera_per_second.get(name)
    return most if ceiling is None else min(most, Fraction(ceiling) * 10**12)


def _peak_document(peak: PeakBasis) -> dict[str, object]:
    return {
        "accelerator": peak.accelerator,
        "precision": peak.precision,
        "pipe": peak.pipe,
        "sparsity": peak.sparsity,
        "flop_per_second": _rate_text(peak.flop_per_second),
        "sm_count": peak.sm_count,
        "flop_per_cycle_per_sm": peak.flop_per_cycle_per_sm,
        "clock_mhz": peak.clock_mhz,
        "maximum_clock_mhz": peak.maximum_clock_mhz,
        "datasheet_teraflop_per_second": peak.datasheet_teraflop_per_second,
        "table_version": peak.table_version,
        "source": peak.source,
    }


def _rate_text(rate: Fraction) -> str:
    return str(rate.numerator) if rate.denominator == 1 else f"{rate.numerator}/{rate.denominator}"


def _floor(value: Fraction) -> int:
    return floor_div(value.numerator, value.denominator)


def _ceil(value: Fraction) -> int:
    return ceil_div(value.numerator, value.denominator)
