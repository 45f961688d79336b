"""NVML functions of the node, and those that find devices.

A device that vanished is not counted, so indices after it move up; a lost one keeps its index and
answers GPU_IS_LOST. Handles stay valid for the life of the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

import pynvml

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.functions.answers import (
    INSUFFICIENT_SIZE,
    INVALID_ARGUMENT,
    NOT_FOUND,
    SUCCESS,
)
from flopledger_agent.gpus.simulated.functions.gpm import metrics_get, sample_alloc, sample_free
from flopledger_agent.gpus.simulated.marshalling import (
    CArgument,
    number,
    target,
    text,
    write_handle,
    write_text,
)

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver

SystemFunction: TypeAlias = Callable[..., int]  # (driver, *C arguments) -> NVML code
PROCESS_NAME_MAX: Final = 1024
PCI_ID_PARTS: Final = 3  # domain (may be left out), bus, device.function


def driver_version(driver: SimulatedDriver, buffer: CArgument, length: CArgument) -> int:
    """Answer nvmlSystemGetDriverVersion."""
    fits = write_text(driver.scenario.driver_version, buffer, length)
    return SUCCESS if fits else INSUFFICIENT_SIZE


def nvml_version(driver: SimulatedDriver, buffer: CArgument, length: CArgument) -> int:
    """Answer nvmlSystemGetNVMLVersion."""
    fits = write_text(driver.scenario.nvml_version, buffer, length)
    return SUCCESS if fits else INSUFFICIENT_SIZE


def driver_branch(driver: SimulatedDriver, info: CArgument, length: CArgument) -> int:
    """nvmlSystemDriverBranchInfo_v1_t."""
    branch = f"r{driver.scenario.driver_version.partition('.')[0]}_00"
    if len(branch) + 1 > number(length):
        return INSUFFICIENT_SIZE
    target(info).branch = branch.encode()
    return SUCCESS


def cuda_version(driver: SimulatedDriver, out: CArgument) -> int:
    """Answer nvmlSystemGetCudaDriverVersion."""
    target(out).value = driver.scenario.cuda_version
    return SUCCESS


def process_name(
    driver: SimulatedDriver, pid: CArgument, buffer: CArgument, length: CArgument
) -> int:
    """Answer nvmlSystemGetProcessName for processes of the scenario, cut to the buffer."""
    for process in driver.scenario.processes.values():
        if process.pid == number(pid):
            name = process.command[: min(PROCESS_NAME_MAX, number(length)) - 1]
            return SUCCESS if write_text(name, buffer, length) else INSUFFICIENT_SIZE
    return NOT_FOUND


def count(driver: SimulatedDriver, out: CArgument) -> int:
    """Answer nvmlDeviceGetCount."""
    target(out).value = len(driver.visible_devices())
    return SUCCESS


def _hand_out(driver: SimulatedDriver, device: Device | None, name: str, out: CArgument) -> int:
    if device is None:
        return NOT_FOUND
    code = driver.fault_code(name, device.faults)
    if code == SUCCESS:
        write_handle(out, device.address)
    return code


def handle_by_index(driver: SimulatedDriver, index: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetHandleByIndex_v2."""
    devices = driver.visible_devices()
    if not 0 <= number(index) < len(devices):
        return INVALID_ARGUMENT
    return _hand_out(driver, devices[number(index)], "nvmlDeviceGetHandleByIndex_v2", out)


def handle_by_uuid(driver: SimulatedDriver, uuid: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetHandleByUUID."""
    wanted = text(uuid)
    found = next((d for d in driver.visible_devices() if d.gpu.uuid == wanted), None)
    return _hand_out(driver, found, "nvmlDeviceGetHandleByUUID", out)


def handle_by_uuid_value(driver: SimulatedDriver, uuid: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetHandleByUUIDV, for text UUIDs."""
    value = target(uuid)
    if value.type != pynvml.NVML_UUID_TYPE_ASCII:
        return INVALID_ARGUMENT
    return handle_by_uuid(driver, value.value.str, out)


def handle_by_serial(driver: SimulatedDriver, serial: CArgument, out: CArgument) -> int:
    """Answer nvmlDeviceGetHandleBySerial."""
    wanted = text(serial)
    found = next((d for d in driver.visible_devices() if d.gpu.serial == wanted), None)
    return _hand_out(driver, found, "nvmlDeviceGetHandleBySerial", out)


def handle_by_pci_bus_id(driver: SimulatedDriver, bus_id: CArgument, out: CArgument) -> int:
    """nvmlDeviceGetHandleByPciBusId_v2: [domain:]bus:device.function, in hex."""
    head, _, function = text(bus_id).partition(".")
    try:
        parts = [int(part, 16) for part in head.split(":")]
        place = ([0] * (PCI_ID_PARTS - len(parts)) + parts, int(function or "0", 16))
    except ValueError:
        return INVALID_ARGUMENT
    found = next(
        (d for d in driver.visible_devices() if ([0, d.pci_bus, 0], 0) == place),
        None,
    )
    return _hand_out(driver, found, "nvmlDeviceGetHandleByPciBusId_v2", out)


FUNCTIONS: Final[Mapping[str, SystemFunction]] = MappingProxyType(
    {
        "nvmlSystemGetDriverVersion": driver_version,
        "nvmlSystemGetNVMLVersion": nvml_version,
        "nvmlSystemGetDriverBranch": driver_branch,
        "nvmlSystemGetCudaDriverVersion": cuda_version,
        "nvmlSystemGetCudaDriverVersion_v2": cuda_version,
        "nvmlSystemGetProcessName": process_name,
        "nvmlDeviceGetCount_v2": count,
        "nvmlDeviceGetHandleByIndex_v2": handle_by_index,
        "nvmlDeviceGetHandleByUUID": handle_by_uuid,
        "nvmlDeviceGetHandleByUUIDV": handle_by_uuid_value,
        "nvmlDeviceGetHandleBySerial": handle_by_serial,
        "nvmlDeviceGetHandleByPciBusId_v2": handle_by_pci_bus_id,
        "nvmlGpmSampleAlloc": sample_alloc,
        "nvmlGpmSampleFree": sample_free,
        "nvmlGpmMetricsGet": metrics_get,
    }
)
