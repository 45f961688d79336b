"""MIG on the simulated driver: what real pynvml sees of a partitioned GPU equals its truth."""

from __future__ import annotations

from fractions import Fraction

import pytest

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_agent.gpus.simulated.tables import ScenarioError
from tests.agent.simulated.worlds import SECOND, nvml, read_metrics, simulated

MIG = """
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 10.0
sm_clock_mhz = 1700
power_watts = 100.5
[[gpus.phases]]
seconds = 90.0
sm_clock_mhz = 1200
power_watts = 90
[[gpus.instances]]
id = 2
slices = 3
compute_instances = 2
[[gpus.instances.phases]]
seconds = 30.0
power_watts = 60
sm_active = 0.5
pipes = { hmma = 0.25 }
memory_used_mib = 1024
processes = ["a", "b"]
[[gpus.instances]]
id = 4
from_seconds = 5.0
until_seconds = 20.0
[[gpus.instances.phases]]
seconds = 60.0
power_watts = 20
pipes = { imma = 0.5 }
processes = ["c"]
[processes.a]
pid = 11
[processes.b]
pid = 12
[processes.c]
pid = 13
"""
HMMA, ELAPSED = 252, 248


def handles(gpu: object) -> list[object]:
    """The MIG devices that exist now."""
    found: list[object] = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
        except nvml.NVMLError_NotFound:
            break
    return found


def test_mig_devices_come_and_go() -> None:
    """Each compute instance is a MIG device while its GPU instance exists."""
    with simulated(MIG) as (_, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        assert nvml.nvmlDeviceGetMigMode(gpu) == [1, 1]
        early = [nvml.nvmlDeviceGetGpuInstanceId(each) for each in handles(gpu)]
        clock.advance(6)
        later = handles(gpu)
        ids = [nvml.nvmlDeviceGetGpuInstanceId(each) for each in later]
        uuids = {nvml.nvmlDeviceGetUUID(each) for each in later}
        attributes = nvml.nvmlDeviceGetAttributes_v2(later[0])
        clock.advance(15)
        with pytest.raises(nvml.NVMLError_NotFound):
            nvml.nvmlDeviceGetGpuInstanceId(later[2])

    assert (early, ids) == ([2, 2], [2, 2, 4])
    assert len(uuids) == 3
    assert (attributes.gpuInstanceSliceCount, attributes.computeInstanceSliceCount) == (3, 1)
    assert attributes.multiprocessorCount == 30


def test_profiles_are_those_of_the_model() -> None:
    """The full GPU has 7 slices on an H100 and 4 on an A30, with the SMs NVIDIA documents."""
    for model, whole, sms in (("NVIDIA H100 80GB HBM3", 7, 132), ("NVIDIA A30", 4, 56)):
        with simulated(f'[[gpus]]\nmodel = "{model}"\nmig_from_seconds = 0'):
            gpu = nvml.nvmlDeviceGetHandleByIndex(0)
            profile = nvml.NVML_GPU_INSTANCE_PROFILE_7_SLICE if whole == 7 else (
                nvml.NVML_GPU_INSTANCE_PROFILE_4_SLICE
            )  # fmt: skip
            info = nvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, profile)
            with pytest.raises(nvml.NVMLError_NotSupported):
                nvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 5)
        assert (info.sliceCount, info.multiprocessorCount) == (whole, sms)


def test_counters_of_an_instance_equal_its_truth() -> None:
    """Cumulative cycles and percentages follow the instance's work under the GPU's clock."""
    with simulated(MIG) as (driver, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        first = nvml.nvmlGpmMigSampleGet(gpu, 2, nvml.nvmlGpmSampleAlloc())
        clock.advance(25)
        second = nvml.nvmlGpmMigSampleGet(gpu, 2, nvml.nvmlGpmSampleAlloc())
        elapsed, hmma, percent = read_metrics(first, second, ELAPSED, HMMA, 7)
        truth = driver.truth(clock.boottime_ns()).gpus[0]

    whole = truth.instances[0].whole
    assert elapsed == (0, 60 * (10 * 1_700_000_000 + 15 * 1_200_000_000))
    assert elapsed[1] == whole.elapsed_cycles
    assert hmma[1] == whole.active_cycles["hmma"]
    assert percent == (0, 25.0)
    assert [each.instance_id for each in truth.instances] == [2, 4]
    assert truth.instances[1].whole.gpu_time_ns == 15 * SECOND


def test_power_of_instances_adds_to_the_gpu() -> None:
    """The one energy counter of the GPU holds what it and every instance drew, exactly."""
    with simulated(MIG) as (driver, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(12)
        counter = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        power = nvml.nvmlDeviceGetPowerUsage(gpu)
        truth = driver.truth(clock.boottime_ns()).gpus[0].whole

    assert counter == truth.energy_mj == 10 * 100_500 + 2 * 90_000 + 12 * 60_000 + 7 * 20_000
    assert power == 170_000


def test_processes_are_listed_by_mig_device() -> None:
    """Each process is on one compute instance, with the id of its GPU instance."""
    with simulated(MIG) as (_, clock):
        clock.advance(6)
        lists = [
            [(info.pid, info.gpuInstanceId) for info in
             nvml.nvmlDeviceGetComputeRunningProcesses_v3(each)]
            for each in handles(nvml.nvmlDeviceGetHandleByIndex(0))
        ]  # fmt: skip

    assert lists == [[(11, 2)], [(12, 2)], [(13, 4)]]


@pytest.mark.parametrize(
    "name",
    [
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetNumGpuCores",
        "nvmlDeviceGetProcessUtilization",
    ],
)
def test_what_drivers_refuse_under_mig_is_refused(name: str) -> None:
    """Utilisation, core count and use by process are not supported while MIG is on."""
    with simulated(MIG + "\n") as (_, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(1)
        arguments = (gpu, 0) if name.endswith("ProcessUtilization") else (gpu,)
        with pytest.raises(nvml.NVMLError_NotSupported):
            getattr(nvml, name)(*arguments)


def test_a_gpu_can_be_switched_to_mig_and_back() -> None:
    """Before and after, it is an ordinary GPU with its own work."""
    text = MIG.replace("model =", "mig_from_seconds = 3\nmig_until_seconds = 25\nmodel =", 1)
    text = text.replace("id = 2", "id = 2\nuntil_seconds = 25.0", 1)
    with simulated(text) as (_, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        modes = []
        for _second in range(27):
            modes.append(nvml.nvmlDeviceGetMigMode(gpu)[0])
            clock.advance(1)
        rates = nvml.nvmlDeviceGetUtilizationRates(gpu)

    assert modes == [0] * 3 + [1] * 22 + [0] * 2
    assert rates.gpu == 0


def test_a_fault_of_an_instance_leaves_the_others_alone() -> None:
    """Errors and hangs can be written for one instance; faults of the GPU hit all of it."""
    fault = '[[gpus.instances.faults]]\nkind = "error"\ncode = 999\n'
    text = MIG.replace("[[gpus.instances]]\nid = 4", f"{fault}[[gpus.instances]]\nid = 4", 1)
    with simulated(text) as (driver, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(6)
        with pytest.raises(nvml.NVMLError_Unknown):
            nvml.nvmlGpmMigSampleGet(gpu, 2, nvml.nvmlGpmSampleAlloc())
        nvml.nvmlGpmMigSampleGet(gpu, 4, nvml.nvmlGpmSampleAlloc())
        mig = handles(gpu)[2]
        driver.inject(Fault(kind="lost"))
        with pytest.raises(nvml.NVMLError_GpuIsLost):
            nvml.nvmlDeviceGetAttributes_v2(mig)


def test_a_counter_reset_reaches_every_instance() -> None:
    """Cycles of an instance and energy restart with the GPU's counters; the truth goes on."""
    with simulated(MIG) as (driver, clock):
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        clock.advance(8)
        driver.inject(Fault(kind="counter_reset"))
        first = nvml.nvmlGpmMigSampleGet(gpu, 2, nvml.nvmlGpmSampleAlloc())
        clock.advance(1)
        second = nvml.nvmlGpmMigSampleGet(gpu, 2, nvml.nvmlGpmSampleAlloc())
        (elapsed,) = read_metrics(first, second, ELAPSED)
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        truth = driver.truth(clock.boottime_ns()).gpus[0].instances[0].whole

    assert elapsed == (0, 60 * 1_700_000_000)
    assert energy == Fraction(201, 2) * 1000 + 60_000 + 20_000
    assert truth.elapsed_cycles == 9 * 60 * 1_700_000_000


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("slices = 3", "slices = 7"), "instances.slices"),
        (("id = 4", "id = 2"), "instances.id"),
        (("id = 4", "id = 64"), "instances[1].id"),
        (("until_seconds = 20.0", "until_seconds = 5.0"), "until_seconds"),
        (("power_watts = 20\n", "power_watts = 20\nsm_clock_mhz = 5\n"), "sm_clock_mhz"),
        (("power_watts = 90\n", "power_watts = 90\nsm_active = 0.5\n"), "phases"),
        (("model =", "mig_from_seconds = 6\nmodel ="), "from_seconds"),
        (("slices = 3", "slices = 5"), "sm_count"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(change: tuple[str, str], field: str) -> None:
    """The message names the field, the value and the remedy."""
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(MIG.replace(*change, 1))
    assert field in str(caught.value)
