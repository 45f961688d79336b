"""Complaints about other meters that a reading of ours must not earn, by their row in the list.

The rows are those of section 8 of the reference on peers: 1 sentinel values exported as readings,
2 absent read as zero, 6 one bad field that loses the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_agent.gpus.gpm import COUNTERS, PERCENTAGES
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.nvml_errors import ERRORS, remedy_for
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.functions import gpm
from flopledger_core.records import CYCLE_FIELDS
from tests.agent.gpus.nodes import node, scenario

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample

R580: Final = 'driver_version = "580.65.06"'
SENTINELS: Final = (2**32 - 1, 2**64 - 1, 2**31 - 1, 2**63 - 1, 2**32 - 2, -1)
POSSIBLE_ENERGIES: Final = (2**31 - 1, 2**32 - 2)  # weeks of a GPU, in millijoules
# Field of a sample -> the driver's functions that it comes from.
FIELDS: Final = {
    "energy_mj": ("nvmlDeviceGetTotalEnergyConsumption",),
    "power_mw": ("nvmlDeviceGetPowerUsage",),
    "sm_clock_khz": ("nvmlDeviceGetClockInfo", "nvmlDeviceGetSamples"),
    "processes": (
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetComputeRunningProcesses_v2",
    ),
}
FIELD_CODES: Final = sorted(code for code, each in ERRORS.items() if each.scope == "field")


def told(sample: GpuSample) -> dict[str, object]:
    """What a sample says of the fields that one call each tells."""
    return {name: getattr(sample, name) for name in FIELDS}


@pytest.mark.parametrize("value", SENTINELS)
@pytest.mark.parametrize("field", ["energy_mj", "power_mw", "sm_clock_khz"])
def test_peers_row_1_a_sentinel_is_never_a_reading(
    field: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks of absence, their neighbours and wrapped numbers are absent with a reason."""
    if field == "energy_mj" and value in POSSIBLE_ENERGIES:
        return
    monkeypatch.setattr(Nvml, field, lambda *_: value)
    with node() as it:
        (sample,) = it.warm().samples
        assert getattr(sample, field) is None
        assert sample.absent[field] in {"not_available", "out_of_range"}
        assert sample.tier == "gpm_cycles"


@pytest.mark.parametrize("value", [float("nan"), -1.0, 2.0**63, float("inf"), 101.5])
def test_peers_row_1_a_sentinel_among_the_metrics_is_never_activity(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a number, a blank of another tool, a full register: no ratio and no cycles."""
    whole = gpm._answers

    def spoilt(*arguments: Any) -> list[int | float]:
        answers = whole(*arguments)
        for place in range(0, len(answers), 6):
            if answers[place] in {COUNTERS["hmma"], PERCENTAGES["hmma"]}:
                answers[place + 2] = value
        return answers

    monkeypatch.setattr(gpm, "_answers", spoilt)
    for head in ("", R580):
        with node(scenario(head=head)) as it:
            (sample,) = it.warm().samples
            if sample.cycles is not None and sample.cycles.hmma is not None:
                # Only 101.5 is a possible count of cycles.
                assert value == 101.5
            elif sample.cycles is not None:
                assert sample.absent["cycles.hmma"] in {"not_a_number", "out_of_range"}
            else:
                assert sample.utilization is not None
                assert "hmma" not in sample.utilization
                assert sample.absent["utilization.hmma"] in {"not_a_number", "out_of_range"}


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(FIELDS)), st.sampled_from(FIELD_CODES), st.sampled_from(["", R580]))
def test_peers_row_2_what_could_not_be_read_is_absent_and_not_zero(
    field: str, code: int, head: str
) -> None:
    """Every error of the driver leaves the field None with a reason that has a remedy."""
    with node(scenario(head=head)) as it:
        it.driver.inject(Fault(kind="error", code=code, functions=frozenset(FIELDS[field])))
        (sample,) = it.warm().samples
        assert getattr(sample, field) is None
        assert sample.absent[field] == ERRORS[code].reason
        assert remedy_for(sample.absent[field]) is not None


@settings(deadline=None, max_examples=20)
@given(st.sets(st.sampled_from(sorted(COUNTERS)), min_size=1))
def test_peers_row_2_an_unread_counter_is_not_a_counter_at_zero(fields: set[str]) -> None:
    """DCGM's profiling counters read 0 after an error while the GPU was busy; ours are absent."""
    with node() as it:
        it.warm()
        wrong = frozenset(COUNTERS[name] for name in fields)
        it.driver.inject(Fault(kind="metric_error", code=999, metrics=wrong))
        (sample,) = it.tick().samples
        if sample.cycles is None:
            assert sample.tier == "gpm_util"
            assert sample.absent["cycles"] == "unknown_error"
            return
        for name in CYCLE_FIELDS:
            value = getattr(sample.cycles, name)
            assert (value is None) == (name in fields), name
            assert (f"cycles.{name}" in sample.absent) == (name in fields), name


def test_peers_row_2_zero_needs_a_successful_read() -> None:
    """An idle device shows true zeros, and nothing of it is absent."""
    with node(scenario(phase="")) as it:
        (first,) = it.warm().samples
        (last,) = it.tick().samples
        assert first.cycles is not None
        assert last.cycles is not None
        assert last.cycles.hmma == first.cycles.hmma == 0
        assert (last.cycles.elapsed or 0) > (first.cycles.elapsed or 0)
        assert last.absent == {}


@pytest.mark.parametrize("field", sorted(FIELDS))
@pytest.mark.parametrize("code", [3, 4, 6, 13, 999])
def test_peers_row_6_one_bad_field_costs_only_itself(field: str, code: int) -> None:
    """The other fields, the cycles and the other GPU say what they said before."""
    with node(scenario("", "")) as it:
        whole = it.warm()
        it.driver.inject(Fault(kind="error", code=code, functions=frozenset(FIELDS[field])), gpu=0)
        tick = it.tick()
        assert (tick.failures, tick.failure) == ((), None)
        bad, good = tick.samples
        assert good.absent == {}
        assert bad.tier == good.tier == "gpm_cycles"
        expected = told(good) | {field: None}
        assert told(bad) == expected
        assert set(bad.absent) == {field}
        assert len(whole.samples) == 2


def test_peers_row_6_every_field_bad_but_one_is_still_a_sample() -> None:
    """What is left is told."""
    functions = frozenset(name for names in FIELDS.values() for name in names)
    with node() as it:
        it.warm()
        it.driver.inject(Fault(kind="error", code=3, functions=functions))
        (sample,) = it.tick().samples
        assert sample.cycles is not None
        assert set(sample.absent) == set(FIELDS)
