"""A day of faults in virtual time: nothing negative, invented or lost, and nothing grows."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_core.accelerators import load_table
from flopledger_core.records import PIPES
from tests.agent.sampling import SECOND_NS
from tests.end_to_end.virtual_ledger import VirtualLedger
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated import Truth

TABLE: Final = load_table()
H200: Final = "NVIDIA H200"
GPUS: Final = 2
HOUR_SECONDS: Final = 3600
GROWTH_MIB_MAX: Final = (
    12.0  # of a process that holds a whole test suite; a leak of 1 kB a tick is 8
)
FUNCTIONS: Final = (
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlGpmSampleGet",
    "nvmlGpmMetricsGet",
    "nvmlDeviceGetHandleByUUID",
)
CODES: Final = (1, 3, 4, 6, 9, 10, 15, 16, 19, 20, 21, 27, 29, 999)
PRECISIONS: Final = {"bf16": 4096, "fp8": 8192}  # declared -> what a tensor cycle carries out


def scenario(chance: random.Random, hours: int) -> dict[str, object]:
    """Two GPUs on which jobs come and go for the whole time."""
    processes = {
        name: {
            "pid": 10_000_001 + index,
            "create_time_unix": 1,
            "environ": {"FLOPLEDGER_PROJECT": f"p-{name}", "FLOPLEDGER_PRECISION": name},
        }
        for index, name in enumerate(PRECISIONS)
    }
    gpus: list[dict[str, object]] = []
    for _ in range(GPUS):
        phases: list[dict[str, object]] = []
        left = hours * HOUR_SECONDS + 600
        while left > 0:
            seconds = min(left, chance.randint(5, 1200))
            left -= seconds
            owner = chance.choice([None, *PRECISIONS])
            phases.append({
                "seconds": seconds,
                "sm_clock_mhz": chance.randint(3, 19) * 100,
                "power_watts": chance.randint(70, 700),
                "sm_active": 0.95 if owner else 0,
                "pipes": {"hmma": chance.choice([0.25, 0.5, 0.75]) if owner else 0},
                "processes": [owner] if owner else [],
            })  # fmt: skip
        gpus.append({"model": H200, "phases": phases})
    return {"driver_version": "595.71.05", "processes": processes, "gpus": gpus}


def trouble(node: VirtualNode, chance: random.Random) -> None:
    """One more fault from now on, of a kind real drivers have shown."""
    length_ns = chance.choice([1, 5, 30, 120, 900, 4000]) * SECOND_NS
    gpu = chance.randrange(GPUS)
    match chance.randrange(8):
        case 0:
            node.driver.inject(Fault(kind="lost", for_ns=length_ns), gpu)
        case 1:
            node.driver.inject(Fault(kind="vanish", for_ns=length_ns), gpu)
        case 2:
            node.driver.inject(Fault(kind="counter_reset"), gpu)
        case 3:
            node.driver.inject(Fault(kind="nan", for_ns=length_ns), gpu)
        case 4:
            metrics = frozenset(chance.sample(range(248, 261), 3))
            node.driver.inject(
                Fault(kind="metric_error", for_ns=length_ns, metrics=metrics, code=3), gpu
            )
        case 5:
            function = frozenset({chance.choice(FUNCTIONS)})
            code = chance.choice(CODES)
            node.driver.inject(
                Fault(kind="error", for_ns=length_ns, functions=function, code=code), gpu
            )
        case 6:
            node.kill_agent(chance.choice([0, 3, 40, 700, 5000]))
        case _:
            node.clock.step_ns += chance.choice([-90, -2, 2, 90]) * SECOND_NS


def footprint() -> tuple[float, int]:
    """Resident MiB and open file descriptors of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, descriptors


def soak(seed: int, hours: int, tick_seconds: int) -> None:
    """Run, drain every ten minutes, and hold the sums against the truth."""
    chance = random.Random(seed)
    ledger = VirtualLedger()
    with VirtualNode(scenario(chance, hours), seed=seed, tick_ns=tick_seconds * SECOND_NS) as node:
        start_ns = node.clock.boottime_ns()
        early: tuple[float, int] | None = None
        while node.clock.boottime_ns() - start_ns < hours * HOUR_SECONDS * SECOND_NS:
            node.run_ticks(600 // tick_seconds)
            if chance.random() < 0.5:
                trouble(node, chance)
            if chance.random() < 0.2:
                node.driver.clear_faults()
            ledger.take(node.drain())
            if early is None and node.clock.now_ns > hours * HOUR_SECONDS * SECOND_NS // 3:
                early = footprint()
        node.driver.clear_faults()
        node.run_ticks(7200 // tick_seconds)
        node.stop()
        ledger.take(node.drain())
        late = footprint()
        spans = ledger.spans
        truth = {
            uuid: node.driver.truth_between(found[0][0] * 1_000_000, found[-1][1] * 1_000_000)
            for uuid, found in ((uuid, sorted(spans[uuid])) for uuid in spans)
        }
    assert len(spans) == GPUS
    ledger.require_tiles()
    for uuid in spans:
        _holds(ledger, uuid, truth[uuid])
    assert early is not None
    assert late[0] - early[0] < GROWTH_MIB_MAX
    assert late[1] <= early[1]


def _holds(ledger: VirtualLedger, uuid: str, truth: Truth) -> None:
    true = next(gpu for gpu in truth.gpus if gpu.uuid == uuid)
    low_mj, high_mj = ledger.energy_of(uuid)
    assert low_mj <= true.whole.energy_mj <= (high_mj or 0)
    flop = sum(
        true.owners[name].active_cycles["hmma"] * rate
        for name, rate in PRECISIONS.items()
        if name in true.owners
    )
    bounds = ledger.work_of(uuid).flop
    assert bounds.high is not None
    assert bounds.low <= flop <= bounds.high
    metered = sum(
        sums.get("elapsed", 0) for (device, _), sums in ledger.sums.items() if device == uuid
    )
    assert metered <= true.whole.elapsed_cycles, "no cycle is invented"
    assert set(true.whole.active_cycles) == set(PIPES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_day_of_faults_loses_and_invents_nothing(seed: int) -> None:
    """24 simulated hours, a sample every ten seconds, random faults, kills and clock steps."""
    soak(seed, 24, 10)


@pytest.mark.nightly
def test_a_day_at_one_sample_a_second() -> None:
    """The same at the agent's own rhythm."""
    soak(3, 24, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 110))
def test_ten_more_days(seed: int) -> None:
    """Other seeds."""
    soak(seed, 24, 10)
