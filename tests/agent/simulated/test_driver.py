"""Through the real pynvml the simulated library behaves as a driver does."""

from __future__ import annotations

import ctypes
from fractions import Fraction

import pytest

from flopledger_agent.gpus.simulated.driver import install
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_core.errors import InvalidInput
from tests.agent.simulated.worlds import (
    BOOT_NS,
    H100,
    SECOND,
    UNIX_NS,
    ManualClock,
    nvml,
    simulated,
)

TWO = '[[gpus]]\nmodel = "NVIDIA H100 80GB HBM3"\n' * 2


def test_pynvml_is_as_before_after_uninstall() -> None:
    """Library, reference count and function cache are restored."""
    before = (nvml.nvmlLib, nvml._nvmlLib_refcount)
    with simulated():
        assert nvml.nvmlDeviceGetCount() == 1
    assert (nvml.nvmlLib, nvml._nvmlLib_refcount) == before
    assert not nvml._nvmlGetFunctionPointer_cache


def test_only_one_driver_at_a_time() -> None:
    """Pynvml holds one library; a second install is refused and changes nothing."""
    with simulated() as (driver, clock), pytest.raises(InvalidInput, match="uninstall"):
        install(driver.scenario, clock)


def test_nothing_answers_before_init_and_after_shutdown() -> None:
    """UNINITIALIZED, as with the real library; init counts."""
    with install(parse_scenario(H100), ManualClock()):
        with pytest.raises(nvml.NVMLError_Uninitialized):
            nvml.nvmlDeviceGetCount()
        nvml.nvmlInit()
        nvml.nvmlInit()
        nvml.nvmlShutdown()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlShutdown()
        with pytest.raises(nvml.NVMLError_Uninitialized):
            nvml.nvmlDeviceGetName(handle)
        with pytest.raises(nvml.NVMLError_Uninitialized):
            nvml.nvmlShutdown()


def test_wrong_handles_are_invalid_arguments() -> None:
    """None, a null pointer and a handle of nothing."""
    with simulated():
        for handle in (None, nvml.c_nvmlDevice_t(), ctypes.c_void_p(4096)):
            with pytest.raises(nvml.NVMLError_InvalidArgument):
                nvml.nvmlDeviceGetName(handle)
        with pytest.raises(nvml.NVMLError_InvalidArgument):
            nvml.nvmlDeviceGetHandleByIndex(1)
        with pytest.raises(nvml.NVMLError_NotFound):
            nvml.nvmlDeviceGetHandleByUUID("GPU-none")
        with pytest.raises(nvml.NVMLError_InvalidArgument):
            nvml.nvmlDeviceGetHandleByPciBusId("zz")


def test_missing_functions_are_not_found() -> None:
    """Unknown to every driver, or taken away by the scenario."""
    text = f'missing_functions = ["nvmlDeviceGetBrand"]\n{H100}'
    with simulated(text):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        with pytest.raises(nvml.NVMLError_FunctionNotFound):
            nvml.nvmlDeviceGetBrand(handle)
        with pytest.raises(nvml.NVMLError_FunctionNotFound):
            nvml.nvmlDeviceGetNvLinkState(handle, 0)


def test_a_small_buffer_is_refused_with_the_size_needed() -> None:
    """INSUFFICIENT_SIZE, and the count says how many there are."""
    with simulated() as (_driver, clock):
        clock.advance(12)
        library, handle = nvml.nvmlLib, nvml.nvmlDeviceGetHandleByIndex(0)
        count = ctypes.c_uint(1)
        buffer = (nvml.c_nvmlProcessInfo_v3_t * 1)()
        code = library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), buffer)
        assert (code, count.value) == (nvml.NVML_ERROR_INSUFFICIENT_SIZE, 2)
        name = ctypes.create_string_buffer(4)
        code = library.nvmlDeviceGetName(handle, name, ctypes.c_uint(4))
        assert code == nvml.NVML_ERROR_INSUFFICIENT_SIZE


def test_error_strings_exist() -> None:
    """The words of NVML for known codes, something for any other."""
    with simulated():
        assert nvml.nvmlErrorString(15) == "GPU is lost"
        assert nvml.nvmlErrorString(0) == "Success"
        assert "1234" in nvml.nvmlErrorString(1234)


def test_identity() -> None:
    """A device is found again by UUID, serial and PCI place, and knows its hardware."""
    with simulated(TWO):
        assert nvml.nvmlSystemGetDriverVersion() == "595.71.05"
        assert nvml.nvmlSystemGetNVMLVersion() == "13.595.71"
        assert nvml.nvmlSystemGetCudaDriverVersion_v2() == 13020
        handle = nvml.nvmlDeviceGetHandleByIndex(1)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        bus_id = nvml.nvmlDeviceGetPciInfo(handle).busId
        serial = nvml.nvmlDeviceGetSerial(handle)
        for again in (
            nvml.nvmlDeviceGetHandleByUUID(uuid),
            nvml.nvmlDeviceGetHandleByPciBusId(bus_id),
            nvml.nvmlDeviceGetHandleByPciBusId(bus_id.lower()[4:]),
            nvml.nvmlDeviceGetHandleBySerial(serial),
        ):
            assert nvml.nvmlDeviceGetIndex(again) == 1
            assert nvml.nvmlDeviceGetMinorNumber(again) == 1
        assert nvml.nvmlDeviceGetName(handle) == "NVIDIA H100 80GB HBM3"
        assert nvml.nvmlDeviceGetPciInfo(handle).pciDeviceId == 0x233010DE
        assert nvml.nvmlDeviceGetArchitecture(handle) == nvml.NVML_DEVICE_ARCH_HOPPER
        assert nvml.nvmlDeviceGetCudaComputeCapability(handle) == (9, 0)
        assert nvml.nvmlDeviceGetNumGpuCores(handle) == 132 * 128
        assert nvml.nvmlDeviceGetMigMode(handle) == [0, 0]
        assert nvml.nvmlDeviceIsMigDeviceHandle(handle).value == 0
        with pytest.raises(nvml.NVMLError_NotSupported):
            nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)


def test_readings_of_a_running_phase() -> None:
    """Clock, power, memory, utilisation and processes as the phase has them."""
    with simulated() as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(2)
        assert nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) == 1755
        assert nvml.nvmlDeviceGetClock(handle, nvml.NVML_CLOCK_SM, 0) == 1755
        assert nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) == 1980
        assert nvml.nvmlDeviceGetPowerUsage(handle) == 612_500
        assert nvml.nvmlDeviceGetPowerManagementLimit(handle) == 700_000
        assert nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle) == [200_000, 700_000]
        rates = nvml.nvmlDeviceGetUtilizationRates(handle)
        assert (rates.gpu, rates.memory) == (100, 40)
        used = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used
        assert used == 60_000 * 1024**2
        v1 = nvml.nvmlDeviceGetMemoryInfo(handle)
        assert v1.used + v1.free == v1.total > v1.used > used
        assert nvml.nvmlDeviceGetTemperature(handle, 0) == 67
        (process,) = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        assert (process.pid, process.usedGpuMemory) == (4242, used)
        assert nvml.nvmlDeviceGetGraphicsRunningProcesses(handle) == []
        assert nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle) == []
        assert nvml.nvmlSystemGetProcessName(4242) == "python train.py"


def test_after_the_last_phase_the_gpu_is_idle() -> None:
    """Idle clock and power, nothing runs, energy goes on."""
    with simulated() as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(20)
        assert nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) == 345
        assert nvml.nvmlDeviceGetPowerUsage(handle) == 75_000
        assert nvml.nvmlDeviceGetUtilizationRates(handle).gpu == 0
        assert nvml.nvmlDeviceGetComputeRunningProcesses(handle) == []
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        assert energy == 6_125_000 + 1_650_000 + 75 * 4_500


def test_field_values_answer_one_by_one() -> None:
    """Energy and power by field id; scopes and ids that do not exist carry their own code."""
    with simulated() as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(10.5)
        fields = nvml.nvmlDeviceGetFieldValues(handle, [83, 191, (185, 0), (186, 0), (186, 1), 9])
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        assert [f.value.ullVal for f in fields[:2]] == [energy, energy]
        assert fields[2].value.uiVal == (612_500 + 300_000) // 2
        assert fields[3].value.uiVal == 300_000
        assert [f.nvmlReturn for f in fields] == [0, 0, 0, 0, 3, 3]
        assert fields[0].timestamp == (UNIX_NS + 10_500_000_000) // 1000


def test_samples_are_the_ones_newer_than_the_stamp() -> None:
    """Clock samples every 100 ms of the scenario, each the state just before it."""
    with simulated() as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(10.25)
        kind = nvml.NVML_PROCESSOR_CLK_SAMPLES
        since_us = (UNIX_NS + 9_800_000_000) // 1000
        value_type, samples = nvml.nvmlDeviceGetSamples(handle, kind, since_us)
        assert value_type == nvml.NVML_VALUE_TYPE_UNSIGNED_INT
        assert [s.sampleValue.uiVal for s in samples] == [1755, 1755, 1980, 1980]
        with pytest.raises(nvml.NVMLError_NotFound):
            nvml.nvmlDeviceGetSamples(handle, kind, samples[-1].timeStamp)


def test_process_utilisation_is_each_ones_share() -> None:
    """SmUtil over the time since the stamp; nothing new is NOT_FOUND."""
    with simulated() as (_driver, clock):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        with pytest.raises(nvml.NVMLError_NotFound):
            nvml.nvmlDeviceGetProcessUtilization(handle, 0)
        clock.advance(12)
        since_us = (UNIX_NS + 10 * SECOND) // 1000
        used = nvml.nvmlDeviceGetProcessUtilization(handle, since_us)
        assert [(u.pid, u.smUtil) for u in used] == [(4242, 38), (10_000_002, 12)]


def test_truth_splits_a_shared_gpu_by_weights() -> None:
    """Three quarters of everything to the process with weight 3."""
    with simulated() as (driver, clock):
        clock.advance(11)
        truth = driver.truth_between(BOOT_NS + 10 * SECOND, clock.boottime_ns())
        assert truth.owner("train-a").gpu_time_ns == Fraction(3, 4) * SECOND
        assert truth.owner("eval-b").energy_mj == 75_000
        assert truth.owner("eval-b").elapsed_cycles == Fraction(132 * 1980 * 10**6, 4)
        assert truth.owner(None).gpu_time_ns == 0
        clock.advance(10)
        assert driver.truth(clock.boottime_ns()).owner(None).gpu_time_ns == 5.5 * SECOND


def test_truth_outside_the_scenario_is_refused() -> None:
    """Before the start there is nothing to tell."""
    with simulated() as (driver, _clock), pytest.raises(InvalidInput, match="truth window"):
        driver.truth(BOOT_NS - 1)


def test_a_fixed_start_survives_a_restart() -> None:
    """With start_boottime_ns the counters of a restarted agent are where they would be."""
    text = f"start_boottime_ns = {BOOT_NS - 4 * SECOND}\n{H100}"
    with simulated(text):
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        assert nvml.nvmlDeviceGetTotalEnergyConsumption(handle) == 4 * 612_500


def test_processes_are_told_as_an_operating_system_would() -> None:
    """Create time is the scenario's, or when the process first holds a GPU."""
    with simulated() as (driver, _clock):
        train, evaluation = driver.processes()
        assert train.create_time_unix_ns == 1_763_999_990_500_000_000
        assert (train.user, train.environ) == ("alice", {"FLOPLEDGER_PROJECT": "atlas"})
        assert evaluation.create_time_unix_ns == UNIX_NS + 10 * SECOND
        assert driver.process(4242) == train
        assert driver.process(1) is None


def test_every_function_offered_exists_in_nvml() -> None:
    """No name is invented: pynvml asks for each of them, under its own or a versioned name."""
    with open(nvml.__file__, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    with simulated():
        offered = [name for name in vars(nvml.nvmlLib) if name != "nvmlInit_v2"]
    assert [name for name in offered if f'"{name}"' not in source] == []
