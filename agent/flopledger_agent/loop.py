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
from flopledger_agent.errors import SpoolFull
from flopledger_agent.metering import close_windows, is_due, observe, resume
from flopledger_agent.meters import Meters
from flopledger_core.batch import Predecessor
from flopledger_core.signing import fingerprint
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.interface import Attributor, Claim
    from flopledger_agent.clocks import Clock
    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.interface import GpuSource, NodeSample
    from flopledger_agent.metering import MeterState
    from flopledger_agent.spool import Spool
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


class AgentLoop:
    """The composition of the agent's rooms behind their ports."""

    def __init__(  # noqa: PLR0913 (one argument per port, named at the call)
        self,
        *,
        facts: LoopFacts,
        clock: Clock,
        source: GpuSource,
        attributor: Attributor,
        disk: Disk,
        spool: Spool,
        key: SigningKey,
        random_bytes: Callable[[int], bytes],
        synchronised: Callable[[], bool | None],
    ) -> None:
        self._facts = facts
        self._clock = clock
        self._source = source
        self._attributor = attributor
        self._disk = disk
        self._spool = spool
        self._key = key
        self._random_bytes = random_bytes
        self._synchronised = synchronised
        self.meters = Meters()
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
        node = self._source.sample()
        claims = {
            sample.device.key: self._attributor.claims(sample.processes) for sample in node.samples
        }
        meter, slices = observe(self._memory.meter, node, claims, tick_ns=self._facts.tick_ns)
        self._memory = msgspec.structs.replace(self._memory, meter=meter)
        self._bind()
        self.meters.add(node, slices)
        due = is_due(meter, node.unix_ns, self._spool.window_minutes())
        if due and node.boot_ns >= self._retry_boot_ns:
            self.seal()
        self._remember()
        self.view = self._view(node, claims)

    def seal(self) -> bool:
        """Close every window and seal what is closed; False when the disk had no room for it."""
        memory = self._sound(close_windows(self._memory.meter))
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
        self.seal()
        self._remember()
        self.view = self._view(self.view.sample, self.view.claims)
        self._attributor.close()
        self._source.close()

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
        meter = resume(
            memory.meter,
            self._facts.boot_id,
            self._clock.boottime_ns(),
            self._clock.wall_unix_ns(),
        )
        memory = msgspec.structs.replace(memory, meter=meter)
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

    def _sound(self, meter: MeterState) -> stream.Memory:
        """The memory to seal from; records that no wire can carry are moved aside, not sealed."""
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
        return msgspec.structs.replace(self._memory, meter=meter)

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
        return View(
            sample=sample,
            claims=claims,
            stream_id=self._memory.stream_id,
            next_sequence=self._memory.next_sequence,
            ledger_id=self._memory.ledger_id,
            sealed_batches=self._sealed,
            window_minutes=self._spool.window_minutes(),
            last_error=self._last_error,
        )
