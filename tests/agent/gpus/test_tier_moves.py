"""A device moves between tiers at run time without a lost or doubled cycle."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flopledger_agent.gpus.device import DeviceReader, DeviceUnreadable, Request
from flopledger_agent.gpus.gpm import COUNTERS, PERCENTAGES
from flopledger_agent.gpus.interface import GpuSample, NodeSample
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.simulated.driver import SimulatedDriver, install
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_agent.metering import empty_state, observe
from flopledger_agent.windows import MICRO
from flopledger_core.accelerators import load_table
from tests.agent.gpus.nodes import PHASE, scenario
from tests.agent.sampling import SECOND_NS, TestClock, claim

if TYPE_CHECKING:
    from flopledger_agent.windows import Slice

TABLE = load_table()
UTIL_ERROR = 10**9  # derived cycles are good to a billionth
# The clock stands, so that ratios times clock are exact; what the pipes do changes every 2.5 s.
PHASES = "".join(
    PHASE.replace("1000.0", "2.5").replace("0.55", f"0.{share}") for share in range(10, 60)
)
IDLE = "idle_sm_clock_mhz = 1755"

Trouble = Literal["none", "lost", "reopen", "reset", "delivery"]


def metric_errors(ids: frozenset[int]) -> Fault:
    """These metrics carry an error of their own for a while."""
    return Fault(kind="metric_error", code=999, metrics=ids)


def call_error(function: str) -> Fault:
    """One function does not answer for a while."""
    return Fault(kind="error", code=999, functions=frozenset({function}))


FAULTS: tuple[Fault, ...] = (
    metric_errors(frozenset({COUNTERS["elapsed"]})),
    metric_errors(frozenset(COUNTERS.values())),
    metric_errors(frozenset({COUNTERS["any_tensor"]})),
    metric_errors(frozenset({COUNTERS["any_tensor"], COUNTERS["hmma"]})),
    metric_errors(frozenset(PERCENTAGES.values())),
    metric_errors(frozenset({*PERCENTAGES.values(), *COUNTERS.values()})),
    metric_errors(frozenset({1})),
    Fault(kind="nan"),
    call_error("nvmlGpmSampleGet"),
    call_error("nvmlGpmMetricsGet"),
    call_error("nvmlDeviceGetUtilizationRates"),
    call_error("nvmlDeviceGetClockInfo"),
    call_error("nvmlDeviceGetSamples"),
    call_error("nvmlDeviceGetNumGpuCores"),
)


class Bench:
    """One reader on a simulated device, and the metering of what it delivers."""

    def __init__(self, driver: SimulatedDriver, clock: TestClock) -> None:
        self.driver = driver
        self.clock = clock
        self.nvml = Nvml()
        self.nvml.open()
        self.reader = DeviceReader(self.nvml, clock, TABLE, driver.devices[0].gpu.uuid)
        self.generation = 0
        self.delivered = False
        self.state = empty_state("boot-1")
        self.slices: list[Slice] = []
        self.samples: list[GpuSample] = []
        self.resets: list[int] = []

    def close(self) -> None:
        """Give the driver back."""
        self.reader.release()
        self.nvml.shutdown()

    def tick(self, seconds: int, trouble: Trouble, faults: list[Fault]) -> None:
        """Time passes, something happens, the device is read; what comes is metered or lost."""
        self.clock.now_ns += seconds * SECOND_NS
        for fault in faults:
            self.driver.inject(fault)
        if trouble == "reopen":
            self.reader.release()
            self.nvml.shutdown()
            self.nvml.open()
            self.generation += 1
        elif trouble == "reset":
            self.resets.append(self.clock.boottime_ns())
            self.driver.inject(Fault(kind="counter_reset"))
        elif trouble == "lost":
            self.driver.inject(Fault(kind="lost"))
        request = Request(generation=self.generation, return_count=0, delivered=self.delivered)
        self.delivered = False
        try:
            samples = self.reader.read(request)
        except DeviceUnreadable:
            pass  # a tick without a sample
        else:
            if trouble != "delivery":
                self.delivered = True
                self._meter(samples)
        self.driver.clear_faults()

    def _meter(self, samples: tuple[GpuSample, ...]) -> None:
        now_ns = self.clock.boottime_ns()
        node = NodeSample(
            boot_ns=now_ns, unix_ns=self.clock.wall_unix_ns(), samples=samples,
            failures=(), driver="595.71.05", failure=None,
        )  # fmt: skip
        owners = {sample.device.key: (claim("atlas"),) for sample in samples}
        self.state, slices = observe(self.state, node, owners, tick_ns=SECOND_NS)
        self.slices += slices
        self.samples += samples

    def check(self) -> None:
        """Counted is exact; derived is within a billionth; nothing is counted twice."""
        for before, after in itertools.pairwise(self.slices):
            assert before.end_boot_ns == after.start_boot_ns
        for piece in self.slices:
            start_ns, end_ns = piece.start_boot_ns, piece.end_boot_ns
            whole = self.driver.truth_between(start_ns, end_ns).gpus[0].whole
            true = {
                "elapsed": whole.elapsed_cycles,
                "sm_active": whole.sm_active_cycles,
                **whole.active_cycles,
            }
            reset = any(start_ns < at_ns <= end_ns for at_ns in self.resets)
            for name, micro in piece.micro_cycles.items():
                found = Fraction(micro, MICRO)
                if piece.tier == "gpm_cycles":
                    assert found <= true[name], (piece, name)
                    assert reset or found == true[name], (piece, name)
                elif piece.tier != "gpu_util" or name == "elapsed":
                    assert abs(found - true[name]) <= true[name] / UTIL_ERROR, (piece, name)


def world(text: str) -> tuple[SimulatedDriver, TestClock]:
    """A driver under a clock of its own."""
    clock = TestClock()
    return install(parse_scenario(text), clock), clock


TICKS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.sampled_from(("none",) * 8 + ("lost", "reopen", "reset", "delivery")),
        st.one_of(
            st.just([]), st.just([]), st.lists(st.sampled_from(FAULTS), min_size=1, max_size=2)
        ),
    ),
    min_size=8,
    max_size=30,
)


@settings(deadline=None, max_examples=80)
@given(TICKS)
def test_no_tier_move_loses_or_doubles_a_cycle(
    ticks: list[tuple[int, Trouble, list[Fault]]],
) -> None:
    """Random errors of metrics and calls, reopenings, resets and lost deliveries."""
    driver, clock = world(scenario(IDLE, phase=PHASES))
    with driver:
        bench = Bench(driver, clock)
        try:
            for seconds, trouble, faults in ticks:
                bench.tick(seconds, trouble, faults)
            bench.check()
            for tier in {piece.tier for piece in bench.slices}:
                event(tier)
        finally:
            bench.close()
        assert driver.gpm_samples == {}


def test_down_the_ladder_and_up_again() -> None:
    """Counted, then ratios, then coarse activity, then back: each tells exactly its own time."""
    driver, clock = world(scenario(IDLE, phase=PHASES))
    cumulative = metric_errors(frozenset(COUNTERS.values()))
    everything = metric_errors(frozenset({*PERCENTAGES.values(), *COUNTERS.values()}))
    with driver:
        bench = Bench(driver, clock)
        nothing: list[Fault] = []
        ticks = [nothing] * 5 + [[cumulative]] * 3 + [[everything]] * 2 + [nothing] * 4
        for faults in ticks:
            bench.tick(1, "none", faults)
        tiers = [piece.tier for piece in bench.slices]
        bench.check()
        bench.close()
    assert tiers == (
        ["gpm_cycles"] * 2 + ["gpm_util"] * 3 + ["gpu_util"] * 2 + ["gpm_util"] + ["gpm_cycles"] * 3
    )
    assert [piece.absent.get("cycles") for piece in bench.slices[2:5]] == ["unknown_error"] * 3


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_a_sleeping_device_never_counts_more_than_there_was(scale: str) -> None:
    """Asleep but for 8 ms of every second: percentages serve until work proves the scale.

    A sum that mostly stands still passes for the mean of an awake device; believed, it would be
    multiplied by the number of SMs.
    """
    asleep = PHASE.replace("1000.0", "0.992").replace("1755", "0").replace(
        "sm_active = 0.98", "sm_active = 0"
    ).replace("hmma = 0.55, imma = 0.05, any_tensor = 0.6, fp32 = 0.03", "")  # fmt: skip
    nap = PHASE.replace("1000.0", "0.008").replace("1755", "1980")
    text = scenario(f"cycle_scale = '{scale}'", phase=(asleep + nap) * 30 + PHASE)
    driver, clock = world(text)
    with driver:
        bench = Bench(driver, clock)
        for _ in range(40):
            bench.tick(1, "none", [])
        counted: dict[str, Fraction] = {}
        for piece in bench.slices:
            if piece.tier == "gpm_cycles":
                start_ns, end_ns = piece.start_boot_ns, piece.end_boot_ns
                whole = driver.truth_between(start_ns, end_ns).gpus[0].whole
                off = Fraction(piece.micro_cycles["elapsed"], MICRO) - whole.elapsed_cycles
                counted["off"] = max(counted.get("off", Fraction(0)), abs(off))
        bench.close()
    uncertain = max(sample.uncertain_cycles for sample in bench.samples)
    assert counted["off"] <= 2 * uncertain
    assert [piece.tier for piece in bench.slices][-1] == "gpm_cycles"
