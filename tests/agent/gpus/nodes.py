"""Nodes on the simulated driver that the tests of the NVML source share."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flopledger_agent.gpus.simulated.driver import SimulatedDriver, install
from flopledger_agent.gpus.simulated.scenario import parse_scenario
from flopledger_agent.gpus.source import NvmlSource
from flopledger_core.accelerators import load_table
from tests.agent.sampling import SECOND_NS, TestClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_core.records import Device

PHASE = """
[[gpus.phases]]
seconds = 1000.0
sm_clock_mhz = 1755
power_watts = 612.5
sm_active = 0.98
pipes = { hmma = 0.55, imma = 0.05, any_tensor = 0.6, fp32 = 0.03 }
processes = ["train"]
"""
# Generous: no test may fail because the machine was busy, and none waits for it to pass.
PATIENT_SECONDS = 30.0
# For calls that hang for certain.
IMPATIENT_SECONDS = 0.05


def scenario(
    *gpus: str, head: str = "", model: str = "NVIDIA H100 80GB HBM3", phase: str = PHASE
) -> str:
    """A scenario text with one GPU for each text in `gpus`, which is added to its table."""
    tables = [f'[[gpus]]\nmodel = "{model}"\n{extra}\n{phase}' for extra in gpus or ("",)]
    return f"{head}\n{''.join(tables)}\n[processes.train]\npid = 4242\nuser = 'alice'\n"


class Node:
    """A simulated node with the source under test."""

    def __init__(self, driver: SimulatedDriver, clock: TestClock, source: NvmlSource) -> None:
        self.driver = driver
        self.clock = clock
        self.source = source

    def tick(self, seconds: float = 1.0) -> NodeSample:
        """Let time pass, then sample."""
        self.clock.now_ns += round(seconds * SECOND_NS)
        return self.source.sample()

    def hurry(self) -> None:
        """From here on calls hang for certain: do not wait for them."""
        self.source._deadline_seconds = IMPATIENT_SECONDS

    def warm(self) -> NodeSample:
        """The first tick at which every device answers with what it has."""
        self.source.sample()
        self.tick()
        return self.tick()

    def until_sampled(self, count: int) -> NodeSample:
        """Tick until that many devices answer: threads that were stuck need real time to return."""
        deadline = time.monotonic() + PATIENT_SECONDS
        while True:
            answer = self.tick()
            if len(answer.samples) == count:
                return answer
            assert time.monotonic() < deadline, f"no tick had {count} samples: {answer}"


@contextmanager
def node(
    text: str | None = None,
    *,
    known: tuple[Device, ...] = (),
) -> Iterator[Node]:
    """A node whose driver follows a scenario; everything is let go of at the end."""
    clock = TestClock()
    with install(parse_scenario(scenario() if text is None else text), clock) as driver:
        source = NvmlSource(clock, load_table(), known=known, deadline_seconds=PATIENT_SECONDS)
        try:
            yield Node(driver, clock, source)
        finally:
            driver.release_hangs()
            source.close()
