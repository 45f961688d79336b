"""What a page of dcgm-exporter says of each GPU: text in, exact numbers or reasons out. Pure.

Only fields that concern activity are read, under their old and their new names. A GPU is known by
its UUID and, where it is partitioned, by the id of its GPU instance; never by its ordinal. A value
that cannot be one (a sentinel, not a number, a ratio above 1) is absent with its reason; a line
that cannot be read costs itself and nothing else.

Names, sentinels and the form of a page: NVIDIA/DCGM `dcgm_fields.h` and `dcgm_structs.h`,
NVIDIA/dcgm-exporter `internal/pkg/rendermetrics` and `etc/*.csv`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from flopledger_core.units import INT64_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PROF: Final = "DCGM_FI_PROF_"
_DEV: Final = "DCGM_FI_DEV_"
RATIO_FIELDS: Final[dict[str, str]] = {
    _PROF + name: field
    for field, names in {
        "sm_active": ("SM_ACTIVE", "SM_UTIL_RATIO"),
        "any_tensor": ("PIPE_TENSOR_ACTIVE", "TENSOR_UTIL_RATIO"),
        "hmma": ("PIPE_TENSOR_HMMA_ACTIVE", "HMMA_UTIL_RATIO"),
        "imma": ("PIPE_TENSOR_IMMA_ACTIVE", "IMMA_UTIL_RATIO"),
        "dfma": ("PIPE_TENSOR_DFMA_ACTIVE", "DFMA_UTIL_RATIO"),
        "fp64": ("PIPE_FP64_ACTIVE", "FP64_UTIL_RATIO"),
        "fp32": ("PIPE_FP32_ACTIVE", "FP32_UTIL_RATIO"),
        "fp16": ("PIPE_FP16_ACTIVE", "FP16_UTIL_RATIO"),
        "integer": ("PIPE_INT_ACTIVE", "INT_UTIL_RATIO"),
    }.items()
    for name in names
}
"""Metric -> `Cycles` field whose share of SM-cycles it is (old names, then those of DCGM 4.5)."""

TOTAL_FIELDS: Final[dict[str, str]] = {
    f"{_PROF}{name}_TOTAL": field
    for name, field in {
        "SM_CYCLES_ELAPSED": "elapsed",
        "SM_CYCLES_ACTIVE": "sm_active",
        "MMA_CYCLES_ACTIVE": "any_tensor",
        "DMMA_CYCLES_ACTIVE": "dmma",
        "HMMA_CYCLES_ACTIVE": "hmma",
        "IMMA_CYCLES_ACTIVE": "imma",
        "DFMA_CYCLES_ACTIVE": "dfma",
        "INT_CYCLES_ACTIVE": "integer",
        "FP64_CYCLES_ACTIVE": "fp64",
        "FP32_CYCLES_ACTIVE": "fp32",
        "FP16_CYCLES_ACTIVE": "fp16",
    }.items()
}
"""Metric -> `Cycles` field that it counts since the driver was loaded (DCGM fields 1084-1096)."""

# Activity that is no pipe's: it tells whether a page of zeros can be true.
WITNESS_FIELDS: Final[dict[str, str]] = {
    _PROF + "GR_ENGINE_ACTIVE": "engine",
    _PROF + "GR_ENGINE_UTIL_RATIO": "engine",
    _PROF + "SM_OCCUPANCY": "occupancy",
    _PROF + "SM_OCCUPANCY_RATIO": "occupancy",
    _PROF + "DRAM_ACTIVE": "dram",
    _PROF + "DRAM_UTIL_RATIO": "dram",
}
UTILIZATION_FIELDS: Final = frozenset({_DEV + "GPU_UTIL", _DEV + "GPU_UTIL_RATIO"})
CLOCK_FIELD: Final = _DEV + "SM_CLOCK"
# Quantities that move on a living GPU: a page on which they stand still is an old one.
LIFE_FIELDS: Final = frozenset(
    _DEV + name
    for name in (
        "TOTAL_ENERGY_CONSUMPTION",
        "GPU_ENERGY_JOULES_TOTAL",
        "POWER_USAGE",
        "BOARD_POWER_WATTS",
        "GPU_TEMP",
        "GPU_TEMP_CELSIUS",
    )
)
KNOWN: Final = frozenset(
    {*RATIO_FIELDS, *TOTAL_FIELDS, *WITNESS_FIELDS, *UTILIZATION_FIELDS, CLOCK_FIELD, *LIFE_FIELDS}
)

# DCGM says why it has no value by 0 to 15 above a base (dcgm_structs.h, DCGM_*_BLANK and kin).
INT32_BLANK: Final = 0x7FFFFFF0
INT64_BLANK: Final = 0x7FFFFFFFFFFFFFF0
FP64_BLANK: Final = 1 << 47
BLANKS: Final = 16
BLANK_REASONS: Final[dict[int, str]] = {1: "not_found", 2: "not_supported", 3: "no_permission"}

# Ratios are printed with six digits; a little above 1 is rounding and read as 1, more is no ratio
# (SM_ACTIVE 1.29 was seen on a partitioned A100: NVIDIA/DCGM#152).
RATIO_MAX: Final = Fraction(101, 100)
SM_CLOCK_MHZ_MAX: Final = 10_000  # several times any GPU's clock
KHZ_PER_MHZ: Final = 1000
GPU_INSTANCE_MAX: Final = 64  # records.Device.gpu_instance

Key = tuple[str, int | None]  # UUID of the GPU, GPU instance of a partitioned one
Number = int | float
Found = Fraction | int | str  # a quantity, or the reason why it is absent
_Series = tuple[str, str, str, int | None, Number]  # host, metric, UUID, GPU instance, value


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one page says of one GPU or GPU instance.

    `ratios` and `totals` are by `Cycles` field; totals are raw counters of unknown scale.
    `signature` changes whenever the exporter has looked at this device again.
    """

    ratios: dict[str, Fraction]
    totals: dict[str, int]
    witnesses: dict[str, Fraction]  # shares of time of the whole engine, of warps, of memory
    gpu_util_ratio: Fraction | None
    sm_clock_khz: int | None
    absent: dict[str, str]  # `Cycles` field -> why its ratio is absent although it is exported
    signature: tuple[tuple[str, str], ...]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Every device of one page."""

    readings: dict[Key, Reading]
    elsewhere: frozenset[str]  # UUIDs that the page has for other hosts only
    unreadable_lines: int


def parse_page(text: str, host: str) -> Page:
    """The devices on a page; `host` tells which are ours when the page holds several hosts'."""
    found: list[_Series] = []
    unreadable = 0
    for line in text.splitlines():
        name = line.partition("{")[0].strip()
        if name not in KNOWN:
            continue
        try:
            found += _series(line)
        except (ValueError, IndexError):  # the parser raises either
            unreadable += 1
    hosts = {series[0] for series in found if series[0]}
    ours = [
        series
        for series in found
        if len(hosts) <= 1 or not series[0] or _same_host(series[0], host)
    ]
    grouped: dict[Key, dict[str, list[Number]]] = {}
    for _, name, uuid, instance, value in ours:
        grouped.setdefault((uuid, instance), {}).setdefault(name, []).append(value)
    uuids = {uuid for uuid, _ in grouped}
    return Page(
        readings={key: _reading(values) for key, values in grouped.items()},
        elsewhere=frozenset(series[2] for series in found) - uuids,
        unreadable_lines=unreadable,
    )


def _series(line: str) -> Iterable[_Series]:
    """The series in one line. Errors: ValueError when it is none.

    A line at a time: the parser gives up a whole page at its first bad line.
    """
    for family in text_string_to_metric_families(line):
        for sample in family.samples:
            labels = sample.labels
            uuid = labels.get("UUID") or labels.get("uuid")
            if not uuid:
                raise ValueError("a series without a UUID")
            text = labels.get("GPU_I_ID") or None
            instance = None if text is None else int(text)
            if instance is not None and not 0 <= instance <= GPU_INSTANCE_MAX:
                raise ValueError("no GPU instance has this id")
            host = labels.get("hostname") or labels.get("Hostname") or ""
            yield host, sample.name, uuid, instance, sample.value


def _same_host(found: str, host: str) -> bool:
    """Equal, or equal up to the first dot where one of them has no domain."""
    if found == host:
        return True
    short = "." not in found or "." not in host
    return short and found.partition(".")[0] == host.partition(".")[0]


def _reading(values: dict[str, list[Number]]) -> Reading:
    absent: dict[str, str] = {}
    ratios = _merged(values, RATIO_FIELDS, ratio_of, absent)
    ignored: dict[str, str] = {}
    utilization = _merged(values, dict.fromkeys(UTILIZATION_FIELDS, "gpu"), _utilization, ignored)
    clock = _merged(values, {CLOCK_FIELD: "clock"}, _clock_khz, ignored).get("clock")
    util = utilization.get("gpu")
    return Reading(
        ratios={name: Fraction(ratio) for name, ratio in ratios.items()},
        totals={
            name: int(total)
            for name, total in _merged(values, TOTAL_FIELDS, total_of, ignored).items()
        },
        witnesses={
            name: Fraction(ratio)
            for name, ratio in _merged(values, WITNESS_FIELDS, ratio_of, ignored).items()
        },
        gpu_util_ratio=None if util is None else Fraction(util),
        sm_clock_khz=None if clock is None else int(clock),
        absent=absent,
        signature=_signature(values),
    )


def _merged(
    values: dict[str, list[Number]],
    fields: dict[str, str],
    convert: Callable[[Number], Found],
    absent: dict[str, str],
) -> dict[str, Fraction | int]:
    """The quantities by field, from all their series.

    The exporter repeats a series for every job on the device (label `hpc_job`): one value then.
    What does not agree is nobody's value.
    """
    found: dict[str, set[Found]] = {}
    for metric, field in fields.items():
        for value in values.get(metric, ()):
            found.setdefault(field, set()).add(convert(value))
    result: dict[str, Fraction | int] = {}
    for field, answers in found.items():
        answer = answers.pop() if len(answers) == 1 else "dcgm_series_disagree"
        if isinstance(answer, str):
            absent[field] = answer
        else:
            result[field] = answer
    return result


def _signature(values: dict[str, list[Number]]) -> tuple[tuple[str, str], ...]:
    """What must differ between two looks of the exporter at a device.

    Counters of cycles, where there are any. Else ratios that are neither 0 nor 1: profiling can
    stand still while power and temperature go on. Else everything.
    """
    items = [(name, repr(value)) for name, all_of in sorted(values.items()) for value in all_of]
    totals = [item for item in items if item[0] in TOTAL_FIELDS]
    if totals:
        return tuple(totals)
    moving = [
        (name, repr(value))
        for name, all_of in sorted(values.items())
        for value in all_of
        if name.startswith(_PROF) and 0 < value < 1
    ]
    return tuple(moving or items)


# --- values -------------------------------------------------------------------------------------


def blank_reason(value: Number, *bases: int) -> str | None:
    """Why DCGM has no value, where `value` is one of its sentinels above `bases`; else None."""
    for base in bases:
        if base <= value < base + BLANKS:
            return BLANK_REASONS.get(int(value) - base, "not_available")
    return None


def ratio_of(value: Number) -> Fraction | str:
    """A share 0..1, or the reason why it is none."""
    if math.isnan(value):
        return "not_a_number"
    reason = blank_reason(value, FP64_BLANK, INT64_BLANK, INT32_BLANK)
    if reason is not None:
        return reason
    if not 0 <= value <= RATIO_MAX:
        return "out_of_range"
    return min(Fraction(value), Fraction(1))


def total_of(value: Number) -> int | str:
    """A cumulative counter, or the reason why it is none.

    Counters of cycles may pass the sentinels of smaller types: only those of their own count.
    """
    if math.isnan(value):
        return "not_a_number"
    # As a double the sentinels of 64 bits all round to 2^63.
    reason = blank_reason(value, INT64_BLANK)
    if reason is not None or value > INT64_MAX:
        return reason or "not_available"
    return int(value) if value >= 0 else "out_of_range"


def _utilization(value: Number) -> Fraction | str:
    """GPU_UTIL is a whole percentage; GPU_UTIL_RATIO is one too before DCGM 4.7, then a ratio.

    The exporter prints percentages as integers and ratios with six digits.
    """
    if isinstance(value, int):
        reason = blank_reason(value, INT64_BLANK, INT32_BLANK)
        return reason or (Fraction(value, 100) if 0 <= value <= 100 else "out_of_range")
    if value > 1 and not math.isnan(value):
        value = value / 100
    return ratio_of(value)


def _clock_khz(value: Number) -> int | str:
    if math.isnan(value):
        return "not_a_number"
    reason = blank_reason(value, FP64_BLANK, INT64_BLANK, INT32_BLANK)
    if reason is not None:
        return reason
    return int(value * KHZ_PER_MHZ) if 0 <= value <= SM_CLOCK_MHZ_MAX else "out_of_range"
