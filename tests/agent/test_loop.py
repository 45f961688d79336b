"""The loop seals once, forgets nothing, and survives its disk and its own death."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_agent.disk import DirectoryDisk, MemoryDisk
from flopledger_agent.errors import SpoolFull
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.spool import Spool
from flopledger_core.accelerators import load_table
from flopledger_core.batch import decode
from flopledger_core.records import GapRecord, Precision, UsageRecord
from flopledger_core.signing import SigningKey
from tests.agent.sampling import (
    GPU,
    SECOND_NS,
    FixedAttributor,
    ScriptedSource,
    TestClock,
    claim,
    cycles,
    node,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_core.batch import SealedBatch

TABLE = load_table()
KEY = SigningKey.from_seed(b"\x03" * 32)
RATE = 132 * 1_000_000_000  # SM-cycles a second
WATTS_MJ = 500_000  # millijoules a second


class Node:
    """A node whose counters run with its clock, and agents that live and die on it."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.clock = TestClock()
        self.attributor = FixedAttributor(claim("atlas"))
        self.boot_id = "boot-1"
        self.key = KEY
        self.device = GPU
        self.default_precision: Precision | None = None
        self.random = random.Random(0)

    def samples(self) -> Iterator[NodeSample]:
        """What the driver would say now, for ever."""
        while True:
            now_ns = self.clock.now_ns
            counted = RATE * now_ns // SECOND_NS
            energy = WATTS_MJ * now_ns // SECOND_NS
            yield node(now_ns, sample(now_ns, cycles(counted, counted // 2), energy, self.device),
                       step_ns=self.clock.step_ns)  # fmt: skip

    def agent(self) -> AgentLoop:
        """A new process of the agent."""
        return AgentLoop(
            facts=LoopFacts(node="n1", cluster=None, program="test", simulated=True,
                            boot_id=self.boot_id, tick_ns=SECOND_NS,
                            default_precision=self.default_precision),
            clock=self.clock, source=ScriptedSource(self.samples()), table=TABLE,
            attributor=self.attributor,
            disk=self.disk, spool=Spool(self.disk, 2**30), key=self.key,
            random_bytes=self.random.randbytes, synchronised=lambda: None,
        )  # fmt: skip

    def tick(self, agent: AgentLoop, seconds: int = 1) -> None:
        """Let seconds pass, one tick each."""
        for _ in range(seconds):
            agent.tick()
            self.clock.now_ns += SECOND_NS

    def batches(self) -> list[SealedBatch]:
        """Everything sealed, in order."""
        spool = Spool(self.disk, 2**30)
        return [decode(spool.read(batch) or b"") for batch in spool.batches()]

    def usage(self) -> list[UsageRecord]:
        """Every usage record sealed."""
        return [
            record
            for batch in self.batches()
            for record in batch.records
            if isinstance(record, UsageRecord)
        ]


def check_chain(batches: list[SealedBatch]) -> None:
    """Each batch links to the one before, without a hole."""
    assert [batch.header.sequence for batch in batches] == list(range(len(batches)))
    for before, after in itertools.pairwise(batches):
        assert after.header.previous_hash == before.hash


def test_minutes_are_sealed_and_linked() -> None:
    """Three minutes of ticks make linked batches whose records tile the time."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 185)
    agent.stop()
    records = place.usage()

    check_chain(place.batches())
    assert sum(record.gpu_time_ms for record in records) == 185_000
    assert sum(record.cycles.elapsed or 0 for record in records) == RATE * 185
    assert sum(record.energy_mj or 0 for record in records) == WATTS_MJ * 185
    assert [record.window_ms for record in records] == [60_000, 60_000, 60_000, 5_000]


def test_names_of_users_are_sealed_beside_their_records() -> None:
    """The record carries a commitment, the leaf the name."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 3)
    agent.stop()
    (batch,) = place.batches()

    assert batch.leaves[0].names is not None
    assert batch.leaves[0].names.user == "alice"
    assert b"alice" not in bytes(batch.leaves[0].record)


class Death(BaseException):
    """The process is gone; no handler of the agent may catch it."""


class DyingDisk(MemoryDisk):
    """Dies at the n-th operation that changes something: before it, or just after it."""

    def __init__(self, fatal_operation: int, *, after: bool) -> None:
        super().__init__()
        self._left = fatal_operation
        self._after = after

    def _operation(self, *, done: bool) -> None:
        if done == self._after:
            self._left -= 1
            if self._left == 0:
                raise Death

    def write(self, name: str, content: bytes, *, durable: bool) -> None:
        """Count and perhaps die."""
        self._operation(done=False)
        super().write(name, content, durable=durable)
        self._operation(done=True)

    def rename(self, name: str, new_name: str) -> None:
        """Count and perhaps die."""
        self._operation(done=False)
        super().rename(name, new_name)
        self._operation(done=True)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fatal", range(1, 136))
def test_death_at_any_write_neither_loses_nor_doubles(fatal: int, *, after: bool) -> None:
    """Kill the process at each write of two minutes and restart it: every second is there once."""
    place = Node(DyingDisk(fatal, after=after))
    try:
        agent = place.agent()
        place.tick(agent, 130)
    except Death:
        place.clock.now_ns += 2 * SECOND_NS
        agent = place.agent()
        place.tick(agent, 70)
    end_ns = place.clock.now_ns
    agent.stop()
    records = place.usage()

    check_chain(place.batches())
    lived_ms = sum(record.gpu_time_ms for record in records)
    assert lived_ms in {end_ns // 1_000_000, end_ns // 1_000_000 - lost_start_ms(records)}
    assert sum(record.cycles.elapsed or 0 for record in records) == RATE * lived_ms // 1000
    assert sum(record.energy_mj or 0 for record in records) == WATTS_MJ * lived_ms // 1000


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fatal", range(50, 136))
def test_death_beside_an_eager_shipper_seals_no_number_twice(fatal: int, *, after: bool) -> None:
    """Batches are shipped and freed as soon as they may be; one number never has two contents."""
    place = Node(DyingDisk(fatal, after=after))
    received: dict[tuple[str, int], bytes] = {}

    def ship() -> None:
        spool = Spool(place.disk, 2**30)
        for batch in spool.batches():
            content = spool.read(batch) or b""
            assert received.setdefault((batch.stream_id, batch.sequence), content) == content
            spool.free(batch.stream_id, batch.sequence)

    try:
        agent = place.agent()
        for _ in range(130):
            place.tick(agent)
            ship()
    except Death:
        place.clock.now_ns += 2 * SECOND_NS
        agent = place.agent()
        place.tick(agent, 70)
    agent.stop()
    ship()
    batches = [decode(received[key]) for key in sorted(received)]

    check_chain(batches)
    spans = sorted(
        (record.start_boot_ms, record.end_boot_ms)
        for batch in batches
        for record in batch.records
        if isinstance(record, UsageRecord)
    )
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


def lost_start_ms(records: list[UsageRecord]) -> int:
    """Time before the first sample that was ever remembered: nobody metered yet."""
    return min(record.start_boot_ms for record in records) - 50_000


@pytest.mark.parametrize("seed", range(40))
def test_power_loss_leaves_a_gap_and_never_a_double(seed: int) -> None:
    """Power fails at a random second: what was not durable becomes a gap up to the next boot."""
    chance = random.Random(seed)
    disk = MemoryDisk()
    place = Node(disk)
    agent = place.agent()
    place.tick(agent, chance.randrange(1, 200))
    disk.crash()
    place.boot_id = "boot-2"
    place.clock.now_ns += 30 * SECOND_NS
    agent = place.agent()
    place.tick(agent, 65)
    agent.stop()
    batches = place.batches()
    covered: list[tuple[int, int]] = []
    for batch in batches:
        covered += [
            (record.start_unix_ms, record.end_unix_ms)
            for record in batch.records
            if isinstance(record, (UsageRecord, GapRecord))
        ]
    covered.sort()

    check_chain(batches)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))


def test_a_full_disk_widens_windows_and_loses_nothing() -> None:
    """While nothing can be written, windows stay open; when there is room, they are all there."""
    disk = MemoryDisk()
    place = Node(disk)
    agent = place.agent()
    place.tick(agent, 70)
    disk.room_bytes = 0
    place.tick(agent, 200)

    assert agent.view.last_error is not None
    disk.room_bytes = None
    place.tick(agent, 2)
    agent.stop()
    records = place.usage()
    check_chain(place.batches())
    assert agent.view.last_error is None
    assert sum(record.gpu_time_ms for record in records) == 272_000
    assert sum(record.energy_mj or 0 for record in records) == WATTS_MJ * 272


def test_a_lost_memory_begins_a_new_stream_that_names_the_old() -> None:
    """Without its memory the agent does not pretend to continue."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 70)
    for name in ("memory.json", "memory.sealed.json", "memory.next.json"):
        place.disk.remove(name)
    old_stream = agent.view.stream_id
    again = place.agent()
    place.tick(again, 2)
    again.stop()
    first = next(batch for batch in place.batches() if batch.header.stream_id != old_stream)

    assert first.header.sequence == 0
    assert first.header.predecessor is not None
    assert first.header.predecessor.stream_id == old_stream


def test_the_learned_ledger_id_binds_later_batches() -> None:
    """Batches sealed before the collector was reached are bound to no ledger."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 61)
    agent.learn_ledger("cd" * 16)
    place.tick(agent, 61)
    agent.stop()

    assert [batch.header.ledger_id for batch in place.batches()] == [None, "cd" * 16, "cd" * 16]


def test_a_real_directory_keeps_the_same_promises(tmp_path: Path) -> None:
    """The same story on a real file system, private to its user."""
    place = Node(DirectoryDisk(tmp_path / "state"))
    agent = place.agent()
    place.tick(agent, 61)
    again = place.agent()
    place.clock.now_ns += SECOND_NS
    place.tick(again, 3)
    again.stop()

    check_chain(place.batches())
    assert sum(record.gpu_time_ms for record in place.usage()) == 65_000
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_the_spool_limit_is_a_clear_refusal() -> None:
    """A batch that does not fit is not half kept."""
    spool = Spool(MemoryDisk(), 2**20)

    with pytest.raises(SpoolFull, match=r"spool\.max_bytes"):
        spool.put("ab" * 16, 0, b"x" * (2**20 + 1))
    assert len(spool) == 0


def test_windows_widen_as_the_spool_fills() -> None:
    """One minute, ten from half full, sixty from four fifths."""
    spool = Spool(MemoryDisk(), 2**20)
    widths = []
    for sequence in range(9):
        widths.append(spool.window_minutes())
        spool.put("ab" * 16, sequence, b"x" * (2**20 // 10 + 1))

    assert widths == [1, 1, 1, 1, 1, 10, 10, 10, 60]
    assert GPU.key == "GPU-1"


def test_a_file_that_is_no_batch_is_moved_aside() -> None:
    """Quarantined, counted, never deleted."""
    disk = MemoryDisk()
    disk.write("spool/garbage.batch", b"?", durable=True)
    spool = Spool(disk, 2**20)

    assert (len(spool), spool.quarantined) == (0, 1)
    assert disk.read("quarantine/garbage.batch") == b"?"


def test_another_key_begins_a_stream_that_names_the_old_one() -> None:
    """Whoever lost the key file goes on metering, in a stream of the new key."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 70)
    old = agent.view.stream_id
    place.key = SigningKey.from_seed(b"\x04" * 32)
    agent = place.agent()
    place.tick(agent, 3)
    agent.stop()
    batches = [batch for batch in place.batches() if batch.header.stream_id != old]

    assert batches[0].header.public_key == place.key.public_key
    assert batches[0].header.predecessor is not None
    assert batches[0].header.predecessor.stream_id == old
    assert batches[0].header.predecessor.sequence == 0
    assert sum(record.gpu_time_ms for record in place.usage()) == 73_000


def test_another_ledger_begins_a_stream_that_is_bound_to_it() -> None:
    """A collector whose ledger was founded anew gets what is sealed from now on."""
    place = Node(MemoryDisk())
    agent = place.agent()
    agent.learn_ledger("cd" * 16)
    place.tick(agent, 70)
    agent.learn_ledger("ef" * 16)
    place.tick(agent, 70)
    agent.stop()
    bound = {batch.header.stream_id: batch.header.ledger_id for batch in place.batches()}

    assert sorted(bound.values(), key=str) == ["cd" * 16, "ef" * 16]
    assert sum(record.gpu_time_ms for record in place.usage()) == 140_000


def test_owners_of_one_window_are_never_sealed_apart() -> None:
    """After a long full disk many records wait: batches are cut between windows."""
    disk = MemoryDisk()
    place = Node(disk)
    sharers = (claim("atlas"), claim("birch"), claim("cedar"))
    agent = place.agent()
    place.tick(agent, 61)
    disk.room_bytes = 0
    for second in range(1500):
        place.attributor.now = sharers if second % 2 else (*sharers, claim("delta"))
        place.tick(agent)
    disk.room_bytes = None
    agent.stop()
    for batch in place.batches():
        windows: dict[tuple[int, int], int] = {}
        for record in batch.records:
            assert isinstance(record, UsageRecord)
            span = (record.start_boot_ms, record.end_boot_ms)
            windows[span] = windows.get(span, 0) + record.gpu_time_ms
        assert all(time == end - start for (start, end), time in windows.items())

    assert len(place.batches()) > 2


def test_a_record_no_wire_can_carry_is_moved_aside() -> None:
    """One absurd reading costs one record, never the stream."""
    disk = MemoryDisk()
    place = Node(disk)
    place.attributor.now = (claim("atlas"),)
    agent = place.agent()
    place.tick(agent, 2)
    odd = msgspec.structs.replace(GPU, uuid="GPU-" + "0" * 200)
    place.device = odd
    place.tick(agent, 2)
    place.device = GPU
    place.tick(agent, 2)
    agent.stop()

    assert agent.moved_aside >= 1
    assert disk.names("quarantine") != []
    assert {record.device.uuid for record in place.usage()} == {GPU.uuid}


def test_a_stream_broken_at_the_collector_is_succeeded() -> None:
    """What is sealed later goes on in a stream that names the broken one."""
    place = Node(MemoryDisk())
    agent = place.agent()
    place.tick(agent, 70)
    broken = agent.view.stream_id
    agent.leave_stream(broken)
    place.tick(agent, 70)
    agent.stop()
    later = [batch for batch in place.batches() if batch.header.stream_id != broken]

    assert later[0].header.predecessor is not None
    assert later[0].header.predecessor.stream_id == broken
    assert len({batch.header.stream_id for batch in later}) == 1
    assert sum(record.gpu_time_ms for record in place.usage()) == 140_000
