"""Whatever a node goes through: low <= truth <= high, energy within its bounds, time conserved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flopledger_agent.gpus.simulated.faults import Fault
from tests.agent.sampling import SECOND_NS
from tests.end_to_end.virtual_ledger import TABLE, VirtualLedger
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from flopledger_agent.gpus.simulated import Truth
    from flopledger_agent.gpus.simulated.truth import Integrals

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
HIDDEN: Final = "fp16"  # what work without a visible process carries out
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
# Where cumulative cycles stand at the start: at zero, just below and far beyond exact doubles.
COUNTERS: Final[tuple[dict[str, object], ...]] = (
    {},
    {"cycles_offset": 2**53 - 10**12},
    {"cycles_offset": 2**58 + 12_345, "cycle_scale": "mean"},
)
UNHURRIED: Final = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
)
KILLS: Final = ("kill", "reboot", "pause", "suspend", "step")
EVENTS: Final = st.lists(
    st.tuples(st.integers(5, 120), st.sampled_from([0, 2, 20, 200]), st.sampled_from(KILLS)),
    max_size=3,
)


@st.composite
def phases(draw: st.DrawFn, seconds: tuple[float, ...]) -> list[dict[str, object]]:
    """Work whose owners, clock, power and pipes change; sometimes nobody is seen to do it."""
    result: list[dict[str, object]] = []
    for _ in range(draw(st.integers(1, 6))):
        jobs: list[str] = draw(st.lists(st.sampled_from(sorted(JOBS)), max_size=2, unique=True))
        working = bool(jobs) or draw(st.booleans())
        busy: dict[str, float] = {}
        for pipe in PIPES:
            chosen: bool = draw(st.booleans())
            if working and chosen:
                busy[pipe] = draw(st.sampled_from([0.0, 0.1, 0.3]))
        shares = {"shares": dict(zip(jobs, (9, 1), strict=True))} if len(jobs) > 1 else {}
        result.append({
            "seconds": draw(st.sampled_from(seconds)),
            "sm_clock_mhz": draw(st.integers(4, 14)) * 100,
            "power_watts": draw(st.integers(60, 390)),
            "sm_active": 0.9 if working else 0,
            "gpu_active": 1 if working else 0,
            "pipes": busy,
            "processes": jobs,
            **shares,
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


def scenario(driver: str, *gpus: Mapping[str, object]) -> dict[str, object]:
    """A node on which every job has a process."""
    processes = {
        name: {"pid": 10_000_001 + index, "create_time_unix": 1, "environ": environ}
        for index, (name, environ) in enumerate(JOBS.items())
    }
    return {"driver_version": driver, "processes": processes, "gpus": list(gpus)}


def live(node: VirtualNode, events: list[tuple[int, int, str]]) -> VirtualLedger:
    """Let the node's time pass with its events, then a quiet end; what the ledger has of it."""
    done = 0
    for after, length, kind in sorted(events):
        node.run(max(0, after - done))
        done = max(done, after)
        match kind:
            case "reboot":
                node.reboot(length)
            case "pause":
                node.agent.pauses.begin(max(1, length) * 1000, "somebody")
            case "suspend":
                node.clock.now_ns += length * SECOND_NS
            case "step":
                node.clock.step_ns += (length - 20) * SECOND_NS
            case _:
                node.kill_agent(length)
    node.run(SECONDS - done)
    node.driver.clear_faults()
    node.run(70)
    node.stop()
    ledger = VirtualLedger()
    ledger.take(node.drain())
    return ledger


def truth_of(node: VirtualNode, ledger: VirtualLedger, key: str) -> Truth:
    """What truly happened in the time that a device was metered."""
    found = ledger.spans[key]
    first, last = min(found)[0], max(end for _, end in found)
    return node.driver.truth_between(first * 1_000_000, last * 1_000_000)


@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(
    st.sampled_from([(model, driver) for model, drivers in MODELS.items() for driver in drivers]),
    phases((0.25, 1, 7.5, 40, 90)),
    faults(),
    EVENTS,
    st.sampled_from(COUNTERS),
)
def test_bounds_contain_the_truth_whatever_happens(
    node_kind: tuple[str, str],
    work_phases: list[dict[str, object]],
    node_faults: list[Fault],
    events: list[tuple[int, int, str]],
    counters: dict[str, object],
) -> None:
    """FLOP, integer operations and energy of a GPU lie in their bounds; its time is tiled."""
    model, driver = node_kind
    if any(kind == "reboot" for _, _, kind in events):  # only wall time tells how long it was
        events = [event for event in events if event[2] != "step"]
    gpu = {"model": model, "phases": work_phases, **counters}
    with VirtualNode(scenario(driver, gpu)) as node:
        for fault in node_faults:
            node.driver.inject(fault, 0)
        ledger = live(node, events)
        if not ledger.spans:
            return
        (key,) = ledger.spans
        truth = truth_of(node, ledger, key)
    ledger.require_tiles()
    require_bounds(ledger, key, truth.gpus[0].owners, truth.gpus[0].whole, model)
    energy_mj = sum(sums.get("energy_mj", 0) for sums in ledger.sums.values())
    if not node_faults and not events and driver.startswith("595"):
        assert energy_mj == int(truth.gpus[0].whole.energy_mj)


@settings(max_examples=25, deadline=None, suppress_health_check=UNHURRIED)
@given(
    st.sampled_from([("NVIDIA H200", "595.71.05"), ("NVIDIA A100-SXM4-80GB", "580.65.06")]),
    phases((1, 3, 7, 40, 90)),
    st.lists(
        st.tuples(st.integers(5, 120), st.sampled_from([0, 2, 20, 200]),
                  st.sampled_from(["kill", "reboot", "suspend"])),
        max_size=2,
    ),
)  # fmt: skip
def test_every_owners_truth_is_in_its_bounds_with_those_of_nobody(
    node_kind: tuple[str, str],
    work_phases: list[dict[str, object]],
    events: list[tuple[int, int, str]],
) -> None:
    """What a job did is in its own bounds or in nobody's, and never in `idle`'s."""
    model, driver = node_kind
    with VirtualNode(scenario(driver, {"model": model, "phases": work_phases})) as node:
        ledger = live(node, events)
        (key,) = ledger.spans
        owners = truth_of(node, ledger, key).gpus[0].owners
    nobody = ledger.work_of_account(key, "unattributed").flop
    for name, environ in JOBS.items():
        mine = ledger.work_of_account(key, environ["FLOPLEDGER_PROJECT"]).flop
        true = flop_of({name: owners[name]} if name in owners else {}, model)
        assert mine.low <= true, name
        if mine.high is not None and nobody.high is not None:
            assert true <= mine.high + nobody.high, name
    hidden = flop_of({None: owners[None]} if None in owners else {}, model)
    assert nobody.high is None or hidden <= nobody.high
    assert ledger.work_of_account(key, "idle").flop.low == 0


@settings(max_examples=25, deadline=None, suppress_health_check=UNHURRIED)
@given(
    phases((0.25, 1, 7.5, 40, 90)),
    phases((0.25, 1, 7.5, 40, 90)),
    faults(),
    EVENTS.filter(lambda events: all(kind != "step" for _, _, kind in events)),
)
def test_bounds_of_every_instance_contain_its_truth(
    one: list[dict[str, object]],
    other: list[dict[str, object]],
    node_faults: list[Fault],
    events: list[tuple[int, int, str]],
) -> None:
    """A partitioned GPU: each instance's work in its bounds, time and energy of the whole exact."""
    model = "NVIDIA H200"
    instances = [
        {"slices": 3, "id": 1, "phases": [strip(phase) for phase in one]},
        {"slices": 2, "id": 3, "phases": [strip(phase) for phase in other]},
    ]
    idle = [{"seconds": 10_000, "sm_clock_mhz": 1400, "power_watts": 150}]
    gpu = {"model": model, "phases": idle, "instances": instances}
    with VirtualNode(scenario("595.71.05", gpu)) as node:
        for fault in node_faults:
            node.driver.inject(fault, 0)
        ledger = live(node, events)
        truths = {key: truth_of(node, ledger, key).gpus[0] for key in ledger.spans}
    if {device.slices is None for device in ledger.devices.values()} == {False}:
        ledger.require_tiles()
    for key, found in truths.items():
        number = ledger.devices[key].gpu_instance
        for instance in found.instances:
            if instance.instance_id == number:
                require_bounds(ledger, key, instance.owners, instance.whole, model)


def strip(phase: dict[str, object]) -> dict[str, object]:
    """A phase of an instance: the clock is the whole GPU's."""
    return {name: value for name, value in phase.items() if name != "sm_clock_mhz"}


def flop_of(owners: Mapping[str | None, Integrals], model: str) -> Fraction | int:
    """The floating-point operations that these owners truly carried out."""
    row = TABLE.resolve(model, None, None)
    assert row is not None
    rates = row.architecture.flop_per_cycle_per_sm
    return sum(
        (
            owned.active_cycles["hmma"] * rates[f"tensor_{name or HIDDEN}"]
            + owned.active_cycles["dmma"] * rates["tensor_fp64"]
            + sum(owned.active_cycles[pipe] * rates[pipe] for pipe in ("fp64", "fp32", "fp16"))
            for name, owned in owners.items()
        ),
        0,
    )


def require_bounds(
    ledger: VirtualLedger,
    key: str,
    owners: Mapping[str | None, Integrals],
    whole: Integrals,
    model: str,
) -> None:
    """The truth of a device's FLOP, integer operations and energy lies in what was metered."""
    row = TABLE.resolve(model, None, None)
    assert row is not None
    integer = row.architecture.operations_per_cycle_per_sm
    work = ledger.work_of(key)
    for name, bounds, true in (
        ("flop", work.flop, flop_of(owners, model)),
        ("tensor integer", work.tensor_integer_operations,
         whole.active_cycles["imma"] * integer["tensor_int8"]),
        ("integer", work.integer_operations, whole.active_cycles["integer"] * integer["integer"]),
    ):  # fmt: skip
        assert bounds.low <= true, name
        assert bounds.high is None or true <= bounds.high, name
    low_mj, high_mj = ledger.energy_of(key)
    assert low_mj <= whole.energy_mj
    assert high_mj is None or whole.energy_mj <= high_mj
