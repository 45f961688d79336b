"""A driver worker inside the test's own process and time: the real source behind real messages.

It answers while the supervisor waits, or only at the next tick where the test holds it back.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from flopledger_agent.gpus import worker
from flopledger_agent.gpus.lanes import Patience
from flopledger_agent.gpus.simulated.driver import SimulatedDriver, install
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_agent.gpus.source import NvmlSource
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import Ask, Hello, Inbox, framed, request_of
from flopledger_agent.gpus.worker_process import WorkerGone
from flopledger_core.accelerators import load_table
from tests.agent.gpus.nodes import IMPATIENT_SECONDS, PATIENT_SECONDS
from tests.agent.sampling import SECOND_NS, TestClock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_agent.gpus.worker_process import WorkerProcess


TABLE = load_table()
Delivery = Literal["in time", "late", "never"]  # late: at the next tick
DEADLINE_SECONDS = 0.3  # of the supervisor; passes only where the test lets answers be late


class InlineWorker:
    """What `gpus.worker` does between its pipes."""

    def __init__(self, clock: TestClock) -> None:
        self._clock = clock
        self._inbox = Inbox()
        self._outbox = b""
        self._overdue = b""
        self._ended = False
        self.source: NvmlSource | None = None
        self.hello: Hello | None = None
        self.asked: list[Ask] = []
        self.how: Delivery = "in time"

    def send(self, content: bytes) -> None:
        """A greeting or a question; answered at once, heard of when nothing holds it back."""
        if self._ended:
            raise WorkerGone("ended")
        self._inbox.feed(content)
        while (body := self._inbox.take()) is not None:
            request = request_of(body)
            if isinstance(request, Hello):
                self.hello = request
                self.source = NvmlSource(
                    self._clock, TABLE, known=request.known, selection=request.selection,
                    scales=request.scales, scales_of_driver=request.scales_of_driver,
                    deadline_seconds=PATIENT_SECONDS,
                )  # fmt: skip
            else:
                assert self.source is not None, "greeted before it is asked"
                self.asked.append(request)
                self._outbox += framed(worker.answer(self.source, request))

    def receive(self) -> bytes:
        """What it may say."""
        if self._ended:
            raise WorkerGone("ended")
        if self.how == "never":
            return b""
        content, self._overdue = self._overdue, b""
        if self.how == "in time":
            content, self._outbox = content + self._outbox, b""
        return content

    def next_tick(self) -> None:
        """What was not heard by now is late."""
        self._overdue, self._outbox = self._overdue + self._outbox, b""

    def fileno(self) -> int:
        """Nothing to poll."""
        return -1

    def end(self, *, kill: bool) -> None:
        """Leave the driver."""
        if not self._ended and self.source is not None:
            self.source.close()
        self._ended = True

    def ended(self) -> bool:
        """Whether it left."""
        return self._ended


class InlineNode:
    """A supervised source over inline workers; time is the test's."""

    def __init__(self, driver: SimulatedDriver, clock: TestClock, patience: Patience) -> None:
        self.driver = driver
        self.clock = clock
        self.made: list[InlineWorker] = []
        self._real_seconds = 0.0
        self.source = SupervisedSource(
            clock, self._launch, lambda: self._real_seconds,
            deadline_seconds=DEADLINE_SECONDS, patience=patience, wait=self._wait,
        )  # fmt: skip

    def tick(self, seconds: float = 1.0) -> NodeSample:
        """Let time pass, then sample."""
        self.clock.now_ns += round(seconds * SECOND_NS)
        self._real_seconds = self.clock.now_ns / SECOND_NS
        for each in self.made:
            each.next_tick()
        return self.source.sample()

    def run(self, ticks: int) -> NodeSample:
        """The last of so many ticks, a second each."""
        for _ in range(ticks - 1):
            self.tick()
        return self.tick()

    def deliver(self, how: Delivery) -> None:
        """When answers come from now on."""
        for each in self.made:
            each.how = how

    def hurry(self) -> None:
        """From here on calls hang for certain: workers do not wait for them."""
        for each in self.made:
            if each.source is not None:
                each.source._deadline_seconds = IMPATIENT_SECONDS

    def _launch(self) -> InlineWorker:
        self.made.append(InlineWorker(self.clock))
        return self.made[-1]

    def _wait(self, _workers: Iterable[WorkerProcess], seconds: float) -> None:
        if any(each.how != "in time" for each in self.made):
            self._real_seconds += seconds  # the deadline passes


@contextmanager
def inline_node(text: str, patience: Patience = Patience()) -> Iterator[InlineNode]:  # noqa: B008
    """A node whose driver follows a scenario, read through a supervisor."""
    clock = TestClock()
    with install(parse_scenario(text), clock) as driver:
        it = InlineNode(driver, clock, patience)
        try:
            yield it
        finally:
            driver.release_hangs()
            it.source.close()
