"""`check` tells per GPU what is seen, why it is no better, and what helps."""

from __future__ import annotations

from flopledger_agent.gpus.report import describe, lines
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_core.accelerators import load_table
from tests.agent.gpus.nodes import node, scenario

TABLE = load_table()


def test_a_complete_node_has_nothing_to_complain_about() -> None:
    """Name, UUID and tier, and no remedies."""
    with node() as it:
        tick = it.warm()
        report = describe(tick, TABLE)
    assert report.is_complete
    told = lines(report)
    assert told[0] == "NVIDIA driver: 595.71.05"
    assert told[1] == f"NVIDIA H100 80GB HBM3 ({tick.samples[0].device.uuid})"
    assert told[2].startswith("  tier gpm_cycles")
    assert len(told) == 3


def test_an_older_driver_is_named_as_what_keeps_the_tier_down() -> None:
    """With the driver branch that would lift it."""
    with node(scenario(head='driver_version = "580.65.06"')) as it:
        report = describe(it.warm(), TABLE)
    gpu = report.gpus[0]
    assert gpu.tier == "gpm_util"
    assert gpu.why_not_higher == (
        "driver 580.65.06 offers GPM percentages only; cycle counters need R595 or newer"
    )
    assert gpu.absent == ()


def test_a_device_without_gpm_says_so() -> None:
    """There is no remedy but the hardware."""
    with node(scenario(model="NVIDIA A100-SXM4-80GB")) as it:
        gpu = describe(it.warm(), TABLE).gpus[0]
    assert gpu.tier == "gpu_util"
    assert gpu.why_not_higher is not None
    assert "Hopper" in gpu.why_not_higher


def test_absent_fields_and_lost_devices_come_with_a_remedy() -> None:
    """Every reason word has its sentence."""
    with node(scenario("", "")) as it:
        it.warm()
        it.driver.inject(Fault(kind="lost"), gpu=0)
        it.driver.inject(
            Fault(kind="error", code=4, functions=frozenset({"nvmlDeviceGetPowerUsage"})), gpu=1
        )
        report = describe(it.tick(), TABLE)
    assert not report.is_complete
    told = "\n".join(lines(report))
    assert "not sampled: gpu_is_lost; drain the node" in told
    assert "power_mw: no_permission; run the agent as" in told


def test_a_node_without_a_driver_names_the_remedy() -> None:
    """Nothing else is listed."""
    fault = '[[faults]]\nkind = "error"\ncode = 12\nfunctions = ["nvmlInitWithFlags"]'
    with node(scenario(head=fault)) as it:
        told = lines(describe(it.source.sample(), TABLE))
    assert told[0] == "NVIDIA driver: does not answer"
    assert "libnvidia-ml.so.1" in told[1]
    assert len(told) == 2
