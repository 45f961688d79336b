"""The NVIDIA driver through pynvml: the only importer of the binding.

`Nvml` turns calls into values in our units and the binding's exceptions into `DriverError`.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypeVar

import pynvml

from flopledger_agent.gpus.nvml_errors import FUNCTION_NOT_FOUND, DriverError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.gpus.gpm import Answers

P = ParamSpec("P")
R = TypeVar("R")
Handle: TypeAlias = Any  # the binding carries no annotations
GpmSampleBuffer: TypeAlias = Any

KHZ_PER_MHZ: Final = 1000
PCI_DEVICE_SHIFT: Final = 16  # pciDeviceId: device above, vendor below


def _code(error: Any) -> int:  # noqa: ANN401  (the binding sets the attribute by hand)
    return int(error.value)


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
    def sm_clock_khz(self, handle: Handle) -> int:
        """The SM clock now; NVML says MHz. The mark of an absent value is passed on as it is."""
        megahertz = int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return megahertz if megahertz == 2**32 - 1 else megahertz * KHZ_PER_MHZ

    @_translated
    def max_sm_clock_khz(self, handle: Handle) -> int:
        """The highest SM clock the device can be set to."""
        return int(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)) * KHZ_PER_MHZ

    @_translated
    def utilization_percent(self, handle: Handle) -> int:
        """Share of time in which anything ran, over the driver's own last sample period."""
        return int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    def compute_pids(self, handle: Handle) -> tuple[int, ...]:
        """Processes with a compute context, sorted."""
        return self._pids(
            handle,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
        )

    def mps_pids(self, handle: Handle) -> tuple[int, ...]:
        """Processes that compute through an MPS server, sorted."""
        return self._pids(
            handle,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
            pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
        )

    @_translated
    def _pids(
        self, handle: Handle, newer: Callable[[Handle], Any], older: Callable[[Handle], Any]
    ) -> tuple[int, ...]:
        try:
            infos = newer(handle)
        except pynvml.NVMLError as error:
            if _code(error) != FUNCTION_NOT_FOUND:
                raise
            infos = older(handle)
        return tuple(sorted({int(info.pid) for info in infos if info.pid}))

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

    def gpm_query(self, ids: tuple[int, ...]) -> GpmQuery:
        """A call for these metrics; ids the driver lacks answer with an error of their own."""
        return GpmQuery(ids)
