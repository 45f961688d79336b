"""Counters beyond 2^53 are doubles that skip whole numbers: what they hide stays in the bounds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flopledger_core.accelerators import load_table
from flopledger_core.flop import basis, work
from flopledger_core.records import PIPES, UsageRecord
from tests.end_to_end.virtual_node import VirtualNode

TABLE = load_table()
H100 = "NVIDIA H100 80GB HBM3"


def scenario(offset: int, scale: str, *, hmma: float, clock_mhz: int) -> dict[str, object]:
    """One H100 with one BF16 job, whose counters have run for long."""
    pipes = {"hmma": hmma, "imma": 0.01, "fp32": 0.02}
    phase = {"seconds": 400, "sm_clock_mhz": clock_mhz, "power_watts": 612, "sm_active": 0.98,
             "pipes": pipes, "processes": ["train"]}  # fmt: skip
    gpu = {"model": H100, "phases": [phase], "cycles_offset": offset, "cycle_scale": scale}
    environ = {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_PRECISION": "bf16"}
    process = {"pid": 10_000_001, "create_time_unix": 1, "environ": environ}
    return {"driver_version": "595.71.05", "gpus": [gpu], "processes": {"train": process}}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    offset=st.one_of(st.integers(2**53 - 10**13, 2**53), st.integers(2**53, 2**60)),
    scale=st.sampled_from(["sum", "mean"]),
    hmma=st.sampled_from([0.0, 0.25, 0.61]),
    clock_mhz=st.integers(345, 1980),
)
def test_bounds_contain_the_truth_that_doubles_round_away(
    offset: int, scale: str, hmma: float, clock_mhz: int
) -> None:
    """Every record says how far its cycles may be off; energy is exact whatever they do."""
    with VirtualNode(scenario(offset, scale, hmma=hmma, clock_mhz=clock_mhz)) as node:
        node.run(70)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]
        mine = [record for record in records if record.tier == "gpm_cycles"]
        true = node.truth_of(mine).gpus[0].whole
    uncertain = sum(record.uncertain_cycles for record in mine)
    for pipe in PIPES:
        counted = sum(getattr(record.cycles, pipe) or 0 for record in mine)
        # A record holds whole cycles: less than one of each is cut off.
        assert abs(counted - true.active_cycles[pipe]) <= uncertain + len(mine), pipe
    done = [
        work(basis(record), table=TABLE, accelerator=TABLE.by_key("H100 SXM"), device_name=H100,
             precision=record.precision).flop
        for record in mine
    ]  # fmt: skip
    true_flop = true.active_cycles["hmma"] * 4096 + true.active_cycles["fp32"] * 256
    assert sum(flop.low for flop in done) <= true_flop <= sum(flop.high or 0 for flop in done)
    assert sum(record.energy_mj or 0 for record in mine) == true.energy_mj


@pytest.mark.parametrize(("offset", "scale", "per_end"), [(0, "sum", 0), (2**60, "sum", 128)])
def test_the_uncertainty_of_a_record_is_that_of_its_two_ends(
    offset: int, scale: str, per_end: int
) -> None:
    """It does not grow with the seconds between."""
    with VirtualNode(scenario(offset, scale, hmma=0.5, clock_mhz=1755)) as node:
        node.run(50)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]
    assert {record.uncertain_cycles for record in records} == {2 * per_end}
