"""What users of other meters complain of, held against the whole agent: a test per complaint.

The rows are those of the peers' issue trackers: 1 sentinel exported, 2 absent read as zero, 3 a
shared GPU counted per tenant, 4 MIG energy repeated, 5 one sampler per rank, 6 one bad field kills
the page, 7 a wedged driver hangs the agent, 8 stale values under green health, 14 memory growth,
15 profiler conflict, 16 two surfaces disagree, 17 peak tables mixed, 18 utilisation sold as FLOP,
19 a crash loses the run, 20 counters that wrap, reset or cover another scope.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.gpus import simulated
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.source import NvmlSource
from flopledger_core.accelerators import load_table
from flopledger_core.basis import basis
from flopledger_core.flop import work
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.sampling import SECOND_NS, TestClock
from tests.end_to_end.virtual_node import VirtualNode
from tests.faults.test_soak import soak

if TYPE_CHECKING:
    from collections.abc import Iterable

SAMPLING_ROWS: Final = (*range(1, 9), *range(14, 21))
H200: Final = "NVIDIA H200"
A100: Final = "NVIDIA A100-SXM4-80GB"
DEADLINE_SECONDS: Final = 0.3
PROCESSES: Final[dict[str, object]] = {
    "train": {"pid": 10_000_001, "create_time_unix": 1,
              "environ": {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_PRECISION": "bf16"}},
    "serve": {"pid": 10_000_002, "create_time_unix": 1,
              "environ": {"FLOPLEDGER_PROJECT": "birch"}},
}  # fmt: skip


def scenario(model: str, owners: list[str], gpus: int = 1) -> dict[str, object]:
    """Steady work for two hours."""
    phase = {"seconds": 7200, "sm_clock_mhz": 1400, "power_watts": 390, "sm_active": 0.9,
             "gpu_active": 1, "pipes": {"hmma": 0.4}, "processes": owners}  # fmt: skip
    return {"driver_version": "595.71.05", "processes": PROCESSES,
            "gpus": [{"model": model, "phases": [phase]} for _ in range(gpus)]}  # fmt: skip


def usage_of(records: Iterable[object]) -> list[UsageRecord]:
    """The usage among records."""
    return [record for record in records if isinstance(record, UsageRecord)]


def test_peers_row_3_a_shared_gpu_is_booked_once_and_split() -> None:
    """Two tenants of a GPU get its time and energy together, not each."""
    with VirtualNode(scenario(H200, ["train", "serve"])) as node:
        node.run(120)
        node.stop()
        records = usage_of(node.records())
        truth = node.truth_of(records).gpus[0].whole
    assert {record.owner.account for record in records} == {"atlas", "birch"}
    assert all("shared" in record.flags for record in records)
    assert sum(record.energy_mj or 0 for record in records) == truth.energy_mj
    assert sum(record.gpu_time_ms for record in records) * 1_000_000 == truth.gpu_time_ns
    assert sum(record.cycles.elapsed or 0 for record in records) == truth.elapsed_cycles


def test_peers_row_7_a_wedged_driver_call_holds_up_nobody() -> None:
    """A call that never returns costs its own GPU; the tick ends, the others are read."""
    clock = TestClock()
    content = scenario(H200, ["train"], gpus=3) | {"start_boottime_ns": clock.boottime_ns()}
    with simulated.install(simulated.build_scenario(content), clock) as driver:
        source = NvmlSource(clock, load_table(), deadline_seconds=DEADLINE_SECONDS)
        for _ in range(5):
            source.sample()
            clock.now_ns += SECOND_NS
        driver.inject(Fault(kind="hang"), 1)
        durations: list[float] = []
        for _ in range(4):
            clock.now_ns += SECOND_NS
            began = time.monotonic()
            node = source.sample()
            durations.append(time.monotonic() - began)
            assert len(node.samples) == 2
            assert [failure.reason for failure in node.failures] == ["timeout"]
        driver.release_hangs()
        source.close()
    assert min(durations[1:]) < DEADLINE_SECONDS, "a later tick waits for the hung GPU again"


def test_peers_row_14_a_working_day_grows_neither_memory_nor_descriptors() -> None:
    """Eight hours of faults end with the footprint they had after the first third."""
    soak(seed=14, hours=8, tick_seconds=10)


def test_peers_row_18_utilisation_is_an_upper_bound_and_says_so() -> None:
    """The coarse tier names itself, claims nothing at the low end and holds the truth."""
    table = load_table()
    with VirtualNode(scenario(A100, ["train"])) as node:
        node.run(120)
        node.stop()
        records = [record for record in usage_of(node.records()) if record.tier != "none"]
        truth = node.truth_of(records).gpus[0].whole
    assert {record.tier for record in records} == {"gpu_util"}
    row = table.resolve(A100)
    bounds = [
        work(basis(record), table=table, accelerator=row, device_name=A100,
             precision=record.precision).flop
        for record in records
    ]  # fmt: skip
    assert all(found.low == 0 for found in bounds)
    assert sum(found.high or 0 for found in bounds) >= truth.active_cycles["hmma"] * 2048
    estimates = [record.estimate for record in records]
    assert {found.peak_basis for found in estimates if found} == {"dense_at_sampled_clock"}


def test_peers_row_19_a_crash_keeps_the_run() -> None:
    """What was metered before the agent died is sealed, and the dark time is bridged or a gap."""
    with VirtualNode(scenario(H200, ["train"])) as node:
        node.run(200)
        node.kill_agent(dark_seconds=300)
        node.run(100)
        node.stop()
        records = node.records()
        truth = node.truth_of(records).gpus[0].whole
    metered = usage_of(records)
    assert not [record for record in records if isinstance(record, GapRecord)]
    assert sum(record.energy_mj or 0 for record in metered) == truth.energy_mj
    assert sum(record.cycles.any_tensor or 0 for record in metered) == truth.active_cycles["hmma"]
    assert [record for record in metered if "recovered" in record.flags]


def test_every_complaint_about_sampling_has_a_test_named_after_it() -> None:
    """Rows 1 to 8 and 14 to 20; the name says the row."""
    named = re.compile(r"def test_peers_row_(\d+)_")
    found = {
        int(row)
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for row in named.findall(file.read_text(encoding="utf-8"))
    }
    assert sorted(set(SAMPLING_ROWS) - found) == []
