"""The demo's scenarios, read by the simulated driver itself, cross the budget when they should.

Truth comes from the driver's exact integrals, not from the code that wrote the scenarios.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from flopledger_agent.gpus.simulated.scenario import Scenario, parse_scenario
from flopledger_agent.gpus.simulated.schedule import Schedule
from flopledger_agent.gpus.simulated.truth import gpu_truth
from flopledger_collector.demo.cluster import build_cluster

BUDGET_FLOP = 10**20
SPEED = 60
FLOP_PER_CYCLE = {  # dense, per SM and cycle of the tensor pipe
    ("NVIDIA H100 80GB HBM3", "bf16"): 4096,
    ("NVIDIA H100 80GB HBM3", "fp8"): 8192,
    ("NVIDIA B200", "bf16"): 8192,
}


@pytest.fixture(scope="module", name="scenarios")
def _scenarios() -> list[Scenario]:
    return [parse_scenario(node.scenario) for node in build_cluster().nodes]


def tensor_flop(scenarios: list[Scenario], project: str | None, seconds: int) -> Fraction:
    """Tensor FLOP of a project's processes up to a virtual second; bf16 where none is declared."""
    flop = Fraction(0)
    for scenario in scenarios:
        for index, gpu in enumerate(scenario.gpus):
            truth = gpu_truth(index, gpu, Schedule(gpu), 0, seconds * 10**9)
            for name, amounts in truth.owners.items():
                environ = {} if name is None else scenario.processes[name].environ
                if name is None or environ.get("FLOPLEDGER_PROJECT") != project:
                    continue
                precision = environ.get("FLOPLEDGER_PRECISION", "bf16").replace("int8", "bf16")
                flop += amounts.active_cycles["hmma"] * FLOP_PER_CYCLE[gpu.model, precision]
    return flop


def test_the_driver_reads_every_scenario_and_offers_cycle_counters(
    scenarios: list[Scenario],
) -> None:
    """All GPUs report exact cycles, and no two share a UUID or a serial number."""
    gpus = [gpu for scenario in scenarios for gpu in scenario.gpus]

    assert {gpu.gpm for gpu in gpus} == {"cycles"}
    assert len({gpu.uuid for gpu in gpus}) == len({gpu.serial for gpu in gpus}) == 32
    assert not any(p.real for scenario in scenarios for p in scenario.processes.values())


def test_atlas_crosses_its_budget_after_sixty_to_ninety_real_seconds(
    scenarios: list[Scenario],
) -> None:
    """At 60 times real time the crossing falls well inside a two-minute demo."""
    assert tensor_flop(scenarios, "atlas", 65 * SPEED) < BUDGET_FLOP
    assert tensor_flop(scenarios, "atlas", 85 * SPEED) > BUDGET_FLOP


def test_the_other_projects_stay_far_below(scenarios: list[Scenario]) -> None:
    """Birch and cedar do real but smaller work; untagged work is there and small."""
    shares = {p: tensor_flop(scenarios, p, 7200) for p in ("atlas", "birch", "cedar", None)}

    assert all(flop > 10**17 for flop in shares.values())
    assert max(shares["birch"], shares["cedar"], shares[None]) * 5 < shares["atlas"]


def test_energy_is_of_the_recorded_order(scenarios: list[Scenario]) -> None:
    """Two busy hours of 32 GPUs: between idle and the power limit, nearer the limit."""
    joules = Fraction(0)
    for scenario in scenarios:
        for index, gpu in enumerate(scenario.gpus):
            truth = gpu_truth(index, gpu, Schedule(gpu), 0, 7200 * 10**9)
            joules += truth.whole.energy_mj / 1000
    most = 7200 * 16 * (700 + 1000)

    assert Fraction(1, 2) < joules / most < Fraction(9, 10)
