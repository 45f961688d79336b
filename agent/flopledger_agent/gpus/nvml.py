"""The NVIDIA driver through pynvml: the only importer of the binding.

`Nvml` turns calls into values in our units and the binding's exceptions into `DriverError`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import pynvml

from flopledger_agent.gpus.clock_samples import ClockSamples
from flopledger_agent.gpus.mig import MigDevice
from flopledger_agent.gpus.nvml_errors import (
    FUNCTION_NOT_FOUND,
    INVALID_ARGUMENT,
    NOT_FOUND,
    NOT_SUPPORTED,
    TIMED_OUT,
    DriverError,
)
from flopledger_agent.gpus.process_use import ProcessUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.gpus.gpm import Answers

P = ParamSpec("P")
R = TypeVar("R")
Handle: TypeAlias = Any  # the binding carries no annotations
GpmSampleBuffer: TypeAlias = Any
EventSet: TypeAlias = Any

KHZ_PER_MHZ: Final = 1000
NO_INSTANCE: Final = 0xFFFFFFFF  # of an event or a process: it concerns the whole GPU
# The profiles that differ in compute slices; the other ones are variants of these.
MIG_PROFILES: Final = (
    pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_2_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_3_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_4_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_6_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_7_SLICE,
    pynvml.NVML_GPU_INSTANCE_PROFILE_8_SLICE,
)
PCI_DEVICE_SHIFT: Final = 16  # pciDeviceId: device above, vendor below


def _code(error: Any) -> int:  # noqa: ANN401  (the binding sets the attribute by hand)
    return int(error.value)


# nvmlValueType_t -> the member of nvmlValue_t that holds a whole number.
_WHOLE_NUMBERS: Final[dict[int, str]] = {
    pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
}
NO_NUMBER: Final = -1  # of a kind we do not read: below every range, so absent with that reason


def _whole(value_type: int, value: Any) -> int:  # noqa: ANN401 (a union of the binding)
    member = _WHOLE_NUMBERS.get(int(value_type))
    return NO_NUMBER if member is None else int(getattr(value, member))


def _translated(call: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(call)
    def translated(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return call(*arguments, **named)
        except pynvml.NVMLError as error:
            raise DriverError(_code(error)) from error

    return translated


class GpmQuery:
    """One call for many GPM metrics: the request is built once and filled by the driver."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._request = pynvml.c_nvmlGpmMetricsGet_t()
        self._request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self._request.numMetrics = len(ids)
        metrics: Any = self._request.metrics
        for position, metric in enumerate(ids):
            metrics[position].metricId = metric
        # Reading field by field through ctypes costs more than the call: unpack the array at once.
        metric_type = pynvml.c_nvmlGpmMetric_t
        tail = ctypes.sizeof(metric_type) - metric_type.value.offset - struct.calcsize("d")
        self._layout = struct.Struct("=" + f"IId{tail}x" * len(ids))
        self._offset: int = pynvml.c_nvmlGpmMetricsGet_t.metrics.offset

    @_translated
    def answers(self, baseline: GpmSampleBuffer, newest: GpmSampleBuffer) -> Answers:
        """Every metric's return code and value over the two samples. Errors: DriverError."""
        self._request.sample1 = baseline
        self._request.sample2 = newest
        pynvml.nvmlGpmMetricsGet(self._request)
        flat = self._layout.unpack_from(self._request, self._offset)
        return dict(zip(flat[::3], zip(flat[1::3], flat[2::3], strict=True), strict=True))


class Nvml:
    """The driver's calls we use, in our units. Errors of every call: DriverError."""

    @_translated
    def open(self) -> str | None:
        """Load and initialise the library; the driver's version, None when it does not tell."""
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return None

    @_translated
    def shutdown(self) -> None:
        """Let go of the driver."""
        pynvml.nvmlShutdown()

    @_translated
    def count(self) -> int:
        """How many devices the driver sees."""
        return int(pynvml.nvmlDeviceGetCount())

    @_translated
    def handle_by_index(self, index: int) -> Handle:
        """The handle of the device at a position, which may change between boots."""
        return pynvml.nvmlDeviceGetHandleByIndex(index)

    @_translated
    def handle_by_uuid(self, uuid: str) -> Handle:
        """The handle of a device by the name that never changes."""
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)

    @_translated
    def uuid(self, handle: Handle) -> str:
        """GPU-..."""
        return str(pynvml.nvmlDeviceGetUUID(handle))

    @_translated
    def name(self, handle: Handle) -> str:
        """The product name."""
        return str(pynvml.nvmlDeviceGetName(handle))

    @_translated
    def pci_device_id(self, handle: Handle) -> str:
        """Four upper-case hex digits."""
        combined = int(pynvml.nvmlDeviceGetPciInfo_v3(handle).pciDeviceId)
        return f"{combined >> PCI_DEVICE_SHIFT:04X}"

    @_translated
    def pci_bus_id(self, handle: Handle) -> str:
        """Such as 00000000:65:00.0."""
        told = pynvml.nvmlDeviceGetPciInfo_v3(handle).busId
        return told.decode("ascii", "replace") if isinstance(told, bytes) else str(told)

    @_translated
    def minor(self, handle: Handle) -> int:
        """Of the device file, /dev/nvidia<minor>."""
        return int(pynvml.nvmlDeviceGetMinorNumber(handle))

    @_translated
    def index(self, handle: Handle) -> int:
        """The position in the driver's list, which may change between boots."""
        return int(pynvml.nvmlDeviceGetIndex(handle))

    @_translated
    def compute_capability(self, handle: Handle) -> str:
        """Such as 9.0."""
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return f"{major}.{minor}"

    @_translated
    def core_count(self, handle: Handle) -> int:
        """CUDA cores of the whole device."""
        return int(pynvml.nvmlDeviceGetNumGpuCores(handle))

    @_translated
    def energy_mj(self, handle: Handle) -> int:
        """Millijoules since the driver was loaded."""
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    @_translated
    def power_mw(self, handle: Handle) -> int:
        """Milliwatts; a mean over one second on most devices."""
        return int(pynvml.nvmlDeviceGetPowerUsage(handle))

    @_translated
    def module_power_mw(self, handle: Handle) -> int:
        """Milliwatts of a Grace part's whole module: the mean of a second, else of this instant."""
        ids = (pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_FI_DEV_POWER_INSTANT)
        scope = pynvml.NVML_POWER_SCOPE_MODULE
        code = NOT_FOUND
        for field in pynvml.nvmlDeviceGetFieldValues(handle, [(each, scope) for each in ids]):
            code = int(field.nvmlReturn)
            if code == 0:
                return _whole(field.valueType, field.value)
        raise DriverError(code)

    @_translated
    def sm_clock_khz(self, handle: Handle) -> int:
        """The SM clock now; NVML says MHz. The mark of an absent value is passed on as it is."""
        megahertz = int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return megahertz if megahertz == 2**32 - 1 else megahertz * KHZ_PER_MHZ

    @_translated
    def sm_clock_samples(self, handle: Handle, after_unix_us: int) -> ClockSamples | None:
        """The driver's buffered SM clocks newer than its stamp; None where there are none."""
        kind = pynvml.NVML_PROCESSOR_CLK_SAMPLES
        try:
            value_type, samples = pynvml.nvmlDeviceGetSamples(handle, kind, after_unix_us)
        except pynvml.NVMLError as error:
            if _code(error) != NOT_FOUND:
                raise
            return None
        newer = [sample for sample in samples if sample.timeStamp > after_unix_us]
        if not newer:
            return None
        return ClockSamples(
            newest_unix_us=max(sample.timeStamp for sample in newer),
            sm_clocks_khz=tuple(
                _whole(value_type, sample.sampleValue) * KHZ_PER_MHZ for sample in newer
            ),
        )

    @_translated
    def max_sm_clock_khz(self, handle: Handle) -> int:
        """The highest SM clock the device can be set to."""
        return int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)) * KHZ_PER_MHZ

    @_translated
    def utilization_percent(self, handle: Handle) -> int:
        """Share of time in which anything ran, over the driver's own last sample period."""
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    @_translated
    def process_uses(self, handle: Handle, after_unix_us: int) -> tuple[ProcessUse, ...]:
        """Processes that used the SMs after the driver's stamp; none where there is nothing new."""
        try:
            samples = pynvml.nvmlDeviceGetProcessUtilization(handle, after_unix_us)
        except pynvml.NVMLError as error:
            if _code(error) != NOT_FOUND:
                raise
            return ()
        return tuple(
            ProcessUse(
                pid=int(sample.pid), unix_us=int(sample.timeStamp), sm_percent=int(sample.smUtil)
            )
            for sample in samples
        )

    def compute_pids(self, handle: Handle, gpu_instance: int | None = None) -> tuple[int, ...]:
        """Processes with a compute context, sorted; only those of a GPU instance if it is named."""
        return self._pids(
            handle,
            gpu_instance,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
        )

    def mps_pids(self, handle: Handle, gpu_instance: int | None = None) -> tuple[int, ...]:
        """Processes that compute through an MPS server, sorted; `gpu_instance` as above."""
        return self._pids(
            handle,
            gpu_instance,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
        )

    @_translated
    def _pids(
        self,
        handle: Handle,
        gpu_instance: int | None,
        newer: Callable[[Handle], Any],
        older: Callable[[Handle], Any],
    ) -> tuple[int, ...]:
        try:
            infos = newer(handle)
        except pynvml.NVMLError as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
            infos = older(handle)
        pids = {
            int(info.pid)
            for info in infos
            if gpu_instance is None or int(info.gpuInstanceId) in {gpu_instance, NO_INSTANCE}
        }
        return tuple(sorted(pids - {0}))

    @_translated
    def mig_enabled(self, handle: Handle) -> bool:
        """Whether the GPU is partitioned now."""
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)

    @_translated
    def mig_profiles(self, handle: Handle) -> dict[int, int]:
        """SMs by compute slices of the GPU instances that can be made."""
        profiles: dict[int, int] = {}
        for profile in MIG_PROFILES:
            try:
                info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, profile, version=1)
            except pynvml.NVMLError as error:
                if _code(error) not in {NOT_SUPPORTED, INVALID_ARGUMENT}:
                    raise  # another profile than this one is no reason to say that there is none
            else:
                profiles[int(info.sliceCount)] = int(info.multiprocessorCount)
        return profiles

    @_translated
    def mig_handles(self, handle: Handle) -> list[Handle]:
        """Handles of the GPU's MIG devices, which are its compute instances."""
        handles: list[Handle] = []
        for index in range(int(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))):
            try:
                handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
            except pynvml.NVMLError as error:
                if _code(error) != NOT_FOUND:
                    raise
        return handles

    @_translated
    def mig_device(self, handle: Handle) -> MigDevice:
        """What a MIG device is part of, and how large it is."""
        attributes = pynvml.nvmlDeviceGetAttributes_v2(handle)
        return MigDevice(
            gpu_instance=int(pynvml.nvmlDeviceGetGpuInstanceId(handle)),
            sm_count=int(attributes.multiprocessorCount),
            gpu_slices=int(attributes.gpuInstanceSliceCount),
            compute_slices=int(attributes.computeInstanceSliceCount),
        )

    @_translated
    def event_set(self) -> EventSet:
        """Room for reports of the driver."""
        return pynvml.nvmlEventSetCreate()

    @_translated
    def register_xids(self, handle: Handle, events: EventSet) -> None:
        """Have a device's XID errors reported from now on."""
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)

    @_translated
    def next_xid(self, events: EventSet) -> tuple[int, int, int | None] | None:
        """Handle key, XID and GPU instance of the next report; None when there is none now."""
        try:
            data = pynvml.nvmlEventSetWait_v2(events, 0)
        except pynvml.NVMLError as error:
            if _code(error) == TIMED_OUT:
                return None
            raise
        instance = int(data.gpuInstanceId)
        whole = instance == NO_INSTANCE
        return self.handle_key(data.device), int(data.eventData), None if whole else instance

    @_translated
    def free_events(self, events: EventSet) -> None:
        """Give the room back."""
        pynvml.nvmlEventSetFree(events)

    def handle_key(self, handle: Handle) -> int:
        """What tells handles apart: two of one device are two objects in Python."""
        return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)

    @_translated
    def gpm_supported(self, handle: Handle) -> bool:
        """Whether the device offers GPU performance monitoring."""
        return bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)

    @_translated
    def gpm_allocate(self) -> GpmSampleBuffer:
        """Room for one GPM sample."""
        return pynvml.nvmlGpmSampleAlloc()

    @_translated
    def gpm_free(self, buffer: GpmSampleBuffer) -> None:
        """Give the room back."""
        pynvml.nvmlGpmSampleFree(buffer)

    @_translated
    def gpm_sample(self, handle: Handle, buffer: GpmSampleBuffer) -> None:
        """Freeze the device's counters into `buffer`."""
        pynvml.nvmlGpmSampleGet(handle, buffer)

    @_translated
    def gpm_mig_sample(self, handle: Handle, gpu_instance: int, buffer: GpmSampleBuffer) -> None:
        """Freeze the counters of one GPU instance of a partitioned GPU into `buffer`."""
        pynvml.nvmlGpmMigSampleGet(handle, gpu_instance, buffer)

    def gpm_query(self, ids: tuple[int, ...]) -> GpmQuery:
        """A call for these metrics; ids the driver lacks answer with an error of their own."""
        return GpmQuery(ids)
