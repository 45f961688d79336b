"""Which device this is: names, numbers, PCI place, architecture and fixed modes.

Only facts that cannot change during a scenario; whatever varies is in `readings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import pynvml

from flopledger_agent.gpus.simulated.devices import NVIDIA_PCI_VENDOR, Device
from flopledger_agent.gpus.simulated.functions.answers import (
    SUCCESS,
    DeviceFunction,
    c_text,
    constant,
    fixed,
    forbidden,
    pair,
    scalar,
    unsupported,
)
from flopledger_agent.gpus.simulated.marshalling import CArgument, target

DISABLED: Final = 0
ENABLED: Final = 1
PCIE_GENERATION: Final = 5
PCIE_WIDTH: Final = 16
PCIE_MBPS_PER_LANE: Final = 32_000


def _brand(device: Device, _now_ns: int) -> int:
    tesla = device.gpu.model.startswith(("Tesla", "NVIDIA"))
    brand: int = pynvml.NVML_BRAND_NVIDIA if tesla else pynvml.NVML_BRAND_UNKNOWN
    return brand


def pci_info(device: Device, _now_ns: int, out: CArgument) -> int:
    """nvmlPciInfo_t."""
    info = target(out)
    info.domain = 0
    info.bus = device.pci_bus
    info.device = 0
    info.pciDeviceId = device.gpu.pci_device_id << 16 | NVIDIA_PCI_VENDOR
    info.pciSubSystemId = NVIDIA_PCI_VENDOR
    info.busIdLegacy = device.pci_bus_id[4:].encode()
    info.busId = device.pci_bus_id.encode()
    return SUCCESS


FUNCTIONS: Final[Mapping[str, DeviceFunction]] = MappingProxyType(
    {
        "nvmlDeviceGetName": c_text(lambda device: device.gpu.model),
        "nvmlDeviceGetUUID": c_text(lambda device: device.gpu.uuid),
        "nvmlDeviceGetSerial": c_text(lambda device: device.gpu.serial),
        "nvmlDeviceGetVbiosVersion": c_text(lambda _device: "96.00.74.00.01"),
        "nvmlDeviceGetBoardPartNumber": c_text(lambda _device: "900-00000-0000-000"),
        "nvmlDeviceGetMinorNumber": scalar(lambda device, _now_ns: device.position),
        "nvmlDeviceGetModuleId": scalar(lambda device, _now_ns: device.position),
        "nvmlDeviceGetBoardId": scalar(lambda device, _now_ns: device.pci_bus << 8),
        "nvmlDeviceGetMultiGpuBoard": constant(0),
        "nvmlDeviceGetBrand": scalar(_brand),
        "nvmlDeviceGetArchitecture": scalar(lambda device, _now_ns: device.gpu.architecture),
        "nvmlDeviceGetCudaComputeCapability": pair(
            lambda device, _now_ns: device.gpu.compute_capability[0],
            lambda device, _now_ns: device.gpu.compute_capability[1],
        ),
        "nvmlDeviceGetNumGpuCores": scalar(
            lambda device, _now_ns: device.gpu.sm_count * device.gpu.cores_per_sm
        ),
        "nvmlDeviceGetPciInfo_v3": pci_info,
        "nvmlDeviceGetBusType": constant(pynvml.NVML_BUS_TYPE_PCIE),
        "nvmlDeviceGetCurrPcieLinkGeneration": constant(PCIE_GENERATION),
        "nvmlDeviceGetMaxPcieLinkGeneration": constant(PCIE_GENERATION),
        "nvmlDeviceGetGpuMaxPcieLinkGeneration": constant(PCIE_GENERATION),
        "nvmlDeviceGetCurrPcieLinkWidth": constant(PCIE_WIDTH),
        "nvmlDeviceGetMaxPcieLinkWidth": constant(PCIE_WIDTH),
        "nvmlDeviceGetPcieSpeed": constant(PCIE_MBPS_PER_LANE),
        "nvmlDeviceGetPcieReplayCounter": constant(0),
        "nvmlDeviceGetDisplayMode": constant(DISABLED),
        "nvmlDeviceGetDisplayActive": constant(DISABLED),
        "nvmlDeviceGetPersistenceMode": constant(ENABLED),
        "nvmlDeviceGetComputeMode": constant(pynvml.NVML_COMPUTEMODE_DEFAULT),
        "nvmlDeviceGetEccMode": pair(fixed(ENABLED), fixed(ENABLED)),
        "nvmlDeviceGetDefaultEccMode": constant(ENABLED),
        "nvmlDeviceGetAccountingMode": constant(DISABLED),
        "nvmlDeviceGetAccountingBufferSize": constant(4000),
        "nvmlDeviceGetAccountingStats": unsupported,
        "nvmlDeviceGetAccountingPids": unsupported,
        "nvmlDeviceGetVirtualizationMode": constant(pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE),
        "nvmlDeviceGetDriverModel": unsupported,  # Windows only
        "nvmlDeviceGetDriverModel_v2": unsupported,
        "nvmlDeviceGetGpuOperationMode": unsupported,
        "nvmlDeviceGetConfComputeMemSizeInfo": unsupported,
        "nvmlDeviceIsMigDeviceHandle": constant(0),
        "nvmlDeviceGetBridgeChipInfo": unsupported,
        "nvmlDeviceSetPersistenceMode": forbidden,
        "nvmlDeviceSetComputeMode": forbidden,
        "nvmlDeviceSetEccMode": forbidden,
        "nvmlDeviceSetAccountingMode": forbidden,
        "nvmlDeviceSetMigMode": forbidden,
        "nvmlDeviceSetPowerManagementLimit": forbidden,
        "nvmlDeviceSetGpuLockedClocks": forbidden,
        "nvmlDeviceResetGpuLockedClocks": forbidden,
        "nvmlDeviceSetApplicationsClocks": forbidden,
        "nvmlDeviceResetApplicationsClocks": forbidden,
        "nvmlGpmSetStreamingEnabled": forbidden,
    }
)
