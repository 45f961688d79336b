"""GPUs with a worker of their own: they go back to the others', with what is known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_agent.gpus.lanes import Patience
from flopledger_agent.gpus.simulated.faults import Fault
from tests.agent.gpus.inline_worker import InlineNode, inline_node
from tests.agent.gpus.nodes import scenario

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import NodeSample

PATIENCE = Patience(hang_seconds=3.0, start_seconds=30.0, rejoin_seconds=60.0)
WHOLE_NODE = 2
HOUR_TICKS = 3600
INSTANCES = """
[[gpus.instances]]
id = 1
slices = 3
[[gpus.instances.phases]]
seconds = 1000.0
pipes = { hmma = 0.5 }
"""
PLAIN = "[[gpus.phases]]\nseconds = 1000.0\nsm_clock_mhz = 1700\npower_watts = 300\n"


def running(it: InlineNode) -> int:
    """Workers at work."""
    return it.source.counts.running_workers


def lose(it: InlineNode, gpu: int, ticks: int = 8) -> None:
    """A GPU is lost for so long that it gets a worker of its own; then it is back."""
    it.driver.inject(Fault(kind="lost"), gpu)
    for _ in range(ticks):
        it.tick()
    it.driver.clear_faults()


def until_back(it: InlineNode, limit: int) -> list[NodeSample]:
    """Ticks until one worker reads everything again."""
    ticks: list[NodeSample] = []
    while running(it) > 1 or len(it.tick().samples) < WHOLE_NODE:
        ticks.append(it.tick())
        assert len(ticks) < limit, "it never went back"
    return ticks


def test_a_gpu_that_is_well_again_goes_back_to_the_others_worker() -> None:
    """After the healthy time; not one tick of either GPU and not one cycle is lost by it."""
    with inline_node(scenario("", ""), PATIENCE) as it:
        it.run(4)
        lose(it, 1)
        while len(it.tick().samples) < WHOLE_NODE:
            assert running(it) <= WHOLE_NODE + 1
        assert running(it) == WHOLE_NODE
        last: dict[str, int] = {}
        for _ in range(200):
            tick = it.tick()
            assert (len(tick.samples), tick.failures) == (WHOLE_NODE, ())
            for sample in tick.samples:
                assert sample.tier == "gpm_cycles"
                assert sample.cycles is not None
                assert sample.cycles.elapsed is not None
                assert sample.cycles.elapsed > last.get(sample.device.key, 0)
                last[sample.device.key] = sample.cycles.elapsed
            truth = it.driver.truth(it.clock.boottime_ns())
            told = {sample.device.uuid: sample.energy_mj for sample in tick.samples}
            assert told == {gpu.uuid: int(gpu.whole.energy_mj) for gpu in truth.gpus}
        assert running(it) == 1
        assert it.source.counts.restarts["gpu_set_changed"] >= 1


def test_a_gpu_that_is_in_trouble_again_and_again_goes_back_less_and_less_often() -> None:
    """Each time the healthy time doubles, so the others are not disturbed for its sake."""
    with inline_node(scenario("", ""), PATIENCE) as it:
        it.run(4)
        took: list[int] = []
        for _ in range(3):
            lose(it, 1)
            while len(it.tick().samples) < WHOLE_NODE:
                pass
            took.append(len(until_back(it, HOUR_TICKS)))
        assert took[0] < took[1] < took[2]


def test_all_gpus_in_trouble_at_once_leave_nobody_behind() -> None:
    """Each gets a worker of its own, the worker that held them all goes, and all come back."""
    with inline_node(scenario(*[""] * 4), PATIENCE) as it:
        it.run(4)
        first = it.made[0]
        it.driver.inject(Fault(kind="lost"))
        tick = it.run(20)
        assert not tick.samples
        assert {item.reason for item in tick.failures} == {"gpu_is_lost"}
        assert first.ended(), "it would hold the lost GPUs open"
        it.driver.clear_faults()
        tick = it.run(400)
        assert len(tick.samples) == len(it.driver.devices)
        assert running(it) == 1
        assert sum(not each.ended() for each in it.made) == 1


def test_the_scale_of_another_driver_is_not_believed() -> None:
    """After an upgrade counters may count otherwise: too slow contradicts nothing by itself."""
    sums, means = scenario(""), scenario('cycle_scale = "mean"', head='driver_version = "600.1"')
    with inline_node(sums) as it:
        before = it.run(5)
        known = it.source._scales
        assert set(known.values()) == {"sum"}
    with inline_node(means) as it:
        it.source._scales, it.source._driver = dict(known), before.driver
        tick = it.run(5)
        assert set(it.source._scales.values()) == {"mean"}
        truth = it.driver.truth(it.clock.boottime_ns()).gpus[0].whole
        sample = tick.samples[0]
        assert sample.cycles is not None
        assert sample.cycles.elapsed is not None
        assert abs(sample.cycles.elapsed - truth.elapsed_cycles) <= sample.uncertain_cycles


def test_a_scale_that_is_contradicted_is_not_passed_on() -> None:
    """A successor begins without it, instead of beginning with what was proven wrong."""
    with inline_node(scenario("")) as it:
        it.run(4)
        (key,) = it.source._scales
        it.source._scales = {key: "mean"}
        it.made[-1].end(kill=True)
        it.tick()
        it.tick()
        assert it.made[-1].hello is not None
        assert it.made[-1].hello.scales == {key: "mean"}
        it.tick()
        assert it.source._scales.get(key) != "mean"


def test_a_partitioned_gpu_does_not_take_another_gpus_scale() -> None:
    """What is passed on is by GPU and part; a part begins with one of its own GPU, or none."""
    with inline_node(scenario(INSTANCES, "", phase=PLAIN)) as it:
        parted, whole = (device.gpu.uuid for device in it.driver.devices)
        version = it.driver.scenario.driver_version
        it.source._scales, it.source._driver = {whole: "mean", f"{parted}2/1": "mean"}, version
        it.tick()
        assert not [key for key in it.source._scales if key.startswith(f"{parted}/")]
        tick = it.run(4)
        parts = [item for item in tick.samples if item.device.gpu_instance is not None]
        assert parts
        truth = it.driver.truth(it.clock.boottime_ns()).gpus[0].instances
        told = {item.device.gpu_instance: item.cycles and item.cycles.elapsed for item in parts}
        assert told == {item.instance_id: int(item.whole.elapsed_cycles) for item in truth}


def test_a_driver_that_appears_long_after_the_agent_is_met_within_a_minute() -> None:
    """Ten minutes without a library; then every GPU is read, by itself."""
    with inline_node(scenario("", "")) as it:
        it.driver.inject_system(Fault(kind="error", code=12))
        assert it.run(600).failure == "nvml_not_found"
        it.driver.clear_faults()
        tick = it.run(70)
        assert len(tick.samples) == WHOLE_NODE
        assert {item.tier for item in tick.samples} == {"gpm_cycles"}
        assert sum(not each.ended() for each in it.made) == 1


def test_a_driver_that_is_reloaded_again_and_again_costs_no_process() -> None:
    """Unloaded for a minute, five times: all is read again each time, by one worker."""
    with inline_node(scenario("", "")) as it:
        it.run(4)
        for _ in range(5):
            it.driver.inject_system(Fault(kind="error", code=9))
            it.driver.inject(Fault(kind="error", code=9))
            assert it.run(60).failure == "driver_not_loaded"
            it.driver.clear_faults()
            assert len(it.run(70).samples) == WHOLE_NODE
        assert sum(not each.ended() for each in it.made) == 1
