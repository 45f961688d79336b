"""Which processes are on a device, and how much of it each used.

A process is listed while a phase names it (as of just before the instant). All are compute
processes; memory and SM time are split by the phase's shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Final

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.functions.answers import (
    INSUFFICIENT_SIZE,
    NOT_FOUND,
    SUCCESS,
    DeviceFunction,
)
from flopledger_agent.gpus.simulated.marshalling import CArgument, number, target

NO_INSTANCE: Final = 0xFFFFFFFF
PERCENT: Final = 100
# A driver keeps only recent samples: an older question is answered for this long a time.
SAMPLES_KEPT_NS: Final = 60_000_000_000
WINDOW_WITHOUT_STAMP_NS: Final = 1_000_000_000


def compute_processes(device: Device, now_ns: int, count: CArgument, infos: CArgument) -> int:
    """Answer nvmlDeviceGetComputeRunningProcesses, in its v2/v3 layout."""
    holders = device.schedule.segment_before(now_ns).holders
    size = target(count)
    room = size.value
    size.value = len(holders)
    if not holders:
        return SUCCESS
    if infos is None or room < len(holders):
        return INSUFFICIENT_SIZE
    for info, (name, memory_bytes) in zip(target(infos), holders, strict=False):
        info.pid = device.processes[name].pid
        info.usedGpuMemory = memory_bytes
        info.gpuInstanceId = NO_INSTANCE
        info.computeInstanceId = NO_INSTANCE
    return SUCCESS


def no_processes(_device: Device, _now_ns: int, count: CArgument, _infos: CArgument) -> int:
    """No graphics and no MPS processes in any scenario."""
    target(count).value = 0
    return SUCCESS


def used_percents(device: Device, since_ns: int, now_ns: int) -> dict[str, tuple[int, int]]:
    """SM and memory use by process over a window, in whole percents; only those above zero."""
    window_ns = now_ns - since_ns
    used: dict[str, tuple[Fraction, Fraction]] = {}
    for segment, length_ns in device.schedule.between(since_ns, now_ns):
        phase = segment.phase
        for name, share in phase.owners:
            part = share * Fraction(length_ns, window_ns)
            sm, memory = used.get(name, (Fraction(0), Fraction(0)))
            used[name] = (sm + part * phase.sm_active, memory + part * phase.dram_active)
    return {
        name: (round(sm * PERCENT), round(memory * PERCENT))
        for name, (sm, memory) in used.items()
        if sm or memory
    }


def _window_start(device: Device, now_ns: int, last_seen_unix_us: int) -> int:
    if last_seen_unix_us == 0:
        return max(0, now_ns - WINDOW_WITHOUT_STAMP_NS)
    return max(device.since_unix_us(last_seen_unix_us), now_ns - SAMPLES_KEPT_NS)


def process_utilization(
    device: Device, now_ns: int, samples: CArgument, count: CArgument, last_seen: CArgument
) -> int:
    """Answer nvmlDeviceGetProcessUtilization: a sample per process that used the device."""
    used = used_percents(device, _window_start(device, now_ns, number(last_seen)), now_ns)
    size = target(count)
    room = size.value
    size.value = len(used)
    if not used:
        return NOT_FOUND
    if samples is None or room < len(used):
        return INSUFFICIENT_SIZE
    for sample, (name, (sm, memory)) in zip(target(samples), used.items(), strict=False):
        sample.pid = device.processes[name].pid
        sample.timeStamp = device.unix_us(now_ns)
        sample.smUtil, sample.memUtil = sm, memory
        sample.encUtil, sample.decUtil = 0, 0
    return SUCCESS


def processes_utilization_info(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlProcessesUtilizationInfo_v1_t: the same in its newer form."""
    info = target(out)
    since_ns = _window_start(device, now_ns, info.lastSeenTimeStamp)
    used = used_percents(device, since_ns, now_ns)
    room = info.processSamplesCount
    info.processSamplesCount = len(used)
    if not used:
        return NOT_FOUND
    if not info.procUtilArray or room < len(used):
        return INSUFFICIENT_SIZE
    for position, (name, (sm, memory)) in enumerate(used.items()):
        sample = info.procUtilArray[position]
        sample.pid = device.processes[name].pid
        sample.timeStamp = device.unix_us(now_ns)
        sample.smUtil, sample.memUtil = sm, memory
        sample.encUtil, sample.decUtil, sample.jpgUtil, sample.ofaUtil = 0, 0, 0, 0
    return SUCCESS


def process_detail_list(device: Device, now_ns: int, out: CArgument) -> int:
    """nvmlProcessDetailList_t."""
    details = target(out)
    compute = details.mode in (pynvml.NVML_PROCESS_MODE_COMPUTE, pynvml.NVML_PROCESS_MODE_ALL)
    holders = device.schedule.segment_before(now_ns).holders if compute else ()
    room = details.numProcArrayEntries
    details.numProcArrayEntries = len(holders)
    if not holders:
        return SUCCESS
    if not details.procArray or room < len(holders):
        return INSUFFICIENT_SIZE
    for position, (name, memory_bytes) in enumerate(holders):
        entry = details.procArray[position]
        entry.pid = device.processes[name].pid
        entry.usedGpuMemory = memory_bytes
        entry.gpuInstanceId, entry.computeInstanceId = NO_INSTANCE, NO_INSTANCE
        entry.usedGpuCcProtectedMemory = 0
    return SUCCESS


FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {
        "nvmlDeviceGetComputeRunningProcesses_v2": compute_processes,
        "nvmlDeviceGetComputeRunningProcesses_v3": compute_processes,
        "nvmlDeviceGetGraphicsRunningProcesses_v2": no_processes,
        "nvmlDeviceGetGraphicsRunningProcesses_v3": no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v2": no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v3": no_processes,
        "nvmlDeviceGetProcessUtilization": process_utilization,
        "nvmlDeviceGetProcessesUtilizationInfo": processes_utilization_info,
        "nvmlDeviceGetRunningProcessDetailList": process_detail_list,
    }
)
