"""A node in virtual time: the simulated driver behind the real pynvml, and the real agent on it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Self

from flopledger_agent.attribution.owners import EnvironmentAttributor
from flopledger_agent.attribution.tags import TagRegistry
from flopledger_agent.disk import MemoryDisk
from flopledger_agent.gpus import simulated
from flopledger_agent.gpus.simulated.process_table import ScenarioProcessTable
from flopledger_agent.gpus.source import NvmlSource
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.spool import Spool
from flopledger_core.accelerators import load_table
from flopledger_core.batch import decode
from flopledger_core.signing import SigningKey
from tests.agent.sampling import SECOND_NS, TestClock

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from flopledger_agent.gpus.simulated import Truth
    from flopledger_core.batch import SealedBatch
    from flopledger_core.records import Record


class VirtualNode:
    """One node whose seconds pass when the test says so; use as a context manager."""

    def __init__(
        self,
        scenario: Mapping[str, object],
        *,
        name: str = "node-1",
        seed: int = 1,
        tick_ns: int = SECOND_NS,
    ) -> None:
        self.tick_ns = tick_ns
        self.clock = TestClock()
        self.name = name
        self.boot_id = "boot-1"
        self.key = SigningKey.from_seed(seed.to_bytes(32, "big"))
        self.disk = MemoryDisk()
        self.random = random.Random(seed)
        start: dict[str, object] = {"start_boottime_ns": self.clock.boottime_ns()}
        self.driver = simulated.install(simulated.build_scenario({**start, **scenario}), self.clock)
        self.agent = self._agent()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.driver.release_hangs()
        self.driver.uninstall()

    def _agent(self) -> AgentLoop:
        processes = ScenarioProcessTable(self.driver)
        self.spool = Spool(self.disk, 2**30)
        return AgentLoop(
            facts=LoopFacts(node=self.name, cluster="virtual", program="test", simulated=True,
                            boot_id=self.boot_id, tick_ns=self.tick_ns),
            clock=self.clock,
            source=NvmlSource(self.clock, load_table(), deadline_seconds=30.0),
            table=load_table(),
            attributor=EnvironmentAttributor(processes, TagRegistry(processes)),
            disk=self.disk, spool=self.spool, key=self.key,
            random_bytes=self.random.randbytes, synchronised=lambda: True,
        )  # fmt: skip

    def run(self, seconds: int) -> None:
        """Tick once at the start of every second."""
        for _ in range(seconds):
            self.agent.tick()
            self.clock.now_ns += SECOND_NS

    def run_ticks(self, count: int) -> None:
        """Tick in the agent's own rhythm."""
        for _ in range(count):
            self.agent.tick()
            self.clock.now_ns += self.tick_ns

    def drain(self) -> list[SealedBatch]:
        """What a collector would have taken by now; the spool is free again."""
        batches: list[SealedBatch] = []
        for waiting in self.spool.batches():
            batches.append(decode(self.spool.read(waiting) or b""))
            self.spool.free(waiting.stream_id, waiting.sequence)
        return batches

    def kill_agent(self, dark_seconds: int) -> None:
        """The process dies as it stands; another one starts later."""
        self.clock.now_ns += dark_seconds * SECOND_NS
        self.agent = self._agent()

    def reboot(self, dark_seconds: int) -> None:
        """The agent dies as it stands; another one starts in another boot.

        Time and counters go on here, which the new agent must not believe.
        """
        self.boot_id = f"{self.boot_id}+"
        self.kill_agent(dark_seconds)

    def stop(self) -> None:
        """A clean shutdown at this instant."""
        self.agent.stop()

    def contents(self) -> list[bytes]:
        """The sealed bytes in the order to ship."""
        spool = Spool(self.disk, 2**30)
        return [spool.read(batch) or b"" for batch in spool.batches()]

    def batches(self) -> list[SealedBatch]:
        """The sealed batches."""
        return [decode(content) for content in self.contents()]

    def records(self) -> list[Any]:
        """Every record sealed."""
        records: list[Record] = [record for batch in self.batches() for record in batch.records]
        return records

    def truth_of(self, records: list[Any]) -> Truth:
        """What the driver truly did from the first to the last instant that was metered."""
        start_ms = min(record.start_boot_ms for record in records)
        end_ms = max(record.end_boot_ms for record in records)
        return self.driver.truth_between(start_ms * 1_000_000, end_ms * 1_000_000)
