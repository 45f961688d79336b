"""The agent's loop without threads, sockets or real time: one call per tick.

It owns order: sample, attribute, meter, remember, and at the end of a minute seal into the spool.
Whatever a port does (a lost driver, a full disk), the loop keeps its state whole: a batch that
cannot be made durable leaves its windows open, and they widen until it can.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent import stream
from flopledger_agent.attribution.interface import DeviceReading, with_default_precision
from flopledger_agent.errors import SpoolFull
from flopledger_agent.estimates import with_estimate
from flopledger_agent.host import metering as host_metering
from flopledger_agent.metering import PAUSED, close_windows, halt, is_due, observe, resume
from flopledger_agent.meters import Meters
from flopledger_agent.pauses import PauseDesk
from flopledger_core.batch import Predecessor
from flopledger_core.signing import fingerprint
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.attribution.interface import Attributor, Claim
    from flopledger_agent.clocks import Clock
    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.interface import GpuSample, GpuSource, NodeSample
    from flopledger_agent.host.counters import HostCounts
    from flopledger_agent.host.metering import HostState
    from flopledger_agent.host.room import HostRoom
    from flopledger_agent.metering import MeterState
    from flopledger_agent.pauses import Pause
    from flopledger_agent.spool import Spool
    from flopledger_agent.windows import Closed
    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.records import Precision
    from flopledger_core.signing import SigningKey


SEAL_RETRY_NS: Final = 30_000_000_000  # a full disk is tried twice a minute, not every tick


class LoopFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the agent runs."""

    node: str
    cluster: str | None
    program: str
    simulated: bool
    boot_id: str
    tick_ns: int
    default_precision: Precision | None = None  # of work whose job declares none


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the page and `check` show: the last tick as a value, replaced whole."""

    sample: NodeSample | None
    claims: dict[str, tuple[Claim, ...]]
    stream_id: str
    next_sequence: int
    ledger_id: str | None
    sealed_batches: int
    window_minutes: int
    last_error: str | None
    pause: Pause | None = None  # in force at this tick
    pause_left_ms: int = 0


class AgentLoop:
    """The composition of the agent's rooms behind their ports."""

    def __init__(  # noqa: PLR0913 (one argument per port, named at the call)
        self,
        *,
        facts: LoopFacts,
        clock: Clock,
        source: GpuSource,
        table: AcceleratorTable,
        attributor: Attributor,
        disk: Disk,
        spool: Spool,
        key: SigningKey,
        random_bytes: Callable[[int], bytes],
        synchronised: Callable[[], bool | None],
        host: HostRoom | None = None,
        ended: Callable[[], frozenset[int]] = frozenset,
    ) -> None:
        self._facts = facts
        self._clock = clock
        self._source = source
        self._table = table
        self._attributor = attributor
        self._disk = disk
        self._spool = spool
        self._key = key
        self._random_bytes = random_bytes
        self._synchronised = synchronised
        self._host = host
        self._ask_ended = ended  # the processes whose exit was told since it was asked last
        self._ended: frozenset[int] = frozenset()
        self.meters = Meters()
        self.pauses = PauseDesk(disk, clock, facts.boot_id)
        self._paused = False
        self._sampled = False
        self.spool_lock = threading.Lock()  # the spool is shared with the shipping thread
        self._memory = self._recall()
        self._unadopted = False
        self._retry_boot_ns = 0
        self.moved_aside = 0  # records that could not be sealed since the agent started
        self._sealed = 0
        self._last_error: str | None = None
        self._learned_ledger_id: str | None = None
        self._left_stream_id: str | None = None
        self.view = self._view(None, {})

    def tick(self) -> None:
        """One sample of everything, metered and remembered; sealed if a minute ended."""
        self._follow_pause()
        node, claims = self._observe()
        self._bind()
        minutes = self._spool.window_minutes()
        due = is_due(self._memory.meter, node.unix_ns, minutes) or host_metering.is_due(
            self._memory.host, node.unix_ns, minutes
        )
        due = due and node.boot_ns >= self._retry_boot_ns
        self._observe_host(closing=due)
        if due:
            self.seal()
        self._remember()
        self.view = self._view(node, claims)

    def _observe(self) -> tuple[NodeSample, dict[str, tuple[Claim, ...]]]:
        """Sample, attribute, meter."""
        node = self._source.sample()
        self._sampled = True
        claims = {
            sample.device.key: with_default_precision(
                self._attributor.claims(sample.processes, reading_of(sample, node)),
                self._facts.default_precision,
            )
            for sample in node.samples
        }
        # After the reading: whoever is gone from it for having ended has been told by now.
        told = self._ask_ended()
        if told:
            self.job_edge()
        ended = self._ended | told
        meter, slices = observe(
            self._memory.meter, node, claims, tick_ns=self._facts.tick_ns, ended=ended
        )
        # A driver may list a process for a moment longer: its exit is remembered until it is gone.
        self._ended = ended & {pid for sample in node.samples for pid in sample.processes or ()}
        self._memory = msgspec.structs.replace(self._memory, meter=meter)
        self.meters.add(node, slices)
        return node, claims

    def _observe_host(self, *, closing: bool) -> None:
        """Sample and meter the node itself when it is time to, or when windows are to close."""
        if self._host is None:
            return
        host, closed = self._host.observe(
            self._memory.host, self._clock.boottime_ns(), closing=closing
        )
        self._memory = _with_host(self._memory, host, closed)

    def _follow_pause(self) -> None:
        """Let go of the driver where somebody paused, after a last reading; else take it again."""
        paused = self.pauses.current() is not None
        if paused and not self._paused:
            if self._sampled:
                self._observe()
            self._source.pause()
            meter = halt(self._memory.meter, PAUSED)
            self._memory = msgspec.structs.replace(self._memory, meter=meter)
        elif self._paused and not paused:
            self._source.resume()
        self._paused = paused
        try:
            self.pauses.settle(paused=paused)
        except SpoolFull as error:
            self._last_error = str(error)

    def seal(self) -> bool:
        """Close every window and seal what is closed; False when the disk had no room for it."""
        memory = _with_host(self._memory, *host_metering.close(self._memory.host))
        memory = self._sound(memory, close_windows(memory.meter))
        try:
            self._adopt()
            while memory.meter.closed:
                content, after = stream.seal_next(
                    memory,
                    stream.next_closed(memory),
                    self._seal_facts(),
                    self._key,
                    self._random_bytes,
                )
                stream.prepare(self._disk, after)
                with self.spool_lock:  # nobody may ship and free it before it is adopted
                    self._spool.put(memory.stream_id, memory.next_sequence, content)
                    self._unadopted = True
                    memory = self._memory = after  # sealed: never to be sealed again
                    self._sealed += 1
                    self._adopt()
        except SpoolFull as error:
            self._last_error = str(error)
            self._retry_boot_ns = self._clock.boottime_ns() + SEAL_RETRY_NS
            return False
        self._last_error = None
        return True

    def _adopt(self) -> None:
        """Let the memory prepared for the last durable batch become the sealed one."""
        if self._unadopted:
            stream.adopt(self._disk)
            self._unadopted = False

    def stop(self) -> None:
        """A clean end: one last sample, everything sealed, ports let go."""
        self.tick()
        self._observe_host(closing=True)
        self.seal()
        self._remember()
        self.view = self._view(self.view.sample, self.view.claims)
        self._attributor.close()
        self._source.close()
        if self._host is not None:
            self._host.close()

    def job_edge(self) -> None:
        """A job began or ended: the node itself is sampled for it, too. From any thread."""
        if self._host is not None:
            self._host.ask()

    def host_counts(self) -> HostCounts | None:
        """What the page shows of the node itself; None where it is not metered."""
        return None if self._host is None else self._host.counters.counts()

    def learn_ledger(self, ledger_id: str) -> None:
        """The collector's ledger id; batches sealed from the next tick on are bound to it.

        A stream that is bound to another ledger ends here and a new one continues it: batches of
        the old one belong to the old ledger and stay in the spool.
        """
        self._learned_ledger_id = ledger_id

    def leave_stream(self, stream_id: str) -> None:
        """The stream is broken at the collector: what is sealed from now on needs another one.

        Its waiting batches stay in the spool for a person to look at.
        """
        self._left_stream_id = stream_id

    def _recall(self) -> stream.Memory:
        memory = stream.recall(self._disk)
        if memory is None:
            predecessor = self._predecessor_in_spool()
            memory = stream.new_memory(
                self._random_bytes(16).hex(), self._facts.boot_id, predecessor
            )
        host, closed = host_metering.resume(
            memory.host,
            before_boot_id=memory.meter.boot_id,
            boot_id=self._facts.boot_id,
            now_boot_ns=self._clock.boottime_ns(),
            now_unix_ns=self._clock.wall_unix_ns(),
        )
        meter = resume(
            memory.meter,
            self._facts.boot_id,
            self._clock.boottime_ns(),
            self._clock.wall_unix_ns(),
        )
        memory = _with_host(msgspec.structs.replace(memory, meter=meter), host, closed)
        own = fingerprint(self._key.public_key)
        if memory.key_fingerprint is None and memory.next_sequence == 0:
            memory = msgspec.structs.replace(memory, key_fingerprint=own)
            stream.begin(self._disk, memory)
        elif memory.key_fingerprint != own:
            memory = stream.succeed(
                memory,
                self._random_bytes(16).hex(),
                ledger_id=memory.ledger_id,
                fingerprint=own,
            )
            stream.begin(self._disk, memory)
        return memory

    def _bind(self) -> None:
        """Bind the stream to the ledger that was learnt; begin another where it cannot go on."""
        learned, memory = self._learned_ledger_id, self._memory
        if memory.stream_id != self._left_stream_id:
            if learned is None or memory.ledger_id == learned:
                return
            if memory.ledger_id is None:
                self._memory = msgspec.structs.replace(memory, ledger_id=learned)
                return
        successor = stream.succeed(
            memory,
            self._random_bytes(16).hex(),
            ledger_id=learned or memory.ledger_id,
            fingerprint=fingerprint(self._key.public_key),
        )
        try:
            stream.begin(self._disk, successor)
        except SpoolFull as error:
            self._last_error = str(error)
            return
        self._memory = successor

    def _sound(self, memory: stream.Memory, meter: MeterState) -> stream.Memory:
        """The memory to seal from: first estimates are made here, of what windows closed with.

        Records that no wire can carry are moved aside, not sealed.
        """
        estimated = tuple(with_estimate(item, self._table) for item in meter.closed)
        meter = msgspec.structs.replace(meter, closed=estimated)
        sound, unsound = stream.sift(meter.closed)
        for number, item in enumerate(unsound):
            name = f"quarantine/record-{self._memory.next_sequence}-{number}.json"
            try:
                self._disk.write(name, msgspec.json.encode(item.record), durable=True)
            except SpoolFull as error:
                self._last_error = str(error)
        if unsound:
            self.moved_aside += len(unsound)
            meter = msgspec.structs.replace(meter, closed=sound)
        return msgspec.structs.replace(memory, meter=meter)

    def _predecessor_in_spool(self) -> Predecessor | None:
        """The memory is gone but batches wait: name their stream, whose head is unknown."""
        waiting = self._spool.batches()
        if not waiting:
            return None
        return Predecessor(stream_id=waiting[-1].stream_id, sequence=None, batch_hash=None)

    def _remember(self) -> None:
        try:
            stream.remember(self._disk, self._memory)
        except SpoolFull as error:
            self._last_error = str(error)

    def _seal_facts(self) -> stream.Seal:
        return stream.Seal(
            node=self._facts.node,
            cluster=self._facts.cluster,
            program=self._facts.program,
            simulated=self._facts.simulated,
            boot_ms=self._clock.boottime_ns() // NS_PER_MS,
            unix_ms=self._clock.wall_unix_ns() // NS_PER_MS,
            synchronised=self._synchronised(),
        )

    def _view(self, sample: NodeSample | None, claims: dict[str, tuple[Claim, ...]]) -> View:
        pause = self.pauses.current()
        return View(
            sample=sample,
            claims=claims,
            stream_id=self._memory.stream_id,
            next_sequence=self._memory.next_sequence,
            ledger_id=self._memory.ledger_id,
            sealed_batches=self._sealed,
            window_minutes=self._spool.window_minutes(),
            last_error=self._last_error,
            pause=pause,
            pause_left_ms=0 if pause is None else self.pauses.left_ms(pause),
        )


def reading_of(sample: GpuSample, node: NodeSample) -> DeviceReading:
    """What an attributor is told of a reading: which device, when, and who used it how much."""
    return DeviceReading(
        device=sample.device.key,
        boot_ns=sample.boot_ns,
        unix_ns=max(0, sample.boot_ns + node.unix_ns - node.boot_ns),
        process_utilization=sample.process_utilization,
    )


def _with_host(memory: stream.Memory, host: HostState, closed: Iterable[Closed]) -> stream.Memory:
    """The memory with the host's new state; its closed records wait with the devices'."""
    meter = msgspec.structs.replace(memory.meter, closed=(*memory.meter.closed, *closed))
    return msgspec.structs.replace(memory, host=host, meter=meter)
