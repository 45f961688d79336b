"""What the source reads through the real pynvml equals what the simulated driver knows."""

from __future__ import annotations

from fractions import Fraction

import pytest

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.functions import fields, readings
from flopledger_agent.gpus.simulated.marshalling import CArgument, target
from flopledger_core.records import Cycles
from tests.agent.gpus.nodes import PHASE, node, scenario

# A model of a known architecture that the hardware table lacks.
UNKNOWN = (
    "compute_capability = '9.0'\nsm_count = 78\nmax_sm_clock_mhz = 1980\n"
    "power_limit_watts = 500\nmemory_mib = 98304\npci_device_id = 'FFFE'"
)


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_cycles_and_energy_equal_the_truth(scale: str) -> None:
    """Whatever the counters count, the difference of two samples is the exact work between them."""
    with node(scenario(f'cycle_scale = "{scale}"')) as it:
        first = it.warm().samples[0]
        it.tick(7.5)
        last = it.tick(0.25).samples[0]
        truth = it.driver.truth_between(first.boot_ns, last.boot_ns).gpus[0].whole
        assert last.tier == "gpm_cycles"
        tolerance = first.uncertain_cycles + last.uncertain_cycles
        # A mean counter hides part cycles of every SM at both ends.
        assert tolerance == (0 if scale == "sum" else 2 * 132)
        for field, true in {"elapsed": truth.elapsed_cycles, **truth.active_cycles}.items():
            counted = getattr(last.cycles, field) - getattr(first.cycles, field)
            assert abs(counted - true) <= tolerance, field
        assert (last.energy_mj or 0) - (first.energy_mj or 0) == truth.energy_mj


def test_the_first_sample_has_cycles_already() -> None:
    """A device is held back until the scale is certain, so that dark time can be bridged."""
    with node() as it:
        for first in (it.source.sample(), it.tick()):
            assert first.samples == ()
            assert [failure.reason for failure in first.failures] == ["warming_up"]
        assert it.tick().samples[0].tier == "gpm_cycles"


def test_percentages_are_exact_means_since_the_delivered_sample() -> None:
    """An R580 driver has no cycle counters; its percentages cover whole intervals."""
    two = PHASE.replace("1000.0", "2.0") + PHASE.replace("0.55", "0.35")
    with node(scenario(phase=two, head='driver_version = "580.65.06"')) as it:
        first = it.source.sample().samples[0]
        assert (first.tier, first.utilization) == ("gpm_util", None)
        assert first.absent["utilization"] == "first_reading"
        sample = it.tick(4.0).samples[0]
        assert sample.utilization is not None
        assert abs(sample.utilization["hmma"] - Fraction(45, 100)) < Fraction(1, 10**12)
        assert sample.cycles is None
        assert sample.absent["cycles"] == "driver_lacks_cycle_counters"


def test_a_device_without_gpm_shows_coarse_activity() -> None:
    """utilization.gpu as an upper bound, and why it is no better."""
    with node(scenario(model="NVIDIA A100-SXM4-80GB")) as it:
        sample = it.warm().samples[0]
        assert sample.tier == "gpu_util"
        assert sample.utilization is not None
        assert set(sample.utilization) == {"sm_active"}
        assert 0 < sample.utilization["sm_active"] <= 1
        assert sample.absent["cycles"] == "gpm_not_supported"


def test_nothing_about_activity_is_the_tier_none() -> None:
    """Energy and time are still metered."""
    text = scenario(
        '[[gpus.faults]]\nkind = "error"\ncode = 3\nfunctions = ["nvmlDeviceGetUtilizationRates"]',
        model="NVIDIA A100-SXM4-80GB",
        phase="",
    )
    with node(text) as it:
        sample = it.warm().samples[0]
        assert (sample.tier, sample.utilization, sample.cycles) == ("none", None, None)
        assert sample.absent["utilization"] == "not_supported"
        assert sample.energy_mj is not None


def test_units_identity_and_processes() -> None:
    """kHz, mW, mJ; four hex digits; SMs from the core count; pids sorted."""
    with node() as it:
        tick = it.warm()
        sample = tick.samples[0]
        assert (sample.sm_clock_khz, sample.power_mw) == (1_755_000, 612_500)
        assert sample.device.name == "NVIDIA H100 80GB HBM3"
        assert (sample.device.pci_device_id, sample.device.sm_count) == ("2330", 132)
        assert sample.processes == (4242,)
        assert sample.absent == {}
        assert (tick.driver, tick.failure) == ("595.71.05", None)
        assert tick.boot_ns == it.clock.boottime_ns()


def test_an_idle_device_has_no_processes() -> None:
    """An empty list is not an unreadable one."""
    with node(scenario(phase="")) as it:
        assert it.warm().samples[0].processes == ()


def test_a_device_the_table_lacks_is_metered_by_its_architecture() -> None:
    """The compute capability still gives the SMs, and limits that no model of it reaches."""
    absurd = PHASE.replace("612.5", "9000.0")
    with node(scenario(UNKNOWN, model="NVIDIA X1", phase=absurd)) as it:
        sample = it.warm().samples[0]
        assert (sample.device.sm_count, sample.device.compute_capability) == (78, "9.0")
        assert (sample.power_mw, sample.absent["power_mw"]) == (None, "out_of_range")


def test_a_device_of_no_known_architecture_has_no_sm_count() -> None:
    """Nothing is guessed: its coarse activity is still told, its SMs are absent with the reason."""
    text = scenario(UNKNOWN.replace("9.0", "99.0"), model="NVIDIA X1")
    with node(text) as it:
        sample = it.warm().samples[0]
        assert (sample.device.sm_count, sample.device.compute_capability) == (None, "99.0")
        assert sample.absent["sm_count"] == "sm_count_unknown"
        assert sample.tier == "gpu_util"


@pytest.mark.parametrize(
    ("model", "capability"),
    [("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA L4", "8.9")],
)
def test_every_device_names_its_compute_capability_asked_once(model: str, capability: str) -> None:
    """It names the architecture also where the table does not know the model."""
    with node(scenario(model=model)) as it:
        it.warm()
        fault = Fault(
            kind="error",
            code=999,
            functions=frozenset({"nvmlDeviceGetCudaComputeCapability"}),
        )
        it.driver.inject(fault)
        sample = it.tick().samples[0]
        assert sample.device.compute_capability == capability
        assert "compute_capability" not in sample.absent


def test_a_compute_capability_that_fails_is_absent_until_it_is_answered() -> None:
    """A passing error is asked again; the device is metered meanwhile."""
    failing = (
        '[[gpus.faults]]\nkind = "error"\ncode = 999\nfor_seconds = 5.0\n'
        'functions = ["nvmlDeviceGetCudaComputeCapability"]'
    )
    with node(scenario(failing)) as it:
        sample = it.warm().samples[0]
        assert sample.device.compute_capability is None
        assert sample.absent["compute_capability"] == "unknown_error"
        assert it.tick(5).samples[0].device.compute_capability == "9.0"


def test_fields_stay_absent_on_a_driver_without_the_function() -> None:
    """An older driver lacks functions; each costs its own field only."""
    functions = '["nvmlDeviceGetTotalEnergyConsumption", "nvmlGpmQueryDeviceSupport"]'
    with node(scenario(head=f"missing_functions = {functions}")) as it:
        sample = it.warm().samples[0]
        assert sample.energy_mj is None
        assert sample.absent["energy_mj"] == "function_not_found"
        assert sample.absent["cycles"] == "function_not_found"
        assert sample.tier == "gpu_util"


def test_processes_fall_back_to_the_older_call() -> None:
    """Drivers before R510 have only version 2."""
    with node(
        scenario(head='missing_functions = ["nvmlDeviceGetComputeRunningProcesses_v3"]')
    ) as it:
        assert it.warm().samples[0].processes == (4242,)


def test_no_driver_library_is_a_reason_and_not_an_exception() -> None:
    """A node without NVIDIA software runs the agent all the same."""
    fault = '[[faults]]\nkind = "error"\ncode = 12\nfunctions = ["nvmlInitWithFlags"]'
    with node(scenario(head=fault)) as it:
        tick = it.source.sample()
        assert (tick.samples, tick.failures, tick.failure) == ((), (), "nvml_not_found")
        assert tick.driver is None


def test_after_close_nothing_is_read() -> None:
    """Closing twice is harmless, sampling afterwards says so."""
    with node() as it:
        it.warm()
        it.source.close()
        it.source.close()
        tick = it.tick()
        assert (tick.samples, tick.failure) == ((), "closed")
        assert [failure.reason for failure in tick.failures] == ["closed"]
        assert it.driver.gpm_samples == {}


def test_cycle_counters_are_whole_numbers() -> None:
    """Doubles of the driver become integers once, here."""
    with node() as it:
        cycles = it.warm().samples[0].cycles
        assert isinstance(cycles, Cycles)
        assert all(isinstance(value, int) for value in cycles.as_dict().values())


def test_a_scale_that_stays_unclear_holds_nothing_back_for_long() -> None:
    """After a few readings the device is metered by its percentages instead."""
    with node(scenario("sm_count = 8")) as it:
        for _ in range(3):
            assert [failure.reason for failure in it.tick().failures] == ["warming_up"]
        it.tick()
        sample = it.tick().samples[0]
        assert sample.tier == "gpm_util"
        assert sample.utilization is not None
        assert sample.absent["cycles"] == "scale_undetermined"


def test_a_scale_found_late_switches_up_without_a_hole() -> None:
    """The tick that ends the percentages tells its own interval and begins the counting."""
    idle = "[[gpus.phases]]\nseconds = 6\nsm_clock_mhz = 345\n"
    with node(scenario("cycle_scale = 'mean'", phase=idle + PHASE)) as it:
        samples = [sample for _ in range(14) for sample in it.tick().samples]
        tiers = [sample.tier for sample in samples]
        turn = tiers.index("gpm_cycles")
        assert turn >= 2
        assert set(tiers[:turn]) == {"gpm_util"}
        assert set(tiers[turn:]) == {"gpm_cycles"}
        assert [sample.cycles is not None for sample in samples[: turn + 1]] == (
            [False] * (turn - 1) + [True, True]
        )
        before, after = samples[turn - 1], samples[turn]
        assert before.utilization is not None
        truth = it.driver.truth_between(before.boot_ns, after.boot_ns).gpus[0].whole
        assert before.cycles is not None
        assert after.cycles is not None
        counted = (after.cycles.hmma or 0) - (before.cycles.hmma or 0)
        uncertain = before.uncertain_cycles + after.uncertain_cycles
        assert abs(counted - truth.active_cycles["hmma"]) <= uncertain


def test_numbers_no_device_can_have_are_absent() -> None:
    """A clock of 9 GHz and 50 kW on one board: absent with a reason, and so is their energy."""
    absurd = PHASE.replace("1755", "9000").replace("612.5", "9000000000.0")
    with node(scenario(phase=absurd)) as it:
        it.warm()
        sample = it.tick(100).samples[0]
        for field in ("sm_clock_khz", "power_mw", "energy_mj"):
            assert getattr(sample, field) is None, field
            assert sample.absent[field] == "out_of_range", field


@pytest.mark.parametrize("megahertz", [2**32 - 1, 2**32 - 2, 20_000])
def test_the_marks_of_absent_numbers_and_their_neighbours_are_no_clock(
    megahertz: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a device nobody knows, and also where the driver buffers them."""

    def clock_info(_device: object, _now_ns: int, _kind: object, out: CArgument) -> int:
        target(out).value = megahertz
        return 0

    monkeypatch.setattr(fields, "clock_mhz", lambda *_: megahertz)
    monkeypatch.setattr(readings, "clock_info", clock_info)
    monkeypatch.setattr(
        readings, "FUNCTIONS", {**readings.FUNCTIONS, "nvmlDeviceGetClockInfo": clock_info}
    )
    for text in (scenario(), scenario(UNKNOWN, model="NVIDIA X1")):
        with node(text) as it:
            tick = [it.tick() for _ in range(5)][-1]
            assert tick.samples[0].sm_clock_khz is None
            reason = tick.samples[0].absent["sm_clock_khz"]
            assert reason == ("not_available" if megahertz == 2**32 - 1 else "out_of_range")
