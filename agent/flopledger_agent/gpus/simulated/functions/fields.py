"""Field values and buffered samples: the two bulk ways NVML offers to read a device.

Each field value carries its own return code; the call itself fails only as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.functions.answers import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
)
from flopledger_agent.gpus.simulated.functions.readings import (
    celsius,
    clock_mhz,
    min_power_limit_mw,
    power_limit_mw,
)
from flopledger_agent.gpus.simulated.marshalling import CArgument, number, target

SCOPE_GPU: Final[int] = pynvml.NVML_POWER_SCOPE_GPU
SCOPE_MODULE: Final[int] = pynvml.NVML_POWER_SCOPE_MODULE
POWER_AVERAGE_WINDOW_NS: Final = 1_000_000_000
SAMPLE_PERIOD_NS: Final = 100_000_000
SAMPLES_MAX: Final = 120
FIELD_ID_MAX: Final = pynvml.NVML_FI_MAX

_WIDE: Final = frozenset({pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, pynvml.NVML_FI_DEV_ENERGY})
_POWERS: Final[Mapping[int, Callable[[Device, int], int]]] = MappingProxyType(
    {
        pynvml.NVML_FI_DEV_POWER_AVERAGE: lambda d, now_ns: d.average_power_mw(
            now_ns, POWER_AVERAGE_WINDOW_NS
        ),
        pynvml.NVML_FI_DEV_POWER_INSTANT: lambda d, now_ns: d.power_mw(now_ns),
    }
)
_FIELDS: Final[Mapping[int, Callable[[Device, int], int]]] = MappingProxyType(
    {
        pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION: lambda d, now_ns: d.energy_mj(now_ns),
        pynvml.NVML_FI_DEV_ENERGY: lambda d, now_ns: d.energy_mj(now_ns),
        pynvml.NVML_FI_DEV_MEMORY_TEMP: celsius,
        pynvml.NVML_FI_DEV_POWER_MIN_LIMIT: min_power_limit_mw,
        pynvml.NVML_FI_DEV_POWER_MAX_LIMIT: power_limit_mw,
        pynvml.NVML_FI_DEV_POWER_DEFAULT_LIMIT: power_limit_mw,
        pynvml.NVML_FI_DEV_POWER_CURRENT_LIMIT: power_limit_mw,
        pynvml.NVML_FI_DEV_POWER_REQUESTED_LIMIT: power_limit_mw,
    }
)


def field_values(device: Device, now_ns: int, count: CArgument, values: CArgument) -> int:
    """Answer nvmlDeviceGetFieldValues; power also at the scope of the module, where it has one."""
    fields = target(values)
    if not 0 < number(count) <= len(fields):
        return INVALID_ARGUMENT
    for position in range(number(count)):
        field = fields[position]
        field.timestamp = device.unix_us(now_ns)
        field.latencyUsec = 0
        field_id = field.fieldId
        read = _FIELDS.get(field_id) if field.scopeId == SCOPE_GPU else None
        read = read or _power(device, field_id, field.scopeId)
        if read is None:
            field.nvmlReturn = NOT_SUPPORTED if 0 < field_id < FIELD_ID_MAX else INVALID_ARGUMENT
            continue
        field.nvmlReturn = SUCCESS
        if field_id in _WIDE:
            field.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            field.value.ullVal = read(device, now_ns)
        else:
            field.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
            field.value.uiVal = read(device, now_ns)
    return SUCCESS


def _power(device: Device, field_id: int, scope: int) -> Callable[[Device, int], int] | None:
    read = _POWERS.get(field_id)
    if read is None or scope not in {SCOPE_GPU, SCOPE_MODULE}:
        return None
    if scope == SCOPE_MODULE:
        return read if device.gpu.energy_scope == "module" else None
    return lambda d, now_ns: d.of_gpu_alone_mw(read(d, now_ns))


def _sampled(kind: int) -> Callable[[Device, int], int] | None:
    sampled: dict[int, Callable[[Device, int], int]] = {
        pynvml.NVML_TOTAL_POWER_SAMPLES: lambda d, at_ns: d.of_gpu_alone_mw(d.power_mw(at_ns)),
        pynvml.NVML_GPU_UTILIZATION_SAMPLES: lambda d, at_ns: int(
            100 * d.schedule.state_before(at_ns).gpu_active
        ),
        pynvml.NVML_MEMORY_UTILIZATION_SAMPLES: lambda d, at_ns: int(
            100 * d.schedule.state_before(at_ns).dram_active
        ),
        pynvml.NVML_PROCESSOR_CLK_SAMPLES: lambda d, at_ns: clock_mhz(
            d, at_ns, pynvml.NVML_CLOCK_SM
        ),
        pynvml.NVML_MEMORY_CLK_SAMPLES: lambda d, at_ns: clock_mhz(d, at_ns, pynvml.NVML_CLOCK_MEM),
    }
    return sampled.get(kind)


def samples(  # noqa: PLR0913, PLR0917  (NVML's own signature)
    device: Device,
    now_ns: int,
    kind: CArgument,
    last_seen: CArgument,
    value_type: CArgument,
    count: CArgument,
    buffer: CArgument,
) -> int:
    """Answer nvmlDeviceGetSamples: samples newer than the stamp, oldest first."""
    read = _sampled(number(kind))
    if read is None:
        return NOT_SUPPORTED
    target(value_type).value = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    size = target(count)
    if buffer is None:
        size.value = SAMPLES_MAX
        return SUCCESS
    newest = now_ns // SAMPLE_PERIOD_NS
    oldest = max(newest - SAMPLES_MAX + 1, 1)
    if number(last_seen):
        oldest = max(oldest, device.since_unix_us(number(last_seen)) // SAMPLE_PERIOD_NS)
    instants = [tick * SAMPLE_PERIOD_NS for tick in range(oldest, newest + 1)]
    fresh = [at_ns for at_ns in instants if device.unix_us(at_ns) > number(last_seen)]
    if not fresh:
        return NOT_FOUND
    fresh = fresh[-size.value :]
    size.value = len(fresh)
    for sample, at_ns in zip(target(buffer), fresh, strict=False):
        sample.timeStamp = device.unix_us(at_ns)
        sample.sampleValue.uiVal = read(device, at_ns)
    return SUCCESS


FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {"nvmlDeviceGetFieldValues": field_values, "nvmlDeviceGetSamples": samples}
)
