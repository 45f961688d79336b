"""The agent's loop without threads, sockets or real time: one call per tick.

It owns order: sample, attribute, meter, remember, and at the end of a minute seal into the spool.
Whatever a port does (a lost driver, a full disk), the loop keeps its state whole: a batch that
cannot be made durable leaves its windows open, and they widen until it can.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

from flopledger_agent import stream
from flopledger_agent.errors import SpoolFull
from flopledger_agent.metering import close_windows, is_due, observe, resume
from flopledger_agent.meters import Meters
from flopledger_core.batch import Predecessor
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.interface import Attributor, Claim
    from flopledger_agent.clocks import Clock
    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.interface import GpuSource, NodeSample
    from flopledger_agent.spool import Spool
    from flopledger_core.signing import SigningKey


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
        self._sealed = 0
        self._last_error: str | None = None
        self._learned_ledger_id: str | None = None
        self.view = self._view(None, {})

    def tick(self) -> None:
        """One sample of everything, metered and remembered; sealed if a minute ended."""
        node = self._source.sample()
        claims = {
            sample.device.key: self._attributor.claims(sample.processes) for sample in node.samples
        }
        meter, slices = observe(self._memory.meter, node, claims, tick_ns=self._facts.tick_ns)
        self._memory = msgspec.structs.replace(self._memory, meter=meter)
        if self._learned_ledger_id is not None and self._memory.ledger_id is None:
            self._memory = msgspec.structs.replace(self._memory, ledger_id=self._learned_ledger_id)
        self.meters.add(node, slices)
        if is_due(meter, node.unix_ns, self._spool.window_minutes()):
            self.seal()
        self._remember()
        self.view = self._view(node, claims)

    def seal(self) -> bool:
        """Close every window and seal what is closed; False when the disk had no room for it."""
        memory = msgspec.structs.replace(self._memory, meter=close_windows(self._memory.meter))
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
                with self.spool_lock:
                    self._spool.put(memory.stream_id, memory.next_sequence, content)
                    self._unadopted = True
                memory = self._memory = after  # sealed: from here on it must not be sealed again
                self._sealed += 1
                self._adopt()
        except SpoolFull as error:
            self._last_error = str(error)
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
        self._attributor.close()
        self._source.close()

    def learn_ledger(self, ledger_id: str) -> None:
        """The collector's ledger id; batches sealed from the next tick on are bound to it."""
        self._learned_ledger_id = ledger_id

    def _recall(self) -> stream.Memory:
        now_unix_ns = self._clock.wall_unix_ns()
        memory = stream.recall(self._disk)
        if memory is None:
            predecessor = self._predecessor_in_spool()
            memory = stream.new_memory(
                self._random_bytes(16).hex(), self._facts.boot_id, predecessor
            )
            stream.begin(self._disk, memory)
            return memory
        return msgspec.structs.replace(
            memory, meter=resume(memory.meter, self._facts.boot_id, now_unix_ns)
        )

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
