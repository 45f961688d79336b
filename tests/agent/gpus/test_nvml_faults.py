"""A bad field never loses the device, a bad device never loses the node, a hang stalls nobody."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.source import BACKOFF_TICKS_MAX
from flopledger_core.records import Device
from tests.agent.attribution.people import until
from tests.agent.gpus.nodes import PHASE, node, scenario
from tests.agent.sampling import SECOND_NS

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import NodeSample

TWO = scenario("", "")
FIELDS = {
    "nvmlDeviceGetTotalEnergyConsumption": "energy_mj",
    "nvmlDeviceGetPowerUsage": "power_mw",
    "nvmlDeviceGetClockInfo": "sm_clock_khz",
    "nvmlDeviceGetComputeRunningProcesses_v3": "processes",
}


def error(code: int, *functions: str, seconds: float | None = None) -> Fault:
    """A fault that answers with a code from now on."""
    return Fault(
        kind="error",
        code=code,
        functions=frozenset(functions) or None,
        for_ns=None if seconds is None else round(seconds * SECOND_NS),
    )


def reasons(tick: NodeSample) -> list[str]:
    """Why devices were not sampled."""
    return [failure.reason for failure in tick.failures]


@pytest.mark.parametrize(("function", "field"), FIELDS.items())
@pytest.mark.parametrize("code", [3, 4, 999])
def test_a_bad_field_is_absent_and_the_rest_is_there(function: str, field: str, code: int) -> None:
    """With a reason, and back when the driver answers again."""
    with node() as it:
        it.warm()
        it.driver.inject(error(code, function, seconds=1.0))
        sample = it.tick(0.5).samples[0]
        assert getattr(sample, field) is None
        reason = {3: "not_supported", 4: "no_permission", 999: "unknown_error"}[code]
        assert sample.absent == {field: reason}
        assert sample.tier == "gpm_cycles"
        again = it.tick(10).samples[0]
        # What is not supported is not asked again; what failed is.
        assert (getattr(again, field) is None) == (code == 3)


def test_an_unsupported_field_is_asked_again_after_a_new_init() -> None:
    """Another driver may support it."""
    with node() as it:
        it.warm()
        it.driver.inject(error(3, "nvmlDeviceGetPowerUsage"))
        assert it.tick().samples[0].power_mw is None
        it.driver.clear_faults()
        assert it.tick().samples[0].power_mw is None
        it.driver.inject_system(error(1, "nvmlDeviceGetCount_v2", seconds=0.5))
        assert it.tick(0.25).failure == "driver_uninitialized"
        it.tick()
        it.tick()
        assert it.tick().samples[0].power_mw == 612_500


@pytest.mark.parametrize(("code", "reason"), [(15, "gpu_is_lost"), (16, "reset_required")])
def test_a_lost_device_fails_alone_and_comes_back_by_itself(code: int, reason: str) -> None:
    """Every tick says so until it answers again."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(error(code, seconds=5), gpu=0)
        for _ in range(3):
            tick = it.tick()
            assert reasons(tick) == [reason]
            assert len(tick.samples) == 1
            assert tick.failure is None
        tick = it.tick(10)
        assert (len(tick.samples), tick.failures) == (2, ())
        assert all(sample.tier == "gpm_cycles" for sample in tick.samples)


def test_a_device_that_answers_nothing_at_all_is_not_sampled() -> None:
    """Unknown errors on every call are a device's failure, although each alone is a field's."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(error(999), gpu=1)
        tick = it.tick()
        assert reasons(tick) == ["unknown_error"]
        assert len(tick.samples) == 1


def test_a_hanging_call_times_out_alone_and_resumes() -> None:
    """One device is stuck for several ticks; the other one is sampled at every tick."""
    with node(TWO) as it:
        it.warm()
        it.hurry()
        it.driver.inject(
            Fault(kind="hang", functions=frozenset({"nvmlDeviceGetPowerUsage"})), gpu=0
        )
        for _ in range(3):
            tick = it.tick()
            assert "timeout" in reasons(tick)
            assert it.driver.hanging_calls() == 1
        it.driver.release_hangs()
        tick = it.until_sampled(2)
        assert tick.failures == ()


def test_percentages_bridge_the_ticks_of_a_hang() -> None:
    """A reading that came too late was not delivered, so the next means begin before it."""
    phases = PHASE.replace("1000.0", "1.5") + PHASE.replace("0.55", "0.35")
    text = scenario(head='driver_version = "580.65.06"', phase=phases)
    with node(text) as it:
        it.source.sample()
        before = it.tick().samples[0]
        it.hurry()
        it.driver.inject(Fault(kind="hang", functions=frozenset({"nvmlDeviceGetPowerUsage"})))
        assert reasons(it.tick()) == ["timeout"]
        it.driver.release_hangs()
        after = it.until_sampled(1).samples[0]
        assert after.boot_ns > before.boot_ns
        assert after.utilization is not None
        truth = it.driver.truth_between(before.boot_ns, after.boot_ns).gpus[0].whole
        mean = truth.active_cycles["hmma"] / truth.elapsed_cycles
        assert abs(after.utilization["hmma"] - mean) < Fraction(1, 10**12)
        assert Fraction(35, 100) < mean < Fraction(55, 100)


def test_a_hang_at_init_is_a_timeout_of_the_node() -> None:
    """The agent goes on; the driver is asked once, not once a tick."""
    with node() as it:
        it.hurry()
        it.driver.inject_system(Fault(kind="hang", functions=frozenset({"nvmlInitWithFlags"})))
        assert it.tick().failure == "timeout"
        assert it.tick().failure == "timeout"
        assert it.driver.hanging_calls() == 1
        it.driver.release_hangs()
        assert it.until_sampled(1).failure is None


def test_a_vanished_device_stays_expected() -> None:
    """Inventory is sticky: a device once seen is missing until it is back."""
    with node(TWO) as it:
        first = it.warm()
        it.driver.inject(Fault(kind="vanish", for_ns=5 * SECOND_NS), gpu=0)
        for _ in range(3):
            tick = it.tick()
            assert reasons(tick) == ["device_missing"]
            assert tick.failures[0].device == first.samples[0].device
        tick = it.tick(10)
        assert (len(tick.samples), tick.failures) == (2, ())


def test_devices_known_from_before_are_expected_from_the_start() -> None:
    """The daemon remembers its inventory over restarts."""
    gone = Device(uuid="GPU-gone", name="NVIDIA H100 80GB HBM3")
    with node(known=(gone,)) as it:
        tick = it.warm()
        assert [(failure.device, failure.reason) for failure in tick.failures] == [
            (gone, "device_missing")
        ]
        assert len(tick.samples) == 1


def test_a_device_lost_before_the_start_is_reported_without_a_name() -> None:
    """It is in the count but does not say who it is."""
    lost = '[[gpus.faults]]\nkind = "lost"\n'
    text = scenario("", lost)
    with node(text) as it:
        tick = it.warm()
        assert len(tick.samples) == 1
        assert reasons(tick) == ["gpu_is_lost"]
        assert tick.failures[0].device.uuid == "unidentified-1"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(9, "driver_not_loaded"), (12, "nvml_not_found"), (18, "driver_version_mismatch")],
)
def test_a_driver_that_cannot_be_opened_is_tried_again_with_backoff(code: int, reason: str) -> None:
    """Rarely enough to disturb nobody, and often enough to come back."""
    with node() as it:
        calls = error(code, "nvmlInitWithFlags")
        it.driver.inject_system(calls)
        for _ in range(10):
            tick = it.tick()
            assert (tick.failure, tick.samples) == (reason, ())
        it.driver.clear_faults()
        ticks = [it.tick() for _ in range(BACKOFF_TICKS_MAX)]
        assert any(tick.samples for tick in ticks)


@pytest.mark.parametrize(
    ("code", "reason"), [(9, "driver_not_loaded"), (18, "driver_version_mismatch")]
)
def test_a_driver_replaced_while_running_fails_every_device(code: int, reason: str) -> None:
    """Each expected device is reported, so that its time becomes a gap."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(error(code, seconds=2))
        tick = it.tick()
        assert tick.failure == reason
        assert reasons(tick) == [reason, reason]
        ticks = [it.tick() for _ in range(8)]
        assert ticks[-1].failure is None
        assert len(ticks[-1].samples) == 2


def test_a_nodes_error_on_one_device_stays_its_own() -> None:
    """One confused device does not take the others down."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(error(1), gpu=0)
        tick = it.tick()
        assert reasons(tick) == ["driver_uninitialized"]
        assert len(tick.samples) == 1
        assert tick.failure is None


def test_counters_that_restart_are_passed_on_as_they_are() -> None:
    """Metering decides about resets; the source neither hides nor mends them."""
    with node() as it:
        it.warm()
        before = it.tick(100).samples[0]
        it.driver.inject(Fault(kind="counter_reset"))
        after = it.tick().samples[0]
        assert before.energy_mj is not None
        assert after.energy_mj is not None
        assert after.energy_mj < before.energy_mj


def test_a_metric_that_is_not_a_number_is_absent() -> None:
    """NaN happens; it is one field's reason."""
    with node(scenario(head='driver_version = "580.65.06"')) as it:
        it.warm()
        it.driver.inject(Fault(kind="nan", metrics=frozenset({7})))
        sample = it.tick().samples[0]
        assert sample.tier == "gpm_util"
        assert sample.utilization is not None
        assert "hmma" not in sample.utilization
        assert sample.absent["utilization.hmma"] == "not_a_number"


def test_a_refused_gpm_call_falls_to_percentages_alone() -> None:
    """A driver that does not know the newer ids may refuse all of them."""
    with node() as it:
        it.warm()
        it.driver.inject(error(2, "nvmlGpmMetricsGet", seconds=0.5))
        sample = it.tick(0.25).samples[0]
        assert sample.tier == "gpu_util"
        assert sample.absent["cycles"] == "invalid_argument"
        assert it.tick().samples[0].tier in {"gpm_util", "gpm_cycles"}


def opening(function: str, code: int = 999, at: float = 0.0) -> str:
    """A scenario in which one call fails for the first half second."""
    return scenario(
        f'[[gpus.faults]]\nkind = "error"\nat_seconds = {at}\nfor_seconds = 0.5\n'
        f'functions = ["{function}"]\ncode = {code}'
    )


@pytest.mark.parametrize("function", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleGet"])
@pytest.mark.parametrize("code", [4, 10, 999])
def test_a_passing_error_at_the_opening_pins_nothing(function: str, code: int) -> None:
    """What is asked once is asked again until it is answered."""
    with node(opening(function, code)) as it:
        first = it.source.sample().samples[0]
        assert first.tier == "gpu_util"
        ticks = [it.tick() for _ in range(6)]
        assert not any(tick.failures for tick in ticks)
        last = ticks[-1].samples[0]
        assert (last.tier, last.absent) == ("gpm_cycles", {})


def test_every_interval_of_a_late_start_has_a_reading() -> None:
    """Coarse, then percentages, then cycles: each interval is told once."""
    with node(opening("nvmlGpmQueryDeviceSupport")) as it:
        samples = [it.source.sample().samples[0]] + [it.tick().samples[0] for _ in range(7)]
        assert [sample.tier for sample in samples] == (
            ["gpu_util"] * 2 + ["gpm_util"] * 2 + ["gpm_cycles"] * 4
        )
        for before, after in itertools.pairwise(samples):
            counted = before.cycles is not None and after.cycles is not None
            assert after.utilization is not None or counted


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetName",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetNumGpuCores",
        "nvmlDeviceGetMaxClockInfo",
    ],
)
def test_who_a_device_is_is_found_out_after_a_passing_error(function: str) -> None:
    """Its name, its PCI id and its SMs come with the next reading; counting is not disturbed."""
    with node(opening(function)) as it:
        it.warm()
        sample = it.tick().samples[0]
        expected = ("NVIDIA H100 80GB HBM3", "2330", 132)
        device = sample.device
        assert (device.name, device.pci_device_id, device.sm_count) == expected
        assert (sample.tier, sample.absent) == ("gpm_cycles", {})


def test_a_device_that_fails_before_its_first_sample_gets_its_name() -> None:
    """Its gaps are told under its name once the driver says it."""
    with node(opening("nvmlDeviceGetName")) as it:
        assert it.source.sample().failures[0].device.name == "unknown"
        it.driver.inject(error(15, "nvmlDeviceGetPowerUsage"))
        assert it.tick().failures[0].device.name == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("code", [3, 15, 999])
@pytest.mark.parametrize(
    "function", ["nvmlGpmSampleGet", "nvmlGpmMetricsGet", "nvmlGpmQueryDeviceSupport"]
)
def test_no_sample_buffer_is_lost_while_the_driver_fails(function: str, code: int) -> None:
    """However long it lasts there are two for each device, and none after the end."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(error(code, function))
        for _ in range(20):
            it.tick()
            assert len(it.driver.gpm_samples) <= 4
        it.driver.inject_system(error(1, "nvmlDeviceGetCount_v2", seconds=3))
        for _ in range(20):
            it.tick()
            assert len(it.driver.gpm_samples) <= 4
        it.source.close()
        assert it.driver.gpm_samples == {}


def test_a_device_that_vanishes_and_returns_loses_no_sample_buffer() -> None:
    """The room of the void handle is given back."""
    with node(TWO) as it:
        it.warm()
        for _ in range(5):
            it.driver.inject(Fault(kind="vanish", for_ns=2 * SECOND_NS), gpu=0)
            for _ in range(4):
                it.tick()
        assert len(it.driver.gpm_samples) == 4


def test_a_stuck_device_gives_its_sample_buffers_back_when_it_answers() -> None:
    """Closing does not wait for it, and loses nothing all the same."""
    with node() as it:
        it.warm()
        it.hurry()
        it.driver.inject(Fault(kind="hang", functions=frozenset({"nvmlDeviceGetPowerUsage"})))
        assert reasons(it.tick()) == ["timeout"]
        it.source.close()
        assert len(it.driver.gpm_samples) == 2
        it.driver.release_hangs()
        until(lambda: not it.driver.gpm_samples, "the buffers")
