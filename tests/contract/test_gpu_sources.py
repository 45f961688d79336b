"""Every source of GPU samples keeps the promises of its port: one suite over all of them."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.config import DcgmSection
from flopledger_agent.gpus import ladder, replay, source, supervisor
from flopledger_agent.gpus.ladder import LadderSource, freshness_of
from flopledger_agent.gpus.replay import ReplaySource
from flopledger_core.accelerators import load_table
from flopledger_core.records import CYCLE_FIELDS, TIERS
from tests.agent.gpus.exporter import TENSOR, ScriptedExporter, render
from tests.agent.gpus.inline_worker import inline_node
from tests.agent.gpus.nodes import PHASE, node, scenario
from tests.agent.sampling import SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from flopledger_agent.gpus.interface import GpuSource, NodeSample

TICKS = 12
FAULTS = """
[[gpus.faults]]
kind = "error"
code = 999
at_seconds = 3.5
for_seconds = 2.0
functions = ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"]
[[gpus.faults]]
kind = "lost"
at_seconds = 7.5
for_seconds = 1.0
"""
SCENARIOS = {
    "cycles": scenario("", FAULTS),
    "mean-cycles": scenario('cycle_scale = "mean"', FAULTS),
    "percentages": scenario("", FAULTS, head='driver_version = "580.65.06"'),
    "coarse": scenario("", FAULTS, model="NVIDIA A100-SXM4-80GB"),
    "idle": scenario("", phase=PHASE.replace("1000.0", "2.0")),
}


@contextmanager
def nvml_source(name: str) -> Iterator[tuple[GpuSource, Callable[[], NodeSample]]]:
    """The real binding on the simulated driver."""
    with node(SCENARIOS[name]) as it:
        yield it.source, it.tick


@contextmanager
def replay_source(name: str) -> Iterator[tuple[GpuSource, Callable[[], NodeSample]]]:
    """What the binding gave, recorded."""
    with node(SCENARIOS[name]) as it:
        source = ReplaySource([it.tick() for _ in range(TICKS)])
    yield source, source.sample


@contextmanager
def ladder_source(name: str) -> Iterator[tuple[GpuSource, Callable[[], NodeSample]]]:
    """The binding below an exporter that has a page of every device."""
    with node(SCENARIOS[name]) as it:
        exporter = ScriptedExporter(it.clock)
        uuids = [device.gpu.uuid for device in it.driver.devices]
        exporter.show(render({TENSOR: dict.fromkeys(uuids, 0.5)}))
        above = LadderSource(it.source, exporter, load_table(), freshness_of(DcgmSection()))

        def tick() -> NodeSample:
            it.clock.now_ns += SECOND_NS
            return above.sample()

        yield above, tick


@contextmanager
def supervised_source(name: str) -> Iterator[tuple[GpuSource, Callable[[], NodeSample]]]:
    """The binding in a worker, behind messages."""
    with inline_node(SCENARIOS[name]) as it:
        yield it.source, it.tick


SOURCES = {
    "LadderSource": ladder_source,
    "NvmlSource": nvml_source,
    "ReplaySource": replay_source,
    "SupervisedSource": supervised_source,
}


@pytest.fixture(
    params=[(source, text) for source in SOURCES for text in SCENARIOS],
    ids="-".join,
)
def opened(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[GpuSource, Callable[[], NodeSample]]]:
    """A source and a way to let one tick pass."""
    source, text = request.param
    context: AbstractContextManager[tuple[GpuSource, Callable[[], NodeSample]]]
    context = SOURCES[source](text)
    with context as pair:
        yield pair


def test_every_source_is_in_this_suite() -> None:
    """A new implementation is added here or fails here."""
    found = {
        name
        for module in (ladder, source, replay, supervisor)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and hasattr(kind, "sample") and hasattr(kind, "close")
    }
    assert found - {"RecordingSource"} == set(SOURCES)


def test_a_tick_accounts_for_every_device_once(
    opened: tuple[GpuSource, Callable[[], NodeSample]],
) -> None:
    """Sampled or failed, never both, never neither."""
    _source, tick = opened
    expected = None
    for _ in range(TICKS):
        answer = tick()
        sampled = [sample.device.uuid for sample in answer.samples]
        failed = [failure.device.uuid for failure in answer.failures]
        assert len(set(sampled + failed)) == len(sampled) + len(failed)
        assert expected in (None, set(sampled + failed))
        expected = set(sampled + failed)
        assert all(failure.reason for failure in answer.failures)


def test_what_is_absent_says_why(opened: tuple[GpuSource, Callable[[], NodeSample]]) -> None:
    """None comes with a reason, and never as a zero."""
    _source, tick = opened
    for _ in range(TICKS):
        for sample in tick().samples:
            assert sample.tier in TIERS
            for field in ("energy_mj", "power_mw", "sm_clock_khz", "processes"):
                assert (getattr(sample, field) is None) == (field in sample.absent), field
            if sample.cycles is None and sample.utilization is None:
                assert {"cycles", "utilization"} & set(sample.absent)
            if sample.cycles is None:
                assert "cycles" in sample.absent


def test_tiers_carry_what_they_promise(
    opened: tuple[GpuSource, Callable[[], NodeSample]],
) -> None:
    """Counters or ratios, never both; ratios are exact and between 0 and 1."""
    _source, tick = opened
    seen = set()
    for _ in range(TICKS):
        for sample in tick().samples:
            seen.add(sample.tier)
            assert sample.cycles is None or sample.utilization is None
            assert (sample.cycles is not None) == (sample.tier == "gpm_cycles")
            for name, ratio in (sample.utilization or {}).items():
                assert name in CYCLE_FIELDS
                assert isinstance(ratio, Fraction)
                assert 0 <= ratio <= 1
    assert len(seen) == 1


def test_time_and_counters_only_go_forward(
    opened: tuple[GpuSource, Callable[[], NodeSample]],
) -> None:
    """No reset is in these scenarios, so nothing may fall; active never exceeds elapsed."""
    _source, tick = opened
    last: dict[str, tuple[int, int, int]] = {}
    for _ in range(TICKS):
        answer = tick()
        for sample in answer.samples:
            key = sample.device.key
            before = last.get(key, (0, 0, 0))
            elapsed = before[2]
            if sample.cycles is not None:
                assert sample.cycles.elapsed is not None
                elapsed = sample.cycles.elapsed
                values = [value or 0 for value in sample.cycles.as_dict().values()]
                assert max(values) <= elapsed
            now = (sample.boot_ns, sample.energy_mj or before[1], elapsed)
            assert all(new >= old for new, old in zip(now, before, strict=True))
            assert sample.boot_ns > before[0]
            last[key] = now
    assert last


def test_a_closed_source_answers_without_samples(
    opened: tuple[GpuSource, Callable[[], NodeSample]],
) -> None:
    """Closing twice is harmless; every device is still accounted for."""
    source, tick = opened
    devices = set()
    for _ in range(TICKS):
        devices |= {sample.device.key for sample in tick().samples}
    source.close()
    source.close()
    after = tick()
    assert (after.samples, after.failure) == ((), "closed")
    assert {failure.device.key for failure in after.failures} == devices
