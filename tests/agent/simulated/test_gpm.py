"""GPM through pynvml: exact percentages, exact cumulative cycles, the right refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_core.records import PIPES
from tests.agent.simulated.worlds import H100, nvml, read_metrics, sample, simulated

CYCLES = {
    "any_tensor": 250,
    "dmma": 251,
    "hmma": 252,
    "imma": 253,
    "dfma": 254,
    "integer": 257,
    "fp64": 258,
    "fp32": 259,
    "fp16": 260,
}
PERCENTS = {
    "integer": 4,
    "any_tensor": 5,
    "dfma": 6,
    "hmma": 7,
    "dmma": 8,
    "imma": 9,
    "fp64": 11,
    "fp32": 12,
    "fp16": 13,
}


@settings(deadline=None)
@given(st.integers(0, 20 * 10**9), st.integers(1, 20 * 10**9))
def test_every_metric_is_the_exact_integral(start_ns: int, length_ns: int) -> None:
    """Percentages are the nearest double of the ratio; cycles are whole and rounded down."""
    with simulated() as (driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.elapsed_ns = start_ns
        first = sample(handle)
        begin_ns = clock.boottime_ns()
        clock.elapsed_ns += length_ns
        second = sample(handle)
        window = driver.truth_between(begin_ns, clock.boottime_ns()).gpus[0].whole
        total = driver.truth(clock.boottime_ns()).gpus[0].whole
        for pipe in PIPES:
            (_, percent), (_, cycles) = read_metrics(first, second, PERCENTS[pipe], CYCLES[pipe])
            ratio = Fraction(window.active_cycles[pipe], window.elapsed_cycles)
            assert percent == float(100 * ratio)
            assert cycles == float(total.active_cycles[pipe].__floor__())
        (_, active), (_, elapsed) = read_metrics(first, second, 2, 248)
        assert active == float(100 * window.sm_active_cycles / window.elapsed_cycles)
        assert elapsed == float(total.elapsed_cycles.__floor__())


def test_mean_scale_counts_per_sm() -> None:
    """What id 248 counts is the scenario's choice: summed over SMs or their average."""
    with simulated(H100.replace('HBM3"', 'HBM3"\ncycle_scale = "mean"')) as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        first = sample(handle)
        clock.advance(2)
        assert read_metrics(first, sample(handle), 248) == [(0, 2 * 1_755_000_000.0)]


def test_metrics_not_offered_carry_their_own_code() -> None:
    """The call succeeds; each metric says for itself."""
    with simulated(f'driver_version = "580.10.1"\n{H100}') as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        first = sample(handle)
        clock.advance(1)
        codes = [code for code, _ in read_metrics(first, sample(handle), 5, 248, 20, 9999, 1)]
        assert codes == [0, 3, 3, 2, 0]


def test_no_gpm_before_hopper() -> None:
    """QueryDeviceSupport says no, SampleGet NOT_SUPPORTED."""
    with simulated(H100.replace("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        assert nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice == 0
        with pytest.raises(nvml.NVMLError_NotSupported):
            sample(handle)
    with simulated():
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        assert nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice == 1


def test_equal_samples_are_not_a_number() -> None:
    """0/0 elapsed cycles: NaN with success, as a program must be ready for."""
    with simulated():
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        ((code, value),) = read_metrics(sample(handle), sample(handle), 5)
        assert code == 0
        assert math.isnan(value)


def test_wrong_requests_are_refused_as_a_whole() -> None:
    """Freed, empty, swapped and foreign samples, a wrong version, too many metrics."""
    with simulated('[[gpus]]\nmodel = "NVIDIA H100 80GB HBM3"\n' * 2) as (_driver, clock):
        one, two = (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(2))
        first, other = sample(one), sample(two)
        clock.advance(1)
        second = sample(one)
        empty, freed = nvml.nvmlGpmSampleAlloc(), sample(one)
        nvml.nvmlGpmSampleFree(freed)
        for pair in ((first, empty), (freed, second), (second, first), (other, second)):
            with pytest.raises(nvml.NVMLError_InvalidArgument):
                read_metrics(*pair, 5)
        with pytest.raises(nvml.NVMLError_InvalidArgument):
            nvml.nvmlGpmSampleFree(freed)
        request = nvml.c_nvmlGpmMetricsGet_t()
        request.sample1, request.sample2, request.version = first, second, 1
        request.numMetrics = nvml.NVML_GPM_METRIC_MAX + 1
        with pytest.raises(nvml.NVMLError_InvalidArgument):
            nvml.nvmlGpmMetricsGet(request)
        request.version = 2
        with pytest.raises(nvml.nvmlExceptionClass(nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)):
            nvml.nvmlGpmMetricsGet(request)
