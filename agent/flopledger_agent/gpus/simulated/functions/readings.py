"""What a device measures: clocks, power, energy, memory, temperature, utilisation, limits.

Sampled values show the state just before the instant; the energy counter is the exact integral,
rounded down to whole millijoules only as it is handed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.functions.answers import (
    INVALID_ARGUMENT,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
    constant,
    fixed,
    pair,
    scalar,
    unsupported,
)
from flopledger_agent.gpus.simulated.marshalling import CArgument, number, target
from flopledger_agent.gpus.simulated.schedule import BYTES_PER_MIB, DRAM_ACTIVE, GPU_ACTIVE

UTILIZATION_WINDOW_NS: Final = 1_000_000_000  # "between 1 second and 1/6 second" says nvml.h
IDLE_CELSIUS: Final = 32
CELSIUS_AT_POWER_LIMIT: Final = 72
SHUTDOWN_CELSIUS: Final = 95
SLOWDOWN_CELSIUS: Final = 90
RESERVED_MEMORY_MIB: Final = 512  # what the driver keeps for itself, out of total
MIN_POWER_LIMIT_SHARE: Final = (2, 7)  # 200 W of 700 W on H100
GRAPHICS, SM, MEMORY, VIDEO = 0, 1, 2, 3


def energy(device: Device, now_ns: int, out: CArgument) -> int:
    """Answer nvmlDeviceGetTotalEnergyConsumption, in mJ."""
    target(out).value = device.energy_mj(now_ns)
    return SUCCESS


def clock_mhz(device: Device, now_ns: int, kind: int) -> int:
    """The clock of one domain just before now; graphics and video follow the SM clock."""
    if kind == MEMORY:
        return device.gpu.memory_clock_mhz
    return device.schedule.state_before(now_ns).sm_clock_mhz


def clock_info(device: Device, now_ns: int, kind: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetClockInfo, in MHz."""
    domain = number(kind)
    if not GRAPHICS <= domain <= VIDEO:
        return INVALID_ARGUMENT
    target(out).value = clock_mhz(device, now_ns, domain)
    return SUCCESS


def max_clock_info(device: Device, _now_ns: int, kind: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetMaxClockInfo, in MHz."""
    domain = number(kind)
    if not GRAPHICS <= domain <= VIDEO:
        return INVALID_ARGUMENT
    gpu = device.gpu
    target(out).value = gpu.memory_clock_mhz if domain == MEMORY else gpu.max_sm_clock_mhz
    return SUCCESS


def clock(device: Device, now_ns: int, kind: CArgument, which: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetClock: the current clock, or the highest a customer may set."""
    if number(which) == pynvml.NVML_CLOCK_ID_CURRENT:
        return clock_info(device, now_ns, kind, out)
    if number(which) == pynvml.NVML_CLOCK_ID_CUSTOMER_BOOST_MAX:
        return max_clock_info(device, now_ns, kind, out)
    return NOT_SUPPORTED


def used_memory_bytes(device: Device, now_ns: int) -> int:
    """Memory the processes hold just before now."""
    return device.schedule.state_before(now_ns).memory_used_mib * BYTES_PER_MIB


def memory_info(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlMemory_t: `used` contains what the driver reserves."""
    info = target(out)
    reserved = RESERVED_MEMORY_MIB * BYTES_PER_MIB
    total = device.gpu.memory_mib * BYTES_PER_MIB
    used = min(total, used_memory_bytes(device, now_ns) + reserved)
    info.total, info.used, info.free = total, used, total - used
    return SUCCESS


def memory_info_v2(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlMemory_v2_t: `used` and `reserved` apart."""
    info = target(out)
    if info.version != pynvml.nvmlMemory_v2:
        code: int = pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        return code
    reserved = RESERVED_MEMORY_MIB * BYTES_PER_MIB
    total = device.gpu.memory_mib * BYTES_PER_MIB
    used = min(total - reserved, used_memory_bytes(device, now_ns))
    info.total, info.reserved, info.used, info.free = total, reserved, used, total - reserved - used
    return SUCCESS


def bar1_memory_info(device: Device, _now_ns: int, out: CArgument) -> int:
    """nvmlBAR1Memory_t: all of it free."""
    info = target(out)
    info.bar1Total = device.gpu.memory_mib * BYTES_PER_MIB
    info.bar1Used, info.bar1Free = 0, device.gpu.memory_mib * BYTES_PER_MIB
    return SUCCESS


def utilization(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlUtilization_t: whole percents of the last second."""
    rates = target(out)
    rates.gpu = device.activity_percent(GPU_ACTIVE, now_ns, UTILIZATION_WINDOW_NS)
    rates.memory = device.activity_percent(DRAM_ACTIVE, now_ns, UTILIZATION_WINDOW_NS)
    return SUCCESS


def celsius(device: Device, now_ns: int) -> int:
    """A plausible temperature: it follows power, nothing is accounted from it."""
    rise = (CELSIUS_AT_POWER_LIMIT - IDLE_CELSIUS) * device.power_mw(now_ns)
    return min(SLOWDOWN_CELSIUS, IDLE_CELSIUS + rise // (device.gpu.power_limit_watts * 1000))


def temperature(device: Device, now_ns: int, sensor: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetTemperature, in degrees Celsius."""
    if number(sensor) != pynvml.NVML_TEMPERATURE_GPU:
        return INVALID_ARGUMENT
    target(out).value = celsius(device, now_ns)
    return SUCCESS


def temperature_v1(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlTemperature_v1_t."""
    info = target(out)
    if info.sensorType != pynvml.NVML_TEMPERATURE_GPU:
        return INVALID_ARGUMENT
    info.temperature = celsius(device, now_ns)
    return SUCCESS


def temperature_threshold(_device: Device, _now_ns: int, kind: CArgument, out: CArgument) -> int:
    """Shutdown and slowdown only."""
    thresholds = {
        pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN: SHUTDOWN_CELSIUS,
        pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN: SLOWDOWN_CELSIUS,
    }
    if number(kind) not in thresholds:
        return NOT_SUPPORTED
    target(out).value = thresholds[number(kind)]
    return SUCCESS


def power_limit_mw(device: Device, _now_ns: int) -> int:
    """The power limit; nobody has changed it, so it is also the default and the highest."""
    return device.gpu.power_limit_watts * 1000


def min_power_limit_mw(device: Device, _now_ns: int) -> int:
    """The lowest limit that could be set."""
    share, of = MIN_POWER_LIMIT_SHARE
    return device.gpu.power_limit_watts * 1000 * share // of


def _performance_state(device: Device, now_ns: int) -> int:
    return 0 if device.schedule.state_before(now_ns).sm_active else 8


def _event_reasons(device: Device, now_ns: int) -> int:
    if not device.schedule.state_before(now_ns).sm_active:
        idle: int = pynvml.nvmlClocksEventReasonGpuIdle
        return idle
    return 0


def _no_ecc_errors(
    _device: Device, _now_ns: int, _kind: CArgument, _counter: CArgument, out: CArgument
) -> int:
    target(out).value = 0
    return SUCCESS


def _no_memory_errors(
    _device: Device,
    _now_ns: int,
    _kind: CArgument,
    _counter: CArgument,
    _place: CArgument,
    out: CArgument,
) -> int:
    target(out).value = 0
    return SUCCESS


def _remapped_rows(_device: Device, _now_ns: int, *outs: CArgument) -> int:
    for out in outs:
        target(out).value = 0
    return SUCCESS


def _pcie_throughput(_device: Device, _now_ns: int, _counter: CArgument, out: CArgument) -> int:
    target(out).value = 0
    return SUCCESS


def _supported_reasons(_device: Device, _now_ns: int) -> int:
    reasons: int = pynvml.nvmlClocksEventReasonGpuIdle
    return reasons


_NO_ENGINE_USE: Final = pair(fixed(0), fixed(UTILIZATION_WINDOW_NS // 1000))

FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {
        "nvmlDeviceGetTotalEnergyConsumption": energy,
        "nvmlDeviceGetPowerUsage": scalar(
            lambda device, now_ns: device.of_gpu_alone_mw(device.power_mw(now_ns))
        ),
        "nvmlDeviceGetPowerManagementMode": constant(1),
        "nvmlDeviceGetPowerManagementLimit": scalar(power_limit_mw),
        "nvmlDeviceGetPowerManagementDefaultLimit": scalar(power_limit_mw),
        "nvmlDeviceGetEnforcedPowerLimit": scalar(power_limit_mw),
        "nvmlDeviceGetPowerManagementLimitConstraints": pair(min_power_limit_mw, power_limit_mw),
        "nvmlDeviceGetClockInfo": clock_info,
        "nvmlDeviceGetMaxClockInfo": max_clock_info,
        "nvmlDeviceGetMaxCustomerBoostClock": max_clock_info,
        "nvmlDeviceGetClock": clock,
        "nvmlDeviceGetMemoryInfo": memory_info,
        "nvmlDeviceGetMemoryInfo_v2": memory_info_v2,
        "nvmlDeviceGetBAR1MemoryInfo": bar1_memory_info,
        "nvmlDeviceGetUtilizationRates": utilization,
        "nvmlDeviceGetEncoderUtilization": _NO_ENGINE_USE,
        "nvmlDeviceGetDecoderUtilization": _NO_ENGINE_USE,
        "nvmlDeviceGetJpgUtilization": _NO_ENGINE_USE,
        "nvmlDeviceGetOfaUtilization": _NO_ENGINE_USE,
        "nvmlDeviceGetTemperature": temperature,
        "nvmlDeviceGetTemperatureV": temperature_v1,
        "nvmlDeviceGetTemperatureThreshold": temperature_threshold,
        "nvmlDeviceGetFanSpeed": unsupported,  # the simulated boards are cooled by the chassis
        "nvmlDeviceGetFanSpeed_v2": unsupported,
        "nvmlDeviceGetFanSpeedRPM": unsupported,
        "nvmlDeviceGetNumFans": constant(0),
        "nvmlDeviceGetPerformanceState": scalar(_performance_state),
        "nvmlDeviceGetPowerState": scalar(_performance_state),
        "nvmlDeviceGetCurrentClocksEventReasons": scalar(_event_reasons),
        "nvmlDeviceGetCurrentClocksThrottleReasons": scalar(_event_reasons),
        "nvmlDeviceGetSupportedClocksEventReasons": scalar(_supported_reasons),
        "nvmlDeviceGetSupportedClocksThrottleReasons": scalar(_supported_reasons),
        "nvmlDeviceGetTotalEccErrors": _no_ecc_errors,
        "nvmlDeviceGetMemoryErrorCounter": _no_memory_errors,
        "nvmlDeviceGetRemappedRows": _remapped_rows,
        "nvmlDeviceGetPcieThroughput": _pcie_throughput,
    }
)
