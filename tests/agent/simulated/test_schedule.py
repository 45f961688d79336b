"""The integer path that serves counters equals the exact integrals, for any schedule."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.simulated.devices import Device
from flopledger_agent.gpus.simulated.scenario import build_scenario
from flopledger_agent.gpus.simulated.schedule import ENERGY, POSITIONS
from flopledger_agent.gpus.simulated.truth import NOTHING, Integrals, gpu_truth
from flopledger_core.records import PIPES

RATIOS = st.integers(0, 997).map(lambda n: Fraction(n, 3 * 997))
PHASES = st.fixed_dictionaries(
    {
        "seconds": st.integers(1, 10**13).map(lambda ns: Fraction(ns, 10**9)),
        "sm_clock_mhz": st.integers(0, 3000),
        "power_watts": st.fractions(0, 2000, max_denominator=997),
        "sm_active": RATIOS,
        "pipes": st.dictionaries(st.sampled_from(PIPES), RATIOS),
        "processes": st.lists(st.sampled_from(("a", "b", "c")), unique=True),
        "weights": st.tuples(*[st.integers(1, 7)] * 3),
    }
)
INSTANTS = st.integers(0, 10**14)


def _device(phases: list[dict[str, object]]) -> Device:
    for phase in phases:
        names, weights = phase["processes"], phase.pop("weights")
        assert isinstance(names, list)
        assert isinstance(weights, tuple)
        phase["shares"] = dict(zip(names, weights, strict=False))
    gpu = {"model": "NVIDIA H100 80GB HBM3", "phases": phases}
    scenario = build_scenario({"gpus": [gpu], "processes": {"a": {}, "b": {}, "c": {}}})
    return Device(0, scenario.gpus[0], scenario.processes, 0)


def _plain_integrals(device: Device, at_ns: int, owner: str | None) -> dict[str, Fraction]:
    """The definition itself: phase by phase in Fractions, for one owner of the GPU (None: idle)."""
    names = ("time", "elapsed", "sm_active", *PIPES, "energy")
    sums = dict.fromkeys(names, Fraction(0))
    left_ns = at_ns
    for phase in (*device.gpu.phases, device.gpu.idle):
        last = phase is device.gpu.idle
        length_ns = left_ns if last else min(left_ns, phase.duration_ns)
        left_ns -= length_ns
        time_ns = dict(phase.owners or ((None, Fraction(1)),)).get(owner, Fraction(0)) * length_ns
        elapsed = device.gpu.sm_count * phase.sm_clock_mhz * 10**6 * time_ns / 10**9
        sums["time"] += time_ns
        sums["elapsed"] += elapsed
        sums["sm_active"] += phase.sm_active * elapsed
        for pipe in PIPES:
            sums[pipe] += phase.pipes[pipe] * elapsed
        sums["energy"] += phase.power_watts * 1000 * time_ns / 10**9
    return sums


def _as_dict(integrals: Integrals) -> dict[str, Fraction]:
    return {
        "time": integrals.gpu_time_ns,
        "elapsed": integrals.elapsed_cycles,
        "sm_active": integrals.sm_active_cycles,
        **integrals.active_cycles,
        "energy": integrals.energy_mj,
    }


@given(st.lists(PHASES, max_size=6), INSTANTS)
def test_counters_equal_the_exact_integrals(phases: list[dict[str, object]], at_ns: int) -> None:
    """Numerator / denominator is the Fraction integral, with no rounding at all."""
    device = _device(phases)
    schedule = device.schedule
    owners = [_plain_integrals(device, at_ns, owner) for owner in (None, "a", "b", "c")]
    plain = {name: sum((o[name] for o in owners), Fraction(0)) for name in owners[0]}
    counters = schedule.counters(at_ns)
    for name in ("elapsed", "sm_active", *PIPES):
        assert Fraction(counters[POSITIONS[name]], schedule.cycle_denominator) == plain[name]
    assert Fraction(counters[ENERGY], schedule.energy_denominator) == plain["energy"]
    assert device.energy_mj(at_ns) == math.floor(plain["energy"])
    assert [schedule.counter(i, at_ns) for i in range(len(counters))] == counters


@given(st.lists(PHASES, max_size=6), INSTANTS)
def test_truth_equals_the_exact_integrals(phases: list[dict[str, object]], at_ns: int) -> None:
    """Per owner and as a whole."""
    device = _device(phases)
    truth = gpu_truth(0, device.gpu, device.schedule, 0, at_ns)
    owners = {o: _plain_integrals(device, at_ns, o) for o in (None, "a", "b", "c")}
    for owner, plain in owners.items():
        assert _as_dict(truth.owners.get(owner, NOTHING)) == plain
    for name, amount in _as_dict(truth.whole).items():
        assert amount == sum((plain[name] for plain in owners.values()), Fraction(0))


@given(st.lists(PHASES, max_size=6), st.tuples(INSTANTS, INSTANTS, INSTANTS).map(sorted))
def test_truth_adds_over_time_and_over_owners(
    phases: list[dict[str, object]], instants: list[int]
) -> None:
    """Adjacent windows add up, and owners (idle included) sum to the GPU exactly."""
    device = _device(phases)
    start, middle, end = instants
    window = gpu_truth(0, device.gpu, device.schedule, start, end)
    left = gpu_truth(0, device.gpu, device.schedule, start, middle)
    right = gpu_truth(0, device.gpu, device.schedule, middle, end)
    assert window.whole == left.whole + right.whole
    assert window.whole == sum(window.owners.values(), NOTHING)
    assert window.whole.gpu_time_ns == end - start


@given(st.lists(PHASES, min_size=1, max_size=4))
def test_readings_at_an_edge_show_what_was_before_it(phases: list[dict[str, object]]) -> None:
    """Left limits: at a phase's end its own clock, at the scenario's start the idle one."""
    device = _device(phases)
    edge_ns = 0
    assert device.schedule.state_before(0) is device.gpu.idle
    for phase in device.gpu.phases:
        edge_ns += phase.duration_ns
        assert device.schedule.state_before(edge_ns) is phase
    assert device.schedule.state_before(edge_ns + 1) is device.gpu.idle
