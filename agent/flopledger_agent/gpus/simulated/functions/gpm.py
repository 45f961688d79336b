"""GPU performance monitoring: samples, percentages between two of them, cumulative cycles.

A sample freezes every counter at one exact instant. A percentage is active / elapsed x 100 of the
pair as the nearest double; a cumulative id is the newer sample's counter, whole cycles since start
or reset, as the nearest double too (beyond 2^53 those lie apart). Percentages come from counters
that never reset. A metric that cannot be answered carries its own code, as real drivers do; the
call fails only as a whole.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.faults import CODE_UNKNOWN, Fault
from flopledger_agent.gpus.simulated.functions.answers import (
    INVALID_ARGUMENT,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
    constant,
)
from flopledger_agent.gpus.simulated.marshalling import CArgument, address, target, write_handle
from flopledger_agent.gpus.simulated.schedule import (
    DRAM_ACTIVE,
    ELAPSED,
    GPU_ACTIVE,
    POSITIONS,
)

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver

# nvmlGpmMetricsGet_t by bytes (its layout is fixed by the C header): attribute access on ctypes
# structures costs more than the whole computation.
_HEAD: Final = struct.Struct("<IIQQ")  # version, numMetrics, sample1, sample2
_METRIC_FORMAT: Final = "IIdQQQ"  # metricId, nvmlReturn, value, shortName, longName, unit
_METRIC_BYTES: Final = struct.calcsize(f"<{_METRIC_FORMAT}")

_SHARE_OF_ELAPSED: Final[Mapping[int, int]] = MappingProxyType(
    {
        pynvml.NVML_GPM_METRIC_SM_UTIL: POSITIONS["sm_active"],
        pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: POSITIONS["sm_occupancy"],
        pynvml.NVML_GPM_METRIC_INTEGER_UTIL: POSITIONS["integer"],
        pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: POSITIONS["any_tensor"],
        pynvml.NVML_GPM_METRIC_DFMA_TENSOR_UTIL: POSITIONS["dfma"],
        pynvml.NVML_GPM_METRIC_HMMA_TENSOR_UTIL: POSITIONS["hmma"],
        pynvml.NVML_GPM_METRIC_DMMA_TENSOR_UTIL: POSITIONS["dmma"],
        pynvml.NVML_GPM_METRIC_IMMA_TENSOR_UTIL: POSITIONS["imma"],
        pynvml.NVML_GPM_METRIC_FP64_UTIL: POSITIONS["fp64"],
        pynvml.NVML_GPM_METRIC_FP32_UTIL: POSITIONS["fp32"],
        pynvml.NVML_GPM_METRIC_FP16_UTIL: POSITIONS["fp16"],
    }
)
_SHARE_OF_TIME: Final[Mapping[int, int]] = MappingProxyType(
    {
        pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL: GPU_ACTIVE,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: DRAM_ACTIVE,
    }
)
# Ids 248-260, written out: bindings older than 13.595 do not name them.
_CUMULATIVE: Final[Mapping[int, int]] = MappingProxyType(
    {
        248: ELAPSED,
        249: POSITIONS["sm_active"],
        250: POSITIONS["any_tensor"],
        251: POSITIONS["dmma"],
        252: POSITIONS["hmma"],
        253: POSITIONS["imma"],
        254: POSITIONS["dfma"],
        257: POSITIONS["integer"],
        258: POSITIONS["fp64"],
        259: POSITIONS["fp32"],
        260: POSITIONS["fp16"],
    }
)
_SHARE, _TIME, _CYCLES, _REFUSED = range(4)  # ways to compute a metric
_METRIC_VALUES: Final = len(_METRIC_FORMAT)
PLANS_KEPT: Final = 64  # distinct lists of metric ids; a program asks for one or two
_METRIC_ID_MAX: Final = 477  # of the newest driver simulated


class Sample:
    """What a sample handle stands for; empty until a SampleGet fills it."""

    __slots__ = ("counters", "device", "memory", "now_ns")

    def __init__(self) -> None:
        self.memory = ctypes.c_uint64()  # real memory whose address is the handle
        self.device: Device | None = None
        self.counters: list[int] = []
        self.now_ns = 0


@lru_cache(maxsize=PLANS_KEPT)
def _layout(count: int) -> tuple[struct.Struct, struct.Struct]:
    ids = struct.Struct("<" + f"I{_METRIC_BYTES - 4}x" * count)
    return ids, struct.Struct("<" + _METRIC_FORMAT * count)


def sample_alloc(driver: SimulatedDriver, out: CArgument) -> int:
    """Answer nvmlGpmSampleAlloc."""
    sample = Sample()
    handle = ctypes.addressof(sample.memory)
    write_handle(out, handle)
    driver.gpm_samples[handle] = sample
    return SUCCESS


def sample_free(driver: SimulatedDriver, handle: CArgument) -> int:
    """Answer nvmlGpmSampleFree."""
    found = driver.gpm_samples.pop(address(handle), None)
    return INVALID_ARGUMENT if found is None else SUCCESS


def sample_get(device: Device, now_ns: int, driver: SimulatedDriver, handle: CArgument) -> int:
    """Answer nvmlGpmSampleGet: every counter at this instant."""
    if device.gpu.gpm == "none":
        return NOT_SUPPORTED
    return freeze(device, now_ns, driver, handle)


def freeze(device: Device, now_ns: int, driver: SimulatedDriver, handle: CArgument) -> int:
    """Fill a sample with every counter of a GPU, or of a GPU instance, at this instant."""
    sample = driver.gpm_samples.get(address(handle))
    if sample is None:
        return INVALID_ARGUMENT
    sample.counters = device.schedule.counters(now_ns)
    sample.now_ns = now_ns
    sample.device = device
    return SUCCESS


def metrics_get(driver: SimulatedDriver, out: CArgument) -> int:
    """Answer nvmlGpmMetricsGet."""
    request = target(out)
    version, count, first_handle, second_handle = _HEAD.unpack_from(request)
    if version != pynvml.NVML_GPM_METRICS_GET_VERSION:
        code: int = pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        return code
    first = driver.gpm_samples.get(first_handle)
    second = driver.gpm_samples.get(second_handle)
    if first is None or second is None or second.device is None:
        return INVALID_ARGUMENT
    if first.device is not second.device or second.now_ns < first.now_ns:
        return INVALID_ARGUMENT
    if not 0 < count <= (ctypes.sizeof(request) - _HEAD.size) // _METRIC_BYTES:
        return INVALID_ARGUMENT
    if second.device.faults:
        fault = driver.fault_code("nvmlGpmMetricsGet", second.device.faults, named_only=True)
        if fault:
            return fault
    ids, layout = _layout(count)
    wanted = ids.unpack_from(request, _HEAD.size)
    answers = _answers(second.device, first, second, wanted)
    layout.pack_into(request, _HEAD.size, *answers)
    return SUCCESS


def _answers(
    device: Device, first: Sample, second: Sample, wanted: tuple[int, ...]
) -> list[int | float]:
    before, after = first.counters, second.counters
    elapsed = after[ELAPSED] - before[ELAPSED]
    time = device.schedule.activity_denominator * (second.now_ns - first.now_ns)
    at_reset = device.counters_at_reset(second.now_ns) or device.before_start
    answers: list[int | float] = []
    for metric_id, code, way, position in _plan(wanted, device.gpu.gpm == "cycles"):
        value = 0.0
        if way == _CYCLES:
            value = float((after[position] - at_reset[position]) // device.cycle_divisor)
        elif way != _REFUSED:
            # Nothing elapsed between equal samples (or at clock 0): 0/0 is not a number.
            whole = elapsed if way == _SHARE else time
            value = 100 * (after[position] - before[position]) / whole if whole else math.nan
        answers += (metric_id, code, value, 0, 0, 0)
    for fault in device.gpm_faults:
        _spoil(fault, second.now_ns, answers)
    return answers


@lru_cache(maxsize=PLANS_KEPT)
def _plan(wanted: tuple[int, ...], cycles: bool) -> tuple[tuple[int, int, int, int], ...]:  # noqa: FBT001
    """For every metric id: the id, its own code, the way it is computed, and the counter."""
    plan = []
    for metric_id in wanted:
        if metric_id in _SHARE_OF_ELAPSED:
            plan.append((metric_id, SUCCESS, _SHARE, _SHARE_OF_ELAPSED[metric_id]))
        elif metric_id in _SHARE_OF_TIME:
            plan.append((metric_id, SUCCESS, _TIME, _SHARE_OF_TIME[metric_id]))
        elif metric_id in _CUMULATIVE and cycles:
            plan.append((metric_id, SUCCESS, _CYCLES, _CUMULATIVE[metric_id]))
        else:
            known = 0 < metric_id < _METRIC_ID_MAX
            plan.append((metric_id, NOT_SUPPORTED if known else INVALID_ARGUMENT, _REFUSED, 0))
    return tuple(plan)


def _spoil(fault: Fault, now_ns: int, answers: list[int | float]) -> None:
    for place in range(0, len(answers), _METRIC_VALUES):
        metric_id, code = int(answers[place]), int(answers[place + 1])
        if code != SUCCESS or not fault.touches_metric(metric_id, now_ns):
            continue
        if fault.kind == "metric_error":
            answers[place + 1] = CODE_UNKNOWN if fault.code is None else fault.code
            answers[place + 2] = 0.0
        elif metric_id not in _CUMULATIVE:
            answers[place + 2] = math.nan


def query_support(device: Device, _now_ns: int, out: CArgument) -> int:
    """nvmlGpmSupport_t."""
    target(out).isSupportedDevice = int(device.gpu.gpm != "none")
    return SUCCESS


FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {
        "nvmlGpmQueryDeviceSupport": query_support,
        "nvmlGpmQueryIfStreamingEnabled": constant(0),
    }
)
