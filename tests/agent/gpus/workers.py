"""Supervised sources over real worker processes, and stand-ins for workers that misbehave."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flopledger_agent.clocks import ScaledClock, ScaledClockConfig, SystemClock
from flopledger_agent.gpus.lanes import Patience
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import SimulatedNode
from flopledger_agent.gpus.worker_process import PipeWorker
from tests.agent.gpus.steered_worker import SteeredFault, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_core.records import Device

DEADLINE_SECONDS = 60.0  # no test waits for it to pass
SECOND_NS = 1_000_000_000


class StubbornWorker(PipeWorker):
    """A real worker that outlives being killed, as one in uninterruptible sleep does."""

    immortal = True

    def end(self, *, kill: bool) -> None:
        """Nothing, as long as it is immortal."""
        if not self.immortal:
            super().end(kill=kill)

    def ended(self) -> bool:
        """Never, as long as it is immortal."""
        return False if self.immortal else super().ended()

    def bury(self) -> None:
        """End it after all, so that no test leaves a process behind."""
        self.immortal = False
        super().end(kill=True)
        self._process.wait(DEADLINE_SECONDS)


class Supervised:
    """A supervised source on a scenario, real processes, real time (perhaps scaled)."""

    def __init__(
        self, source: SupervisedSource, clock: Clock, made: list[PipeWorker], faults: Path
    ) -> None:
        self.source = source
        self.clock = clock
        self.made = made  # every worker started so far
        self._faults = faults
        self.start_ns = 0  # of the scenario, on the clock
        self.took_seconds: list[float] = []  # by tick
        self._pause = threading.Event()

    def fail(self, *faults: SteeredFault) -> None:
        """From now on these faults are in force in every worker, and no others."""
        write(self._faults, *faults)

    def tick(self, seconds: float = 0.05) -> NodeSample:
        """Let real time pass, then sample."""
        self._pause.wait(seconds)
        began = time.monotonic()
        sample = self.source.sample()
        self.took_seconds.append(time.monotonic() - began)
        return sample

    def until(self, true: Callable[[NodeSample], bool], seconds: float = 0.05) -> NodeSample:
        """Tick until a sample is as wanted."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            sample = self.tick(seconds)
            if true(sample):
                return sample
            assert time.monotonic() < deadline, f"never came: {sample}"

    def warm(self, count: int) -> NodeSample:
        """The first sample of that many devices."""
        return self.until(lambda sample: len(sample.samples) == count, 0.15)


@contextmanager
def supervised(
    root: Path,
    scenario: str,
    *,
    speed: int | None = None,
    hang_seconds: float = 0.3,
    start_seconds: float = 30.0,
    deadline_seconds: float = 1.0,
    known: tuple[Device, ...] = (),
    worker: type[PipeWorker] = PipeWorker,
    faults: tuple[SteeredFault, ...] = (),
) -> Iterator[Supervised]:
    """A node read by workers; every process is gone at the end."""
    config = (
        None
        if speed is None
        else ScaledClockConfig(
            speed=speed,
            real_origin_unix_ns=time.time_ns(),
            origin_unix_ns=1_764_000_000 * SECOND_NS,
        )
    )
    clock = SystemClock() if config is None else ScaledClock(config)
    path = root / "scenario.toml"
    path.write_text(scenario)
    simulated = SimulatedNode(
        scenario=str(path),
        start_boottime_ns=clock.boottime_ns(),
        clock=config,
        tie_ns=clock.tie_ns if isinstance(clock, ScaledClock) else 0,
    )
    made: list[PipeWorker] = []
    steering = root / "faults.json"
    write(steering, *faults)
    command = (sys.executable, "-m", "tests.agent.gpus.steered_worker", str(steering))

    def launch() -> PipeWorker:
        made.append(worker(command))
        return made[-1]

    source = SupervisedSource(
        clock, launch, time.monotonic, known=known, deadline_seconds=deadline_seconds,
        simulated=simulated,
        patience=Patience(hang_seconds=hang_seconds, start_seconds=start_seconds),
    )  # fmt: skip
    try:
        it = Supervised(source, clock, made, steering)
        it.start_ns = simulated.start_boottime_ns
        yield it
    finally:
        source.close()
        for process in made:
            if isinstance(process, StubbornWorker):
                process.bury()
            process._process.wait(DEADLINE_SECONDS)


def is_running(pid: int) -> bool:
    """Whether a process is there and not just unreaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open."""
    folder = Path(f"/proc/{pid}/fd")
    found: dict[int, str] = {}
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found[int(entry.name)] = str(entry.readlink())
    return found
