"""Whatever a node goes through: low <= truth <= high, energy within its bounds, time conserved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_core.records import UsageRecord
from tests.agent.sampling import SECOND_NS
from tests.end_to_end.virtual_ledger import TABLE, VirtualLedger
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated import Truth

SECONDS: Final = 150
MODELS: Final = {
    "NVIDIA H200": ("595.71.05", "580.65.06"),
    "NVIDIA B200": ("595.71.05",),
    "NVIDIA A100-SXM4-80GB": ("580.65.06",),
}
# What a job's tensor cycles really carry out, whatever it declared nothing or the truth.
JOBS: Final[dict[str, dict[str, str]]] = {
    "bf16": {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_PRECISION": "bf16"},
    "tf32": {"FLOPLEDGER_PROJECT": "birch", "FLOPLEDGER_PRECISION": "tf32"},
    "fp16": {"FLOPLEDGER_PROJECT": "cedar"},
}
PIPES: Final = ("hmma", "imma", "dmma", "fp64", "fp32", "fp16", "integer")
FUNCTIONS: Final = (
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlGpmSampleGet",
    "nvmlGpmMetricsGet",
)


@st.composite
def phases(draw: st.DrawFn) -> list[dict[str, object]]:
    """Work whose owners, clock, power and pipes change, also inside a second."""
    result: list[dict[str, object]] = []
    for _ in range(draw(st.integers(1, 6))):
        jobs = draw(st.lists(st.sampled_from(sorted(JOBS)), max_size=2, unique=True))
        busy = {
            pipe: draw(st.sampled_from([0.0, 0.1, 0.3]))
            for pipe in PIPES
            if jobs and draw(st.booleans())
        }
        result.append({
            "seconds": draw(st.sampled_from([0.25, 1, 7.5, 40, 90])),
            "sm_clock_mhz": draw(st.integers(4, 14)) * 100,
            "power_watts": draw(st.integers(60, 390)),
            "sm_active": 0.9 if jobs else 0,
            "gpu_active": 1 if jobs else 0,
            "pipes": busy,
            "processes": jobs,
        })  # fmt: skip
    return result


@st.composite
def faults(draw: st.DrawFn) -> list[Fault]:
    """Faults of the kinds drivers have shown."""
    found: list[Fault] = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(
            st.sampled_from(["lost", "vanish", "counter_reset", "nan", "metric_error", "error"])
        )
        at_ns = draw(st.integers(0, SECONDS)) * SECOND_NS
        for_ns = draw(st.sampled_from([1, 3, 20, 70])) * SECOND_NS
        match kind:
            case "error":
                found.append(Fault(kind="error", at_ns=at_ns, for_ns=for_ns,
                                   functions=frozenset({draw(st.sampled_from(FUNCTIONS))}),
                                   code=draw(st.sampled_from([3, 10, 19, 21, 999]))))  # fmt: skip
            case "metric_error":
                metrics = draw(
                    st.frozensets(st.integers(2, 13) | st.integers(248, 260), max_size=5)
                )
                found.append(Fault(kind="metric_error", at_ns=at_ns, for_ns=for_ns,
                                   metrics=metrics or None, code=3))  # fmt: skip
            case "counter_reset":
                found.append(Fault(kind="counter_reset", at_ns=at_ns))
            case "lost" | "vanish" | _:
                found.append(Fault(kind="lost" if kind == "lost" else "nan" if kind == "nan"
                                   else "vanish", at_ns=at_ns, for_ns=for_ns))  # fmt: skip
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([(model, driver) for model, drivers in MODELS.items() for driver in drivers]),
    phases(),
    faults(),
    st.lists(st.tuples(st.integers(5, 120), st.sampled_from([0, 2, 20, 200])), max_size=2),
)
def test_bounds_contain_the_truth_whatever_happens(
    node_kind: tuple[str, str],
    work_phases: list[dict[str, object]],
    node_faults: list[Fault],
    kills: list[tuple[int, int]],
) -> None:
    """FLOP, integer operations and energy of a GPU lie in their bounds; its time is tiled."""
    model, driver = node_kind
    processes = {
        name: {"pid": 10_000_001 + index, "create_time_unix": 1, "environ": environ}
        for index, (name, environ) in enumerate(JOBS.items())
    }
    scenario = {"driver_version": driver, "processes": processes,
                "gpus": [{"model": model, "phases": work_phases}]}  # fmt: skip
    ledger = VirtualLedger()
    with VirtualNode(scenario) as node:
        for fault in node_faults:
            node.driver.inject(fault, 0)
        done = 0
        for after, dark in sorted(kills):
            node.run(max(0, after - done))
            done = max(done, after)
            node.kill_agent(dark)
        node.run(SECONDS - done)
        node.driver.clear_faults()
        node.run(70)
        node.stop()
        records = node.records()
        ledger.take(node.drain())
        spans = ledger.spans
        if not spans:
            return
        ((uuid, found),) = spans.items()
        first, last = min(found)[0], max(end for _, end in found)
        truth = node.driver.truth_between(first * 1_000_000, last * 1_000_000)
    ledger.require_tiles()
    require_bounds(ledger, uuid, truth, model)
    if not node_faults and not kills and driver.startswith("595"):
        usage = [record for record in records if isinstance(record, UsageRecord)]
        assert sum(record.energy_mj or 0 for record in usage) == int(truth.gpus[0].whole.energy_mj)


def require_bounds(ledger: VirtualLedger, uuid: str, truth: Truth, model: str) -> None:
    """The truth of a GPU's FLOP, integer operations and energy lies in what was metered."""
    row = TABLE.resolve(model, None, None)
    assert row is not None
    rates = row.architecture.flop_per_cycle_per_sm
    integer = row.architecture.operations_per_cycle_per_sm
    whole = truth.gpus[0].whole
    flop = sum(
        (owned.active_cycles["hmma"] * rates[f"tensor_{name}"]
         for name, owned in truth.gpus[0].owners.items() if name is not None), 0
    )  # fmt: skip
    flop += whole.active_cycles["dmma"] * rates["tensor_fp64"]
    flop += sum(whole.active_cycles[pipe] * rates[pipe] for pipe in ("fp64", "fp32", "fp16"))
    work = ledger.work_of(uuid)
    for name, bounds, true in (
        ("flop", work.flop, flop),
        ("tensor integer", work.tensor_integer_operations,
         whole.active_cycles["imma"] * integer["tensor_int8"]),
        ("integer", work.integer_operations, whole.active_cycles["integer"] * integer["integer"]),
    ):  # fmt: skip
        assert bounds.low <= true, name
        assert bounds.high is None or true <= bounds.high, name
    low_mj, high_mj = ledger.energy_of(uuid)
    assert low_mj <= whole.energy_mj
    assert high_mj is None or whole.energy_mj <= high_mj
