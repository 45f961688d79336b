"""Under a virtual clock the metered cycles, FLOP and joules equal the simulated truth."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flopledger_core.accelerators import load_table
from flopledger_core.energy import energy_bounds
from flopledger_core.flop import basis, work
from flopledger_core.records import PIPES, GapRecord, UsageRecord
from tests.end_to_end.virtual_node import VirtualNode

TABLE = load_table()
H100 = "NVIDIA H100 80GB HBM3"
PROJECT_OF = {"train": "atlas", "tune": "birch"}
# Whose a process's work is; work of none that can be seen is idle only where nothing was active.
OWNERS = {"train": ("atlas",), "tune": ("birch",), None: ("idle", "unattributed")}
PROCESSES: dict[str, object] = {
    "train": {"pid": 10_000_001, "user": "alice", "create_time_unix": 1,
              "environ": {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_PRECISION": "bf16"}},
    "tune": {"pid": 10_000_002, "user": "bob", "create_time_unix": 1,
             "environ": {"FLOPLEDGER_PROJECT": "birch", "FLOPLEDGER_PRECISION": "fp8",
                         "FLOPLEDGER_ACTIVITY": "sft"}},
}  # fmt: skip


def phase(seconds: int, owners: list[str], hmma: float = 0.5, **more: object) -> dict[str, object]:
    """A stretch of steady work."""
    return {"seconds": seconds, "sm_clock_mhz": 1700, "power_watts": 612.5, "sm_active": 0.98,
            "pipes": {"hmma": hmma, "fp32": 0.02}, "processes": owners, **more}  # fmt: skip


def scenario(*gpus: list[dict[str, object]], **more: object) -> dict[str, object]:
    """A node of H100s."""
    return {"driver_version": "595.71.05", "processes": PROCESSES,
            "gpus": [{"model": H100, "phases": phases} | more for phases in gpus]}  # fmt: skip


def metered(records: list[UsageRecord], accounts: tuple[str, ...], name: str) -> int:
    """One quantity of some accounts over all records."""
    mine = [record for record in records if record.owner.account in accounts]
    if name == "energy_mj":
        return sum(record.energy_mj or 0 for record in mine)
    return sum(getattr(record.cycles, name) or 0 for record in mine)


def usage_only(records: list[Any]) -> list[UsageRecord]:
    """The usage records; anything else would be a gap nobody caused."""
    assert not [record for record in records if isinstance(record, GapRecord)]
    return [record for record in records if isinstance(record, UsageRecord)]


@st.composite
def schedules(draw: st.DrawFn) -> list[dict[str, object]]:
    """Random work of one GPU: owners and levels change at whole seconds."""
    return [
        phase(
            draw(st.integers(1, 70)),
            draw(st.sampled_from([[], ["train"], ["tune"]])),
            level := draw(st.sampled_from([0.0, 0.25, 0.5, 0.75])),
            sm_active=0.98 if level else 0.0,
            pipes={"hmma": level, "fp32": 0.02 if level else 0.0},
            sm_clock_mhz=draw(st.integers(3, 19)) * 100,
            power_watts=draw(st.integers(80, 700)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(schedules(), min_size=1, max_size=2))
def test_cycles_and_energy_are_exact_with_cycle_counters(
    gpus: list[list[dict[str, object]]],
) -> None:
    """Every project's SM-cycles per pipe and millijoules equal the truth to the last digit."""
    with VirtualNode(scenario(*gpus)) as node:
        node.run(150)
        node.stop()
        records = [record for record in usage_only(node.records()) if record.tier == "gpm_cycles"]
        truth = node.truth_of(records)

    for process, projects in OWNERS.items():
        true = truth.owner(process)
        assert metered(records, projects, "elapsed") == true.elapsed_cycles
        assert metered(records, projects, "energy_mj") == true.energy_mj
        for pipe in PIPES:
            assert metered(records, projects, pipe) == true.active_cycles.get(pipe, 0), pipe
    assert not any(metered(records, ("idle",), name) for name in ("sm_active", *PIPES))
    hidden_ms = sum(record.gpu_time_ms for record in records if record.owner.kind == "unattributed")
    resting = [record for record in records if record.owner.kind == "idle"]
    assert all(record.attribution.evidence == "no process on the device" for record in resting)
    assert (hidden_ms > 0) == bool(metered(records, ("unattributed",), "sm_active"))


def test_flop_is_exact_where_precision_is_declared() -> None:
    """Central FLOP of a BF16 job is the true cycles times the table's rates, exactly."""
    with VirtualNode(scenario([phase(120, ["train"])])) as node:
        node.run(120)
        node.stop()
        records = usage_only(node.records())
        true = node.truth_of(records).owner("train")
    flop = sum(
        work(basis(record), table=TABLE, accelerator=TABLE.by_key("H100 SXM"),
             device_name=H100, precision=record.precision).flop.central
        for record in records
    )  # fmt: skip

    assert flop == true.active_cycles["hmma"] * 4096 + true.active_cycles["fp32"] * 256
    assert {record.cycles_origin for record in records} == {"measured"}


@pytest.mark.parametrize("driver", ["580.65.06", "590.48.01"])
def test_utilisation_gives_cycles_to_a_billionth(driver: str) -> None:
    """Drivers without cycle counters: ratios times SMs times clock, within 1e-9 of the truth."""
    phases = [phase(40, ["train"], 0.6), phase(50, ["tune"], 0.31, sm_clock_mhz=1455),
              phase(30, [])]  # fmt: skip
    with VirtualNode(scenario(phases) | {"driver_version": driver}) as node:
        node.run(118)
        node.stop()
        records = usage_only(node.records())
        truth = node.truth_of(records)

    assert {record.tier for record in records} == {"gpm_util"}
    assert {record.cycles_origin for record in records} == {"derived"}
    for process, projects in OWNERS.items():
        true = truth.owner(process)
        for name, expected in {"elapsed": true.elapsed_cycles, **true.active_cycles}.items():
            found = metered(records, projects, name)
            assert abs(found - expected) <= Fraction(expected, 10**9), (process, name)
        assert metered(records, projects, "energy_mj") == true.energy_mj
    assert metered(records, ("idle",), "sm_active") == 0


def test_a_killed_agent_recovers_cycles_and_energy() -> None:
    """The open window comes back from disk; the dark time from the counters, flagged, nobody's."""
    with VirtualNode(scenario([phase(400, ["train"])])) as node:
        node.run(90)
        node.kill_agent(dark_seconds=100)
        node.run(60)
        node.stop()
        records = usage_only(node.records())
        true = node.truth_of(records).owner("train")
    dark = [record for record in records if "recovered" in record.flags]

    assert sum(record.cycles.hmma or 0 for record in records) == true.active_cycles["hmma"]
    assert sum(record.energy_mj or 0 for record in records) == true.energy_mj
    assert sum(record.gpu_time_ms for record in records) * 1_000_000 == true.gpu_time_ns
    assert {record.owner.kind for record in dark} == {"unattributed"}
    assert len(dark) == 1


def test_without_cycle_counters_dark_time_is_bounded_not_guessed() -> None:
    """Percentages cannot bridge: energy is recovered, cycles are absent and bounded by the peak."""
    plain = scenario([phase(400, ["train"])]) | {"driver_version": "580.65.06"}
    with VirtualNode(plain) as node:
        node.run(30)
        node.kill_agent(dark_seconds=100)
        node.run(30)
        node.stop()
        records = usage_only(node.records())
        truth = node.truth_of(records).owner("train")
    total = [
        work(basis(record), table=TABLE, accelerator=TABLE.by_key("H100 SXM"),
             device_name=H100, precision=record.precision).flop
        for record in records
    ]  # fmt: skip
    true_flop = truth.active_cycles["hmma"] * 4096 + truth.active_cycles["fp32"] * 256

    assert sum(record.energy_mj or 0 for record in records) == truth.energy_mj
    assert sum(flop.low for flop in total) <= true_flop
    assert true_flop <= sum(flop.high or 0 for flop in total)
    assert any("recovered" in record.flags and record.cycles.elapsed is None for record in records)


def test_shared_devices_conserve_the_truth() -> None:
    """Two jobs on one GPU: which part was whose is a rule, their sum is the truth."""
    with VirtualNode(scenario([phase(120, ["train", "tune"])])) as node:
        node.run(120)
        node.stop()
        records = usage_only(node.records())
        truth = node.truth_of(records)
    whole = truth.owner("train").active_cycles["hmma"] + truth.owner("tune").active_cycles["hmma"]

    assert sum(record.cycles.hmma or 0 for record in records) == whole
    assert all("shared" in record.flags for record in records)


@pytest.mark.parametrize("kind", ["lost", "error", "counter_reset"])
def test_driver_faults_leave_bounds_that_contain_the_truth(kind: str) -> None:
    """Whatever the driver does for a while, time is conserved and the truth stays in the bounds."""
    fault: dict[str, object] = {"kind": kind, "at_seconds": 30.0}
    if kind != "counter_reset":
        fault["for_seconds"] = 40.0
    if kind == "error":
        fault["code"] = 999
    with VirtualNode(scenario([phase(400, ["train"])], faults=[fault])) as node:
        node.run(150)
        node.stop()
        records = node.records()
        usage = [record for record in records if isinstance(record, UsageRecord)]
        truth = node.truth_of(usage).owner("train")
    flops = [
        work(basis(record), table=TABLE, accelerator=TABLE.by_key("H100 SXM"),
             device_name=H100, precision=record.precision).flop
        for record in records
    ]  # fmt: skip
    true_flop = truth.active_cycles["hmma"] * 4096 + truth.active_cycles["fp32"] * 256
    time_ms = sum(getattr(record, "gpu_time_ms", 0) + getattr(record, "gap_ms", 0)
                  for record in records)  # fmt: skip

    assert time_ms * 1_000_000 == truth.gpu_time_ns
    assert sum(flop.low for flop in flops) <= true_flop <= sum(flop.high or 0 for flop in flops)


def bounds_of(records: list[Any], project: str, row: str = "H100 SXM") -> tuple[int, int]:
    """Low and high FLOP of a project's records."""
    flops = [
        work(basis(record), table=TABLE, accelerator=TABLE.by_key(row), device_name=row,
             precision=record.precision).flop
        for record in records
        if record.owner.account == project
    ]  # fmt: skip
    return sum(flop.low for flop in flops), sum(flop.high or 0 for flop in flops)


def flop_of(integrals: Any) -> Fraction:
    """True FLOP of BF16 work on an H100."""
    return Fraction(integrals.active_cycles["hmma"] * 4096 + integrals.active_cycles["fp32"] * 256)


def test_bounds_contain_the_truth_of_every_sharer() -> None:
    """Nine tenths and one tenth, split by rule into halves: both truths lie within the bounds."""
    steady = phase(120, ["train", "other"], shares={"train": 9, "other": 1})
    world = scenario([steady])
    world["processes"] = PROCESSES | {
        "other": {"pid": 10_000_003, "create_time_unix": 1,
                  "environ": {"FLOPLEDGER_PROJECT": "cedar", "FLOPLEDGER_PRECISION": "bf16"}},
    }  # fmt: skip
    with VirtualNode(world) as node:
        node.run(120)
        node.stop()
        records = usage_only(node.records())
        truth = node.truth_of(records)
    for process, project in (("train", "atlas"), ("other", "cedar")):
        low, high = bounds_of(records, project)
        true = truth.owner(process)
        energies = [
            energy_bounds(basis(record), TABLE.by_key("H100 SXM"))
            for record in records
            if record.owner.account == project
        ]

        assert low <= flop_of(true) <= high
        assert sum(found.low for found in energies) <= true.energy_mj
        assert true.energy_mj <= sum(found.high or 0 for found in energies)


@pytest.mark.parametrize(
    ("model", "row", "driver"),
    [(H100, "H100 SXM", "580.65.06"), ("NVIDIA A100-SXM4-80GB", "A100 SXM", "595.71.05")],
)
def test_bounds_contain_the_truth_when_the_clock_moves_inside_a_tick(
    model: str, row: str, driver: str
) -> None:
    """Busy at a high clock, read at a low one: percentages alone cannot say, the bounds can."""
    busy = {"seconds": 0.9, "sm_clock_mhz": 1980 if row == "H100 SXM" else 1410,
            "power_watts": 400, "sm_active": 0.98, "pipes": {"hmma": 0.8, "fp32": 0.02},
            "processes": ["train"]}  # fmt: skip
    pause = busy | {"seconds": 0.1, "sm_clock_mhz": 345, "pipes": {"hmma": 0.0}}
    world: dict[str, object] = {
        "driver_version": driver, "processes": PROCESSES,
        "gpus": [{"model": model, "phases": [busy, pause] * 60}],
    }  # fmt: skip
    with VirtualNode(world) as node:
        node.run(60)
        node.stop()
        records = usage_only(node.records())
        true = node.truth_of(records).owner("train")
    low, high = bounds_of(records, "atlas", row)
    rate = 4096 if row == "H100 SXM" else 2048
    fp32 = 256 if row == "H100 SXM" else 128
    true_flop = true.active_cycles["hmma"] * rate + true.active_cycles["fp32"] * fp32

    assert low <= true_flop <= high


def test_a_driver_reset_in_the_dark_stays_within_the_bounds() -> None:
    """Counters that restarted and overtook themselves look whole: the high end allows for it."""
    fault = {"kind": "counter_reset", "at_seconds": 70.0}
    with VirtualNode(scenario([phase(400, ["train"])], faults=[fault])) as node:
        node.run(20)
        node.kill_agent(dark_seconds=200)
        node.run(20)
        node.stop()
        records = usage_only(node.records())
        true = node.truth_of(records).owner("train")
    everyone = [bounds_of(records, account) for account in ("atlas", "unattributed")]
    energies = [energy_bounds(basis(record), TABLE.by_key("H100 SXM")) for record in records]

    assert sum(low for low, _ in everyone) <= flop_of(true) <= sum(high for _, high in everyone)
    assert true.energy_mj <= sum(found.high or 0 for found in energies)
