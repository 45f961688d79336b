"""Scripted failures happen when, where and as long as written, and the truth goes on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_agent.gpus.simulated.tables import ScenarioError
from tests.agent.simulated.worlds import H100, SECOND, nvml, read_metrics, sample, simulated

DEADLINE_SECONDS = 10.0


def _with_fault(text: str) -> str:
    return H100.replace("[processes.train-a]", f"[[gpus.faults]]\n{text}\n[processes.train-a]", 1)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def _in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def test_error_hits_the_named_function_in_its_window() -> None:
    """Before and after the window, and on other functions, all is well."""
    text = """at_seconds = 1
kind = "error"
functions = ["nvmlDeviceGetTotalEnergyConsumption"]
code = 999
for_seconds = 2"""
    with simulated(_with_fault(text)) as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        for seconds, fails in ((0.5, False), (0.5, True), (1.9, True), (0.1, False)):
            clock.advance(seconds)
            assert nvml.nvmlDeviceGetPowerUsage(handle) > 0
            if fails:
                with pytest.raises(nvml.NVMLError_Unknown):
                    nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            else:
                assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) > 0


def test_a_lost_gpu_keeps_its_place_and_comes_back() -> None:
    """GPU_IS_LOST on every call, also for new handles; counters went on meanwhile."""
    fault = 'at_seconds = 1\nkind = "lost"\nfor_seconds = 2'
    with simulated(_with_fault(fault)) as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(2)
        assert nvml.nvmlDeviceGetCount() == 1
        with pytest.raises(nvml.NVMLError_GpuIsLost):
            nvml.nvmlDeviceGetHandleByIndex(0)
        with pytest.raises(nvml.NVMLError_GpuIsLost):
            nvml.nvmlDeviceGetName(handle)
        clock.advance(1)
        assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 3 * 612_500


def test_a_vanished_gpu_leaves_the_count() -> None:
    """Indices move up; its old handle is lost."""
    text = '[[gpus]]\nmodel = "NVIDIA H100 80GB HBM3"\n' * 2
    with simulated(text) as (driver, _clock):
        first, second = (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(2))
        driver.inject(Fault(kind="vanish"), gpu=0)
        assert nvml.nvmlDeviceGetCount() == 1
        assert nvml.nvmlDeviceGetIndex(second) == 0
        assert nvml.nvmlDeviceGetMinorNumber(second) == 1
        with pytest.raises(nvml.NVMLError_GpuIsLost):
            nvml.nvmlDeviceGetIndex(first)
        driver.clear_faults()
        assert nvml.nvmlDeviceGetCount() == 2


def test_counters_restart_and_the_truth_does_not() -> None:
    """Energy and cumulative cycles count from the reset; percentages and truth are untouched."""
    with simulated(_with_fault('at_seconds = 4\nkind = "counter_reset"')) as (driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(3)
        first = sample(handle)
        clock.advance(3)
        second = sample(handle)
        assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 2 * 612_500
        (_, elapsed), (_, percent) = read_metrics(first, second, 248, 7)
        assert elapsed == 2 * 132 * 1_755_000_000
        assert percent == 55.0
        assert driver.truth(clock.boottime_ns()).gpus[0].whole.energy_mj == 6 * 612_500
        driver.inject(Fault(kind="counter_reset"))
        clock.advance(1)
        assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 612_500


def test_nan_and_metric_errors_touch_the_named_metrics() -> None:
    """Cumulative counters never turn NaN; errors are per metric."""
    with simulated() as (driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        first = sample(handle)
        driver.inject(Fault(kind="nan"))
        driver.inject(Fault(kind="metric_error", metrics=frozenset({9}), code=3))
        clock.advance(1)
        values = read_metrics(first, sample(handle), 7, 9, 248)
        assert math.isnan(values[0][1])
        assert values[1] == (3, 0.0)
        assert values[2] == (0, 132 * 1_755_000_000.0)


def test_a_hang_blocks_until_released() -> None:
    """The call neither returns nor spins; released, it answers, and later calls do not block."""
    with simulated() as (driver, _clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        driver.inject(Fault(kind="hang", functions=frozenset({"nvmlDeviceGetPowerUsage"})))
        thread, results = _in_thread(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        _until(lambda: driver.hanging_calls() == 1)
        assert nvml.nvmlDeviceGetName(handle)
        assert not results
        driver.release_hangs()
        thread.join(DEADLINE_SECONDS)
        assert results == [75_000]
        assert nvml.nvmlDeviceGetPowerUsage(handle) == 75_000


def test_a_hang_with_an_end_is_over_by_the_scenarios_clock() -> None:
    """The clock of the scenario decides, however fast it runs."""
    with simulated() as (driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        driver.inject(Fault(kind="hang", for_ns=3600 * SECOND, code=10))
        thread, results = _in_thread(
            lambda: nvml.nvmlLib.nvmlDeviceGetPowerUsage(handle, nvml.c_uint())
        )
        _until(lambda: driver.hanging_calls() == 1)
        clock.advance(3600)
        thread.join(DEADLINE_SECONDS)
        assert results == [10]


def test_uninstall_lets_hanging_calls_return() -> None:
    """No thread is left behind in a driver that is gone."""
    with simulated() as (driver, _clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        driver.inject(Fault(kind="hang"))
        library = nvml.nvmlLib
        thread, results = _in_thread(lambda: library.nvmlDeviceGetPowerUsage(handle, None))
        _until(lambda: driver.hanging_calls() == 1)
    thread.join(DEADLINE_SECONDS)
    assert results == [nvml.NVML_ERROR_UNINITIALIZED]


def test_faults_of_the_node_hit_calls_without_a_device() -> None:
    """A driver that was upgraded under us fails at init and at the count."""
    text = f'[[faults]]\nkind = "error"\ncode = 18\nat_seconds = 1\n{H100}'
    with simulated(text) as (_driver, clock):
        assert nvml.nvmlDeviceGetCount() == 1
        clock.advance(1)
        for call in (nvml.nvmlInit, nvml.nvmlDeviceGetCount):
            with pytest.raises(nvml.NVMLError_LibRmVersionMismatch):
                call()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('kind = "explode"', "gpus[0].faults[0].kind"),
        ('kind = "error"\ncode = 0', "gpus[0].faults[0].code"),
        ('kind = "hang"\nat_seconds = -1', "gpus[0].faults[0].at_seconds"),
        ('kind = "error"\nfunctions = ["energy"]', "gpus[0].faults[0].functions"),
        ('kind = "lost"\nfor_second = 1', "gpus[0].faults[0].for_second"),
    ],
)
def test_a_wrong_fault_is_named(text: str, words: str) -> None:
    """Field and remedy, as for the rest of the scenario."""
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(_with_fault(text))
    assert words in str(caught.value)
