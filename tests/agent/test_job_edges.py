"""Windows split where jobs begin and end, and a job shorter than a tick is in the ledger."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.exits import ExitWatch
from flopledger_agent.attribution.owners import EnvironmentAttributor
from flopledger_agent.attribution.processes import CombinedProcessTable, PsutilProcessTable
from flopledger_agent.attribution.tag_client import register
from flopledger_agent.attribution.tag_values import Tags
from flopledger_agent.attribution.tags import TagRegistry, TagServer
from flopledger_agent.gpus.simulated.process_table import ScenarioProcessTable
from flopledger_agent.gpus.source import NvmlSource
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.rhythm import (
    EXTRA_SPACING_NS,
    EXTRA_TICKS_MAX,
    Bell,
    Rhythm,
    wait_until_due,
)
from flopledger_agent.spool import Spool
from flopledger_core.accelerators import load_table
from flopledger_core.records import UsageRecord
from tests.agent.attribution.people import PATIENT_SECONDS, running
from tests.agent.sampling import BOOT_NS, SECOND_NS, TestClock
from tests.agent.test_daemon import make, wait_until
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from collections.abc import Iterator

H100 = "NVIDIA H100 80GB HBM3"
MS = 1_000_000


# --- the rhythm -------------------------------------------------------------------------------


def played(rhythm: Rhythm, edges: list[tuple[int, bool]], until_ns: int) -> list[int]:
    """When ticks happen if these edges are told; wall time is boot time."""
    ticks: list[int] = []
    waiting = sorted(edges)
    now_ns = 0
    while now_ns <= until_ns:
        if rhythm.due_boot_ns() <= now_ns:
            rhythm.ticked(now_ns, now_ns)
            ticks.append(now_ns)
            continue
        due_ns = rhythm.due_boot_ns()
        if waiting and waiting[0][0] <= due_ns:
            at_ns, begins = waiting.pop(0)
            now_ns = max(now_ns, at_ns)
            rhythm.edge(now_ns, begins=begins)
        else:
            now_ns = due_ns
    return ticks


EDGES = st.lists(st.tuples(st.integers(0, 30_000), st.booleans()), max_size=300)


@given(st.sampled_from([200, 1000, 10_000, 30_000]), EDGES)
def test_the_grid_goes_on_and_extra_ticks_are_spaced_and_rationed(
    tick_ms: int, edges: list[tuple[int, bool]]
) -> None:
    """Whatever edges come: every tick of the grid, none too close to another, a bounded sum."""
    tick_ns = tick_ms * MS
    ticks = played(Rhythm(tick_ns), [(at * MS, begins) for at, begins in edges], 30_000 * MS)
    grid = [at for at in ticks if at % tick_ns == 0]

    assert grid == list(range(0, 30_001 * MS, tick_ns))[: len(grid)]
    assert len(grid) == 30_000 // tick_ms + 1
    assert all(after - before >= EXTRA_SPACING_NS for before, after in pairwise(ticks))
    assert len(ticks) - len(grid) <= EXTRA_TICKS_MAX + len(grid)


@given(st.integers(0, 9_999))
def test_an_edge_is_ticked_at_once(at_ms: int) -> None:
    """Within the spacing after the tick before, or by a tick of the grid that is as near."""
    ticks = played(Rhythm(SECOND_NS), [(at_ms * MS, False)], 12_000 * MS)
    first = min(at for at in ticks if at >= at_ms * MS)
    assert first - at_ms * MS <= 2 * EXTRA_SPACING_NS


def test_a_beginning_is_looked_after_for_one_interval() -> None:
    """Readings follow each other closely at first, then at a quarter of the job's age."""
    ticks = played(Rhythm(30 * SECOND_NS), [(2 * SECOND_NS, True)], 45 * SECOND_NS)
    after = [at / SECOND_NS for at in ticks if at >= 2 * SECOND_NS]
    assert after[:5] == [2.0, 2.1, 2.2, 2.3, 2.4]
    spaces = [later - before for before, later in pairwise(after)]
    assert all(
        space <= max(0.1, (at - 2.0) / 4) + 1e-6
        for at, space in zip(after, spaces, strict=False)
        if at < 32
    )


def test_a_clock_that_steps_does_not_stop_the_grid() -> None:
    """The next tick is never further away than one interval."""
    rhythm = Rhythm(SECOND_NS)
    for boot_ns, unix_ns in ((0, 0), (SECOND_NS, -7 * SECOND_NS + 3), (SECOND_NS + 5, 10**18 + 9)):
        rhythm.ticked(boot_ns, unix_ns)
        assert boot_ns < rhythm.due_boot_ns() <= boot_ns + SECOND_NS


# --- the bell ---------------------------------------------------------------------------------


@pytest.fixture
def exits() -> Iterator[ExitWatch]:
    """A watch that is given back."""
    watch = ExitWatch()
    yield watch
    watch.close()


def test_the_exit_of_a_real_process_rings(exits: ExitWatch) -> None:
    """At once, once, and only of processes that matter."""
    bell = Bell(exits)
    with running() as job, running() as other:
        exits.watch([job.pid, other.pid, 10_000_001, -1, 2**70])
        exits.watch([job.pid])
        other.kill()
        other.wait(PATIENT_SECONDS)
        assert bell.wait(0.05) == (False, False)
        assert exits.ended() == frozenset()
        job.kill()
        assert bell.wait(PATIENT_SECONDS) == (True, False)
        assert exits.ended() == {job.pid}
        assert exits.ended() == frozenset()
        assert bell.wait(0.05) == (False, False)
        exits.watch([], [job.pid])
        assert bell.wait(0.0) == (False, False)
    bell.close()
    bell.ring()  # nobody is there to be woken, and nothing breaks


def open_descriptors() -> int:
    """How many file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_watch_spends_few_descriptors(exits: ExitWatch) -> None:
    """Never more than its limit, and none for processes that ended or no longer matter."""
    before = open_descriptors()
    small = ExitWatch(processes_max=2)
    with running() as one, running() as two, running() as three:
        held = open_descriptors()
        small.watch([one.pid, two.pid, three.pid])
        assert open_descriptors() == held + 2
        small.watch([one.pid], [two.pid, three.pid])
        assert open_descriptors() == held + 2
        one.kill()
        one.wait(PATIENT_SECONDS)
        wait_until(lambda: small.ended() == {one.pid})
        small.watch([], [one.pid, two.pid, three.pid])
        assert open_descriptors() == held + 2
        small.watch([])
        assert open_descriptors() == held
    small.close()
    assert open_descriptors() == before


def test_waiting_ends_with_the_ring_of_another_thread(exits: ExitWatch) -> None:
    """A stop, a tag or a command ends the wait; a ring from before it is not lost."""
    bell, clock, rhythm = Bell(exits), RealClock(), Rhythm(60 * SECOND_NS)
    stop = threading.Event()
    rhythm.ticked(clock.boottime_ns(), 1)

    def act() -> None:
        stop.set()
        bell.ring()

    threading.Timer(0.1, act).start()
    began = time.monotonic()
    wait_until_due(rhythm, bell, clock, stop.is_set)
    assert time.monotonic() - began < 30
    bell.ring(begins=True)
    assert bell.wait(0.0) == (True, True)
    bell.close()


class RealClock(TestClock):
    """Real seconds for a wait that must end early."""

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """As they are."""
        return virtual_seconds


# --- the short job ------------------------------------------------------------------------------


class EdgeNode(VirtualNode):
    """A node in virtual time with a real tag socket, and real processes on its simulated GPU."""

    def __init__(self, scenario: dict[str, object], socket: Path) -> None:
        self.exits = ExitWatch()
        self.bell = Bell(self.exits)
        self.rhythm = Rhythm(SECOND_NS)
        self.table = PsutilProcessTable()
        self.registry = TagRegistry(self.table)
        super().__init__(scenario)
        self.server = TagServer(
            socket, self.registry, registered=lambda: self.bell.ring(begins=True)
        )
        self.server.start()

    def _agent(self) -> AgentLoop:
        processes = CombinedProcessTable(ScenarioProcessTable(self.driver), self.table)
        self.spool = Spool(self.disk, 2**30)
        return AgentLoop(
            facts=LoopFacts(node="n1", cluster=None, program="test", simulated=True,
                            boot_id=self.boot_id, tick_ns=SECOND_NS),
            clock=self.clock, source=NvmlSource(self.clock, load_table(), deadline_seconds=30.0),
            table=load_table(), attributor=EnvironmentAttributor(processes, self.registry),
            disk=self.disk, spool=self.spool, key=self.key,
            random_bytes=self.random.randbytes, synchronised=lambda: True,
            ended=self.exits.ended,
        )  # fmt: skip

    def until(self, seconds: float) -> None:
        """Let time pass as the daemon does, without an edge on the way."""
        target_ns = BOOT_NS + int(seconds * 1000) * MS
        while (due_ns := max(self.rhythm.due_boot_ns(), self.clock.boottime_ns())) <= target_ns:
            self.clock.now_ns = due_ns - BOOT_NS
            self.rhythm.ticked(self.clock.boottime_ns(), self.clock.wall_unix_ns())
            self.agent.tick()
            sample = self.agent.view.sample
            pids = [
                pid for one in (sample.samples if sample else ()) for pid in one.processes or ()
            ]
            self.exits.watch(pids, self.registry.tagged_pids())
        self.clock.now_ns = target_ns - BOOT_NS

    def hear(self) -> None:
        """Wait for a real edge, which happens at this virtual instant."""
        woken, begins = self.bell.wait(PATIENT_SECONDS)
        assert woken
        self.rhythm.edge(self.clock.boottime_ns(), begins=begins)

    def close(self) -> None:
        """Give everything back."""
        self.server.stop()
        self.bell.close()
        self.exits.close()


def test_a_tagged_job_between_two_ticks_has_a_window_of_its_own(tmp_path: Path) -> None:
    """Four tenths of a second between two ticks of the grid: its cycles are its own, exactly.

    It ends at 5.7 s, one hundredth before its exit is told; the reading before was at 5.7 s, so
    the one of its exit comes a tenth later.
    """
    work = {"sm_clock_mhz": 1700, "power_watts": 600, "sm_active": 0.9, "pipes": {"hmma": 0.5}}
    with running() as job:
        scenario: dict[str, object] = {
            "driver_version": "595.71.05",
            "processes": {"job": {"pid": job.pid, "real": True}},
            "gpus": [{"model": H100, "phases": [
                {"seconds": 5.3, "sm_clock_mhz": 345, "power_watts": 75, "sm_active": 0,
                 "pipes": {}, "processes": []},
                {"seconds": 0.4, "processes": ["job"], **work}]}],
        }  # fmt: skip
        with EdgeNode(scenario, tmp_path / "tags.sock") as node:
            node.until(5.2)
            register(tmp_path / "tags.sock", Tags(project="atlas", precision="bf16"), pid=job.pid)
            node.hear()
            node.until(5.71)
            job.kill()
            job.wait(PATIENT_SECONDS)
            node.hear()
            node.until(8)
            node.stop()
            records = [r for r in node.records() if isinstance(r, UsageRecord)]
            truth = node.truth_of(records).owner("job")
            node.close()
    mine = [record for record in records if record.owner.project == "atlas"]
    idle = [record for record in records if record.owner.kind == "idle"]

    assert sum(record.gpu_time_ms for record in mine) == 500  # from 5.3 to the reading of its exit
    assert sum(record.cycles.hmma or 0 for record in mine) == truth.active_cycles["hmma"] > 0
    assert sum(record.energy_mj or 0 for record in mine) == truth.energy_mj + 75 * 100
    assert {record.attribution.source for record in mine} == {"tag"}
    assert sum(record.cycles.hmma or 0 for record in idle) == 0
    assert sum(record.gpu_time_ms for record in records) == 6000  # after two seconds of warming up


def test_without_its_edges_a_job_is_right_to_one_tick(tmp_path: Path) -> None:
    """Nobody tagged it and its exit is not told: its first tick is whole, its last is another's."""
    scenario: dict[str, object] = {
        "driver_version": "595.71.05",
        "processes": {"job": {"pid": 10_000_001, "create_time_unix": 1,
                              "environ": {"FLOPLEDGER_PROJECT": "atlas"}}},
        "gpus": [{"model": H100, "phases": [
            {"seconds": 4.5, "sm_clock_mhz": 345, "power_watts": 75, "sm_active": 0, "pipes": {},
             "processes": []},
            {"seconds": 2, "sm_clock_mhz": 1700, "power_watts": 600, "sm_active": 0.9,
             "pipes": {"hmma": 0.5}, "processes": ["job"]}]}],
    }  # fmt: skip
    with EdgeNode(scenario, tmp_path / "tags.sock") as node:
        node.until(10)
        node.stop()
        records = [r for r in node.records() if isinstance(r, UsageRecord)]
        node.close()
    mine = [record for record in records if record.owner.project == "atlas"]
    assert sum(record.gpu_time_ms for record in mine) == 2000  # it held the device from 4.5 to 6.5
    assert [record.start_boot_ms for record in mine] == [BOOT_NS // MS + 4000]


def test_the_daemon_ticks_when_a_job_is_tagged_and_stops_at_once(tmp_path: Path) -> None:
    """The grid's next tick is half a minute away."""
    built, stop = make(tmp_path, speed="1")
    built._rhythm = Rhythm(30 * SECOND_NS)
    ended: list[float] = []

    def act() -> None:
        try:
            wait_until(lambda: built._ticks >= 1)
            ticks = built._ticks
            register(tmp_path / "tags.sock", Tags(project="atlas"))
            wait_until(lambda: built._ticks > ticks + 1)
            ended.append(time.monotonic())
        finally:
            stop.set()

    thread = threading.Thread(target=act)
    thread.start()
    try:
        assert built.run() == 0
    finally:
        thread.join(PATIENT_SECONDS)
    assert time.monotonic() - ended[0] < 25
