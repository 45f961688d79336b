"""Partitioned GPUs (MIG): its mode, its MIG devices, and what their handles answer.

A MIG device is a compute instance. Handles of a destroyed one answer NOT_FOUND. What a driver does
not offer while MIG is on (utilisation, core count, use by process) is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import pynvml

from flopledger_agent.gpus.simulated.devices import Device, MigHandle
from flopledger_agent.gpus.simulated.functions.answers import (
    INSUFFICIENT_SIZE,
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    SUCCESS,
    DeviceFunction,
    unsupported,
)
from flopledger_agent.gpus.simulated.functions.gpm import freeze
from flopledger_agent.gpus.simulated.functions.processes import no_processes
from flopledger_agent.gpus.simulated.marshalling import (
    CArgument,
    number,
    target,
    write_handle,
    write_text,
)

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver

MigFunction: TypeAlias = Callable[..., int]  # (MIG handle, now_ns, *C arguments) -> NVML code
MIG_SINCE: Final = (8, 0)  # MIG came with Ampere
MIB_PER_GIB: Final = 1024
# Profile numbers -> compute slices; the others are variants of these.
PROFILE_SLICES: Final[Mapping[int, int]] = MappingProxyType(
    {
        pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE: 1,
        pynvml.NVML_GPU_INSTANCE_PROFILE_2_SLICE: 2,
        pynvml.NVML_GPU_INSTANCE_PROFILE_3_SLICE: 3,
        pynvml.NVML_GPU_INSTANCE_PROFILE_4_SLICE: 4,
        pynvml.NVML_GPU_INSTANCE_PROFILE_6_SLICE: 6,
        pynvml.NVML_GPU_INSTANCE_PROFILE_7_SLICE: 7,
        pynvml.NVML_GPU_INSTANCE_PROFILE_8_SLICE: 8,
    }
)


def mig_mode(device: Device, now_ns: int, current: CArgument, pending: CArgument) -> int:
    """Answer nvmlDeviceGetMigMode."""
    if device.gpu.compute_capability < MIG_SINCE:
        return NOT_SUPPORTED
    mode = int(device.gpu.mig.enabled(now_ns))
    target(current).value = target(pending).value = mode
    return SUCCESS


def max_mig_devices(device: Device, _now_ns: int, out: CArgument) -> int:
    """Answer nvmlDeviceGetMaxMigDeviceCount: one for each slice, 0 without MIG."""
    capable = device.gpu.compute_capability >= MIG_SINCE
    target(out).value = device.gpu.mig.slices if capable else 0
    return SUCCESS


def mig_handle(device: Device, now_ns: int, index: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetMigDeviceHandleByIndex."""
    if not device.gpu.mig.enabled(now_ns):
        return NOT_SUPPORTED
    living = [
        handle
        for placed in device.instances
        if placed.spec.alive(now_ns)
        for handle in placed.handles
    ]
    if not 0 <= number(index) < device.gpu.mig.slices:
        return INVALID_ARGUMENT
    if number(index) >= len(living):
        return NOT_FOUND
    write_handle(out, living[number(index)].address)
    return SUCCESS


def profile_info(device: Device, _now_ns: int, profile: CArgument, out: CArgument) -> int:
    """nvmlGpuInstanceProfileInfo_t and its second version: the plain profiles."""
    slices = PROFILE_SLICES.get(number(profile), 0)
    whole = device.gpu.mig.slices
    sms = device.gpu.mig.sms_by_slices.get(slices)
    if device.gpu.compute_capability < MIG_SINCE or sms is None:
        return NOT_SUPPORTED
    info = target(out)
    info.id = number(profile)
    info.sliceCount = slices
    info.instanceCount = whole // slices
    written = (item.spec.sm_count for item in device.instances if item.spec.slices == slices)
    info.multiprocessorCount = next(written, sms)
    info.memorySizeMB = device.gpu.memory_mib * slices // whole
    return SUCCESS


def mig_sample_get(
    device: Device,
    now_ns: int,
    driver: SimulatedDriver,
    instance: CArgument,
    handle: CArgument,
) -> int:
    """Answer nvmlGpmMigSampleGet: the counters of one living GPU instance."""
    if device.gpu.gpm == "none" or not device.gpu.mig.enabled(now_ns):
        return NOT_SUPPORTED
    for placed in device.instances:
        if placed.spec.instance_id == number(instance) and placed.spec.alive(now_ns):
            code = driver.fault_code("nvmlGpmMigSampleGet", placed.spec.faults)
            return code or freeze(placed.device, now_ns, driver, handle)
    return INVALID_ARGUMENT


def without_mig(function: DeviceFunction) -> DeviceFunction:
    """A function that a driver refuses while MIG is on."""

    def call(device: Device, now_ns: int, *arguments: CArgument) -> int:
        if device.gpu.mig.enabled(now_ns):
            return NOT_SUPPORTED
        return function(device, now_ns, *arguments)

    return call


def _id(read: Callable[[MigHandle], int]) -> MigFunction:
    def call(mig: MigHandle, _now_ns: int, out: CArgument) -> int:
        target(out).value = read(mig)
        return SUCCESS

    return call


def _attributes(mig: MigHandle, _now_ns: int, out: CArgument) -> int:
    spec, gpu = mig.instance.spec, mig.parent.gpu
    attributes = target(out)
    attributes.multiprocessorCount = spec.sm_count // max(1, spec.compute_instance_count)
    attributes.gpuInstanceSliceCount = spec.slices
    attributes.computeInstanceSliceCount = spec.slices // max(1, spec.compute_instance_count)
    attributes.memorySizeMB = gpu.memory_mib * spec.slices // gpu.mig.slices
    return SUCCESS


def _parent(mig: MigHandle, _now_ns: int, out: CArgument) -> int:
    write_handle(out, mig.parent.address)
    return SUCCESS


def _uuid(mig: MigHandle, _now_ns: int, buffer: CArgument, length: CArgument) -> int:
    return SUCCESS if write_text(mig.uuid, buffer, length) else INSUFFICIENT_SIZE


def _name(mig: MigHandle, _now_ns: int, buffer: CArgument, length: CArgument) -> int:
    spec, gpu = mig.instance.spec, mig.parent.gpu
    gib = gpu.memory_mib * spec.slices // gpu.mig.slices // MIB_PER_GIB
    name = f"{gpu.model} MIG {spec.slices}g.{gib}gb"
    return SUCCESS if write_text(name, buffer, length) else INSUFFICIENT_SIZE


def _processes(mig: MigHandle, now_ns: int, count: CArgument, infos: CArgument) -> int:
    """The processes of the GPU instance, by turns in its compute instances."""
    placed = mig.instance
    holders = placed.device.schedule.segment_before(now_ns).holders
    mine = holders[mig.compute_instance :: max(1, placed.spec.compute_instance_count)]
    size = target(count)
    room = size.value
    size.value = len(mine)
    if not mine:
        return SUCCESS
    if infos is None or room < len(mine):
        return INSUFFICIENT_SIZE
    for info, (name, memory_bytes) in zip(target(infos), mine, strict=False):
        info.pid = mig.parent.processes[name].pid
        info.usedGpuMemory = memory_bytes
        info.gpuInstanceId = placed.spec.instance_id
        info.computeInstanceId = mig.compute_instance
    return SUCCESS


def _no_processes(mig: MigHandle, now_ns: int, count: CArgument, infos: CArgument) -> int:
    return no_processes(mig.parent, now_ns, count, infos)


FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {
        "nvmlDeviceGetMigMode": mig_mode,
        "nvmlDeviceGetMaxMigDeviceCount": max_mig_devices,
        "nvmlDeviceGetMigDeviceHandleByIndex": mig_handle,
        "nvmlDeviceGetGpuInstanceProfileInfo": profile_info,
        "nvmlDeviceGetGpuInstanceProfileInfoV": profile_info,
        "nvmlDeviceGetGpuInstanceId": unsupported,  # of MIG handles only, as the next ones
        "nvmlDeviceGetComputeInstanceId": unsupported,
        "nvmlDeviceGetAttributes_v2": unsupported,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": unsupported,
    }
)
"""What a GPU's handle answers."""

REFUSED_WITH_MIG: Final = frozenset(
    {
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetNumGpuCores",
        "nvmlDeviceGetProcessUtilization",
        "nvmlDeviceGetProcessesUtilizationInfo",
        "nvmlGpmSampleGet",  # what it counts on a partitioned GPU is documented by nobody
    }
)

MIG_FUNCTIONS: Final[Mapping[str, MigFunction]] = MappingProxyType(
    {
        "nvmlDeviceIsMigDeviceHandle": _id(lambda _mig: 1),
        "nvmlDeviceGetGpuInstanceId": _id(lambda mig: mig.instance.spec.instance_id),
        "nvmlDeviceGetComputeInstanceId": _id(lambda mig: mig.compute_instance),
        "nvmlDeviceGetAttributes_v2": _attributes,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": _parent,
        "nvmlDeviceGetUUID": _uuid,
        "nvmlDeviceGetName": _name,
        "nvmlDeviceGetComputeRunningProcesses_v2": _processes,
        "nvmlDeviceGetComputeRunningProcesses_v3": _processes,
        "nvmlDeviceGetGraphicsRunningProcesses_v3": _no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v2": _no_processes,
        "nvmlDeviceGetMPSComputeRunningProcesses_v3": _no_processes,
    }
)
"""What a MIG device's handle answers."""
