"""The host in the agent's loop: the same minutes, the same batches, the same care at a death."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.disk import MemoryDisk
from flopledger_agent.errors import SpoolFull
from flopledger_agent.host.room import EXTRA_SAMPLES_MAX, HostRoom
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.spool import Spool
from flopledger_core.records import HostRecord, UsageRecord
from flopledger_core.validation import findings
from tests.agent.host.trees import RANGE_UJ, host_sample, reading
from tests.agent.sampling import SECOND_NS, ScriptedSource, node
from tests.agent.test_loop import TABLE, Node, check_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.host.interface import HostSample

WATTS = 300
DRAM_WATTS = 20
BUSY_SHARE = 4  # a quarter of one CPU's time is atlas's, another quarter nobody's


class HostOfNode:
    """A host whose counters run with the node's clock."""

    def __init__(self, place: HostNode) -> None:
        self._place = place
        self._before_ns = place.clock.now_ns
        self.samples = 0
        self.closed = False

    def sample(self) -> HostSample:
        """The counters now, and what atlas used since the sample before."""
        now_ns = self._place.clock.now_ns
        span_ns, self._before_ns = now_ns - self._before_ns, now_ns
        self.samples += 1
        counted_uj = WATTS * now_ns // 1_000 + self._place.base_uj
        energy = {
            "cpu_package": reading(counted_uj % (RANGE_UJ + 1)),
            "dram": reading(DRAM_WATTS * now_ns // 1_000 % (RANGE_UJ + 1), name="package-0/dram"),
        }
        return host_sample(now_ns, 2 * now_ns // BUSY_SHARE, ("atlas", span_ns // BUSY_SHARE),
                           energy=energy, step_ns=self._place.clock.step_ns)  # type: ignore[arg-type] # fmt: skip

    def close(self) -> None:
        """Remember that it was let go."""
        self.closed = True


class HostNode(Node):
    """A node with a host meter beside its GPU."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.base_uj = 0
        self.host: HostOfNode | None = None
        self.room: HostRoom | None = None

    def agent(self) -> AgentLoop:
        """A new process of the agent."""
        self.host = HostOfNode(self)
        self.room = HostRoom(self.host, 10 * SECOND_NS)
        return AgentLoop(
            facts=LoopFacts(node="n1", cluster=None, program="test", simulated=True,
                            boot_id=self.boot_id, tick_ns=SECOND_NS),
            clock=self.clock, source=ScriptedSource(self.samples()), table=TABLE,
            attributor=self.attributor, disk=self.disk, spool=Spool(self.disk, 2**30),
            key=self.key, random_bytes=self.random.randbytes, synchronised=lambda: None,
            host=self.room,
        )  # fmt: skip

    def hosts(self) -> list[HostRecord]:
        """Every host record sealed."""
        return [
            record
            for batch in self.batches()
            for record in batch.records
            if isinstance(record, HostRecord)
        ]


def windows(found: list[HostRecord]) -> dict[tuple[int | None, int], list[HostRecord]]:
    """Records by their window."""
    result: dict[tuple[int | None, int], list[HostRecord]] = {}
    for record in found:
        result.setdefault((record.start_unix_ms, record.window_ms), []).append(record)
    return result


def check_conserved(found: list[HostRecord], total_ms: int) -> None:
    """Windows tile the time and owners tile each window."""
    parts = windows(found)
    assert sum(window_ms for _start, window_ms in parts) == total_ms
    for (_start, window_ms), members in parts.items():
        assert sum(member.cpu_time_ms or 0 for member in members) == 2 * window_ms


def test_host_windows_are_sealed_with_the_gpus_in_the_same_minutes() -> None:
    """Three minutes: the same edges, one chain, nothing the collector's checks object to."""
    place = HostNode(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 185)
    agent.stop()

    check_chain(place.batches())
    gpus = {(record.start_unix_ms, record.window_ms) for record in place.usage()}
    assert set(windows(place.hosts())) == gpus
    check_conserved(place.hosts(), 185_000)
    atlas = [record for record in place.hosts() if record.owner.account == "atlas"]
    assert sum(record.cpu_time_ms or 0 for record in atlas) == 185_000 // BUSY_SHARE
    assert sum(record.energy_mj["cpu_package"] for record in place.hosts()) == WATTS * 185_000
    assert sum(record.energy_mj["dram"] for record in place.hosts()) == DRAM_WATTS * 185_000
    assert not [one for batch in place.batches() for one in findings(batch, TABLE)]
    assert place.host is not None
    assert place.host.closed
    assert place.host.samples < 185 // 10 + 10  # a rhythm of its own


def test_names_of_users_are_sealed_beside_host_records() -> None:
    """The record carries a commitment, the leaf the name."""
    place = HostNode(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 61)
    agent.stop()
    leaves = [
        (record.user_commitment, leaf.names)
        for batch in place.batches()
        for record, leaf in zip(batch.records, batch.leaves, strict=True)
        if isinstance(record, HostRecord) and record.owner.account == "atlas"
    ]
    assert leaves
    assert all(commitment and names and names.user == "alice" for commitment, names in leaves)


def test_an_agent_that_died_is_bridged_in_the_same_boot() -> None:
    """No hole and no double; whose the dark time was is not known."""
    place = HostNode(MemoryDisk())
    place.tick(place.agent(), 95)  # then killed
    place.clock.now_ns += 40 * SECOND_NS
    agent = place.agent()
    place.tick(agent, 65)
    agent.stop()

    total_ms = (95 + 40 + 65) * 1_000
    check_conserved(place.hosts(), total_ms)
    assert sum(record.energy_mj["cpu_package"] for record in place.hosts()) == WATTS * total_ms
    recovered = [record for record in place.hosts() if "recovered" in record.flags]
    assert {record.owner.account for record in recovered} == {"unattributed", "idle"}
    assert {record.window_ms for record in recovered} == {(94 - 90 + 1 + 40) * 1_000}


def test_dark_time_in_which_a_counter_may_have_wrapped_twice_has_no_energy() -> None:
    """Its CPU time is known all the same."""
    place = HostNode(MemoryDisk())
    place.tick(place.agent(), 30)
    place.clock.now_ns += 3_600 * SECOND_NS
    agent = place.agent()
    place.tick(agent, 5)
    agent.stop()
    dark = [record for record in place.hosts() if "recovered" in record.flags]

    assert {record.absent["energy.cpu_package"] for record in dark} == {"wraps_unknown"}
    assert all(record.energy_mj == {} for record in dark)
    check_conserved(place.hosts(), (30 + 3_600 + 5) * 1_000)


def test_a_reboot_is_a_record_without_quantities() -> None:
    """Wall time says how long; counters of another boot say nothing."""
    place = HostNode(MemoryDisk())
    place.tick(place.agent(), 30)
    place.boot_id = "boot-2"
    place.clock.now_ns += 100 * SECOND_NS
    agent = place.agent()
    place.tick(agent, 5)
    agent.stop()
    [dark] = [record for record in place.hosts() if record.start_boot_ms is None]

    assert dark.absent["cpu_time"] == "node_restarted"
    assert dark.window_ms == 110_000  # from the last sample, every tenth second
    assert dark.energy_mj == {}
    check_conserved(
        [record for record in place.hosts() if record.start_boot_ms is not None], 25_000
    )


def test_windows_that_cannot_be_sealed_widen_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk costs resolution, not amounts."""
    place = HostNode(MemoryDisk())
    agent = place.agent()

    def full(*_: object, **__: object) -> None:
        raise SpoolFull("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(agent._spool, "put", full)
        place.tick(agent, 150)
    place.tick(agent, 40)
    agent.stop()

    check_conserved(place.hosts(), 190_000)
    check_chain(place.batches())
    assert sum(record.energy_mj["dram"] for record in place.hosts()) == DRAM_WATTS * 190_000


def test_a_jobs_edge_may_ask_for_a_sample() -> None:
    """The next tick takes one, later ones at a quarter of the edge's age, for one interval."""
    place = HostNode(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 3)
    assert place.host is not None
    assert place.room is not None
    before = place.host.samples
    place.room.ask()
    taken: list[int] = []
    for second in range(30):
        before = place.host.samples
        place.tick(agent, 1)
        taken += [second] if place.host.samples > before else []
    on_time = [second for second in taken if second > 12]

    assert taken[:6] == [0, 1, 2, 3, 4, 5]
    assert [after - before for before, after in pairwise(on_time)] == [10] * (len(on_time) - 1)


def test_a_flood_of_edges_is_rationed() -> None:
    """Whoever tags at every moment of ten minutes gets a few samples more, not one a tick."""
    place = HostNode(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 1)
    assert place.host is not None
    assert place.room is not None
    for _ in range(600):
        place.room.ask()
        place.tick(agent, 1)
    regular = 600 // 10 + 600 // 60
    assert regular <= place.host.samples <= 3 * regular + EXTRA_SAMPLES_MAX


def test_a_node_without_a_gpu_is_sealed_by_its_host_alone() -> None:
    """No device ever answers; the minutes close all the same."""
    place = HostNode(MemoryDisk())
    agent = place.agent()
    agent._source = ScriptedSource(without_driver(place))
    place.tick(agent, 130)
    agent.stop()

    assert not [
        record
        for batch in place.batches()
        for record in batch.records
        if isinstance(record, UsageRecord)
    ]
    check_conserved(place.hosts(), 130_000)
    assert {window_ms for _start, window_ms in windows(place.hosts())} == {60_000, 10_000}


def without_driver(place: HostNode) -> Iterator[NodeSample]:
    """The ticks of a node without a driver, for ever."""
    while True:
        yield msgspec.structs.replace(
            node(place.clock.now_ns, step_ns=place.clock.step_ns),
            driver=None,
            failure="nvml_not_found",
        )
