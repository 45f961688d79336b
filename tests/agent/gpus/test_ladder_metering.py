"""Whatever comes and goes, a slice has one source, no cycle is counted twice, and bounds hold."""

from __future__ import annotations

from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_agent.config import DcgmSection
from flopledger_agent.gpus.dcgm_scraper import DcgmScraper, Scrape
from flopledger_agent.gpus.interface import DeviceFailure
from flopledger_agent.gpus.ladder import Freshness, LadderSource, freshness_of
from flopledger_agent.metering import close_windows, empty_state, observe, records_of
from flopledger_core.flop import estimate
from flopledger_core.records import TIERS, Cycles, GapRecord, UsageRecord
from tests.agent.gpus.exporter import (
    ENERGY,
    ENGINE,
    SM_ACTIVE,
    TENSOR,
    UTIL,
    page_server,
    render,
)
from tests.agent.gpus.nodes import node as simulated_node
from tests.agent.gpus.nodes import scenario
from tests.agent.gpus.rungs import TABLE, Rung, coarse
from tests.agent.sampling import GPU, SECOND_NS, claim, node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.windows import Slice


class World:
    """A GPU whose truth is known, read by a driver and an exporter that come and go."""

    def __init__(self, scale: str) -> None:
        self.rung = Rung()
        self.rung.ladder._freshness = Freshness(fetched_ns=3 * SECOND_NS, looked_ns=9 * SECOND_NS)
        self.scale = 1 if scale == "sum" else 132
        self.elapsed = [10**12]
        self.tensor = [10**11]
        self.last_cycles = False
        self.looked = (self.elapsed[0], self.tensor[0], Fraction(0), 1)

    def pass_second(self, mhz: int, percent: int) -> None:
        """The GPU works for a second."""
        cycles = 132 * mhz * 1_000_000
        self.elapsed.append(self.elapsed[-1] + cycles)
        self.tensor.append(self.tensor[-1] + cycles * percent // 100)

    def show(self, second: int, *, totals: bool, every: int, late: bool = False) -> None:
        """The exporter looks every so often; we fetch every second, sometimes too early."""
        before = self.looked
        ratio = Fraction(self.tensor[-1] - self.tensor[-2], self.elapsed[-1] - self.elapsed[-2])
        if second % every == 0:
            self.looked = (self.elapsed[-1], self.tensor[-1], ratio, second)
        elapsed, tensor, ratio, at = before if late else self.looked
        values: dict[str, object] = {ENGINE: 1.0, ENERGY: at, UTIL: 100, TENSOR: float(ratio)}
        if totals:
            values["DCGM_FI_PROF_SM_CYCLES_ELAPSED_TOTAL"] = elapsed // self.scale
            values["DCGM_FI_PROF_MMA_CYCLES_ACTIVE_TOTAL"] = tensor // self.scale
        self.rung.exporter.show(render({name: {GPU.uuid: one} for name, one in values.items()}))

    def read(self, tier: str, mhz: int) -> NodeSample:
        """The driver's sample at that tier; none at all is a failure."""
        clock = self.rung.clock
        clock.now_ns += SECOND_NS
        failed = tier == "lost"
        fields: dict[str, Any] = {"tier": tier, "sm_clock_khz": mhz * 1000}
        if tier == "gpm_cycles":
            cycles = Cycles(elapsed=self.elapsed[-1], any_tensor=self.tensor[-1], imma=0, dmma=0)
            fields |= {"cycles": cycles, "utilization": None, "absent": {}}
        elif tier == "none":
            fields["utilization"] = None
        samples = () if failed else (coarse(clock, GPU, **fields),)
        failures = (DeviceFailure(device=GPU, reason="gpu_is_lost"),) if failed else ()
        self.rung.driver = node(clock.now_ns, *samples, failures=failures)
        return self.rung.ladder.sample()


DRIVER = st.sampled_from(["gpm_cycles", "gpu_util", "gpu_util", "gpu_util", "none", "lost"])
EXPORTER = st.sampled_from(["totals", "totals", "late", "ratios", "down", "stuck"])
STRETCH = st.tuples(
    st.integers(1, 12), DRIVER, EXPORTER, st.integers(300, 1980), st.integers(0, 100)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(STRETCH, min_size=2, max_size=8),
    st.sampled_from(["sum", "mean"]),
    st.integers(1, 4),
)
def test_whatever_comes_and_goes_time_is_kept_and_no_cycle_counted_twice(
    stretches: list[tuple[int, str, str, int, int]], scale: str, every: int
) -> None:
    """Slices tile the time, each of one tier, none above what its clock allows; bounds hold."""
    world = World(scale)
    state = empty_state("boot")
    slices: list[Slice] = []
    owner = (claim("atlas"),)
    second = 0
    for length, driver, exporter, mhz, percent in stretches:
        for _ in range(length):
            second += 1
            world.pass_second(mhz, percent)
            if exporter in {"totals", "late", "ratios"}:
                world.show(
                    second, totals=exporter != "ratios", every=every, late=exporter == "late"
                )
            elif exporter == "down":
                world.rung.exporter.fail("dcgm_unreachable")
            found = world.read(driver, mhz)
            state, pieces = observe(state, found, {GPU.key: owner}, tick_ns=SECOND_NS)
            slices += pieces
    state = close_windows(state)

    for before, after in pairwise(slices):
        assert before.end_boot_ns == after.start_boot_ns
    most = 132 * 1_980_000_000
    for piece in slices:
        span = piece.end_boot_ns - piece.start_boot_ns
        assert piece.tier in TIERS
        assert (piece.tier == "none") == (not piece.micro_cycles)
        rounding = 1_000_000
        assert piece.micro_cycles.get("elapsed", 0) <= most * span // 1000 + rounding
    records = records_of(state.closed)
    covered = sum(
        record.gap_ms if isinstance(record, GapRecord) else record.window_ms
        for record in records
        if isinstance(record, GapRecord | UsageRecord)
    )
    assert covered == sum(piece.end_boot_ns - piece.start_boot_ns for piece in slices) // 1_000_000
    for record in records:
        if isinstance(record, UsageRecord):
            check_bounds(world, record)


def check_bounds(world: World, record: UsageRecord) -> None:
    """The truth of the record's own time lies between its bounds."""
    origin_ms = world.rung.clock.boottime_ns() // 1_000_000 - 1000 * (len(world.elapsed) - 1)
    first, last = (
        (edge - origin_ms) // 1000 for edge in (record.start_boot_ms, record.end_boot_ms)
    )
    assert record.start_boot_ms < record.end_boot_ms
    rate = TABLE.architecture_of(TABLE.by_key("H100 SXM")).tensor_rate("bf16")
    assert rate is not None
    truth = (world.tensor[last] - world.tensor[first]) * rate
    found = estimate(record, TABLE)
    assert found is not None
    assert int(found.flop_low) <= truth
    assert found.flop_high is None or truth <= int(found.flop_high)


def test_counted_cycles_of_a_steady_exporter_are_exact_in_the_long_run() -> None:
    """Measured, in order, and their sum is what was counted, but for one interval at the end."""
    world = World("mean")
    state = empty_state("boot")
    tiers = []
    for second in range(1, 61):
        world.pass_second(1755, 60)
        world.show(second, totals=True, every=3)
        state, pieces = observe(
            state, world.read("gpu_util", 1755), {GPU.key: (claim("atlas"),)}, tick_ns=SECOND_NS
        )
        tiers += [(piece.tier, piece.derived) for piece in pieces]
    measured = [
        record
        for record in records_of(close_windows(state).closed)
        if isinstance(record, UsageRecord) and record.cycles_origin == "measured"
    ]

    assert tiers[-40:] == [("dcgm_pipes", False)] * 40
    counted = sum(record.cycles.any_tensor or 0 for record in measured)
    elapsed = sum(record.cycles.elapsed or 0 for record in measured)
    seconds = sum(record.window_ms for record in measured) / 1000
    a_second = 132 * 1_755_000_000
    assert abs(elapsed - seconds * a_second) <= 4 * a_second
    assert abs(counted * 10 - elapsed * 6) <= 132 * 100
    assert all(record.uncertain_cycles > 0 for record in measured)


def test_counters_of_two_sources_are_never_subtracted() -> None:
    """From the exporter's counters to GPM's and back: the first slice says that it begins."""
    world = World("sum")
    state = empty_state("boot")
    slices: list[Slice] = []
    for second in range(1, 41):
        world.pass_second(1755, 60)
        world.show(second, totals=True, every=1)
        tier = "gpm_cycles" if 15 <= second < 25 else "gpu_util"
        state, pieces = observe(
            state, world.read(tier, 1755), {GPU.key: (claim("atlas"),)}, tick_ns=SECOND_NS
        )
        slices += pieces
    by_second = [(piece.tier, piece.derived) for piece in slices]

    assert by_second[12] == ("dcgm_pipes", False)
    assert by_second[13] == ("none", False)
    assert slices[13].absent["cycles"] == "first_reading"
    assert by_second[14:23] == [("gpm_cycles", False)] * 9
    assert all(tier == "dcgm_pipes" for tier, _ in by_second[23:])
    assert by_second[-1] == ("dcgm_pipes", False)


# --- end to end ----------------------------------------------------------------------------------

A100_PHASE = """
[[gpus.phases]]
seconds = 1000.0
sm_clock_mhz = 1410
power_watts = 400.0
sm_active = 0.98
pipes = { hmma = 0.55, imma = 0.05, any_tensor = 0.6, fp32 = 0.03 }
processes = ["train"]
"""


class Fetching:
    """A scraper that fetches when it is told to, so that the test's clock stays the only one."""

    def __init__(self, scraper: DcgmScraper) -> None:
        self.scraper = scraper

    def latest(self) -> Scrape:
        """What was fetched."""
        return self.scraper._scrape

    def close(self) -> None:
        """Fetch nothing more."""
        self.scraper.close()


@contextmanager
def a100_beside_an_exporter() -> Iterator[tuple[Any, Any, LadderSource, Fetching]]:
    """The simulated driver without GPM, and a real server of pages."""
    text = scenario("", model="NVIDIA A100-SXM4-80GB", phase=A100_PHASE)
    with simulated_node(text) as it, page_server() as server:
        config = DcgmSection(url=server.url, timeout_seconds=30)
        fetching = Fetching(DcgmScraper(config, it.clock, "node-1"))
        yield it, server, LadderSource(it.source, fetching, TABLE, freshness_of(config)), fetching


def test_an_a100_beside_an_exporter_is_metered_by_its_pipes() -> None:
    """Over HTTP and the driver: tier, derived cycles, exact centre, bounds that hold the truth."""
    with a100_beside_an_exporter() as (it, server, ladder, fetching):
        state = empty_state("boot")
        uuid = it.driver.devices[0].gpu.uuid
        for second in range(40):
            if second % 10 == 0:
                ratios = {TENSOR: 0.6, SM_ACTIVE: 0.98, "DCGM_FI_PROF_PIPE_FP32_ACTIVE": 0.03,
                          "DCGM_FI_PROF_PIPE_TENSOR_IMMA_ACTIVE": 0.05}  # fmt: skip
                values = {**ratios, ENERGY: second, UTIL: 100}
                server.text = render({name: {uuid: value} for name, value in values.items()})
                fetching.scraper.scrape_once()
            it.clock.now_ns += SECOND_NS
            found = ladder.sample()
            state, _ = observe(
                state,
                found,
                {sample.device.key: (claim("atlas"),) for sample in found.samples},
                tick_ns=SECOND_NS,
            )
        (record,) = records_of(close_windows(state).closed)
        assert isinstance(record, UsageRecord)
        start, end = record.start_boot_ms * 1_000_000, record.end_boot_ms * 1_000_000
        truth = it.driver.truth(end).gpus[0].whole
        before = it.driver.truth(start).gpus[0].whole

    assert server.requests == ["GET /metrics"] * 4
    assert (record.tier, record.cycles_origin) == ("dcgm_pipes", "derived")
    tensor = truth.active_cycles["any_tensor"] - before.active_cycles["any_tensor"]
    assert record.cycles.any_tensor is not None
    assert abs(record.cycles.any_tensor - tensor) <= tensor / 10**9
    assert record.absent["cycles"] == "gpm_not_supported"
    rate = TABLE.architecture_of(TABLE.by_key("A100 SXM")).tensor_rate("bf16")
    assert rate is not None
    hmma = truth.active_cycles["hmma"] - before.active_cycles["hmma"]
    found_flop = estimate(record, TABLE)
    assert found_flop is not None
    assert found_flop.flop_high is not None
    assert int(found_flop.flop_low) <= hmma * rate <= int(found_flop.flop_high)
    # The centre is tensor work at bf16 and CUDA-core work at its fused rate, as everywhere.
    assert hmma * rate <= int(found_flop.flop_central) <= hmma * rate * Fraction(11, 10)


def test_an_a100_goes_down_and_up_the_ladder_by_itself() -> None:
    """The exporter dies, the coarse tier serves, it returns, pipes serve again: no time is lost."""
    with a100_beside_an_exporter() as (it, server, ladder, fetching):
        state = empty_state("boot")
        slices: list[Slice] = []
        uuid = it.driver.devices[0].gpu.uuid
        for second in range(120):
            alive = second < 30 or second >= 90
            if second % 10 == 0:
                server.instead = None if alive else (lambda handler: handler.send_error(503))
                server.text = render({TENSOR: {uuid: 0.5 + second / 1000}})
                fetching.scraper.scrape_once()
            it.clock.now_ns += SECOND_NS
            found = ladder.sample()
            state, pieces = observe(
                state,
                found,
                {sample.device.key: (claim("atlas"),) for sample in found.samples},
                tick_ns=SECOND_NS,
            )
            slices += pieces
    assert len(slices) == 119
    assert all(a.end_boot_ns == b.start_boot_ns for a, b in pairwise(slices))
    tiers = [piece.tier for piece in slices]
    changes = [tiers[0], *(b for a, b in pairwise(tiers) if a != b)]
    assert changes == ["dcgm_pipes", "gpu_util", "dcgm_pipes"]
    fallen = next(piece for piece in slices if piece.tier == "gpu_util")
    assert fallen.absent["dcgm"] == "dcgm_http_error"
