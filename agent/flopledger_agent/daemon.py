"""The daemon: builds every part from the configuration and gives each its thread.

Three threads that never wait for each other: the loop (the only caller of the driver), the
shipper, and the page. A stop signal ends the loop at its next breath, seals what is open, tries to
deliver once more within a deadline, and leaves; what was not delivered waits in the spool.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import secrets
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent import clocks, exposition, stream
from flopledger_agent.attribution.owners import EnvironmentAttributor
from flopledger_agent.attribution.processes import CombinedProcessTable, PsutilProcessTable
from flopledger_agent.attribution.tags import TagRegistry, TagServer
from flopledger_agent.config import listen_address
from flopledger_agent.delivery import HttpCollector
from flopledger_agent.disk import DirectoryDisk
from flopledger_agent.errors import AgentError, CollectorUnreachable, StateError
from flopledger_agent.gpus.nvml import NvmlSource
from flopledger_agent.host.node import boot_id, clock_is_synchronised
from flopledger_agent.keys import load_or_create_key
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.shipper import DURABLE, Shipper
from flopledger_agent.spool import Spool
from flopledger_core import __version__
from flopledger_core.accelerators import load_table
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.interface import ProcessTable
    from flopledger_agent.config import AgentConfig
    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.simulated import SimulatedDriver
    from flopledger_core.records import Device

PROGRAM: Final = f"flopledger-agent {__version__}"
SHIP_IDLE_SECONDS: Final = 0.5  # how often the shipper looks at the spool, in the clock's time
STOP_DELIVERY_SECONDS: Final = 5.0  # a stopping agent tries to deliver for this long
THREAD_JOIN_SECONDS: Final = 10.0
LOCK_FILE: Final = "agent.lock"

log = logging.getLogger("flopledger.agent")


class Daemon:
    """Every part of a running agent; `run` returns the exit status."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._clock = make_clock(config)
        self._disk = DirectoryDisk(Path(config.state.directory))
        self._lock = lock_state(self._disk.root)
        self._driver = install_simulated_driver(config, self._clock)
        self._table = load_table()
        self._spool = Spool(self._disk, config.spool.max_bytes)
        self._shipper = Shipper(self._spool, random.random)
        self._collector = HttpCollector(
            config.collector.url, config.collector.timeout_seconds, PROGRAM
        )
        processes = process_table(self._driver)
        self._registry = TagRegistry(processes)
        self._tag_server = TagServer(Path(config.tags.socket), self._registry)
        tick_ns = int(config.sampling.interval_seconds * NS_PER_SECOND)
        self._loop = AgentLoop(
            facts=LoopFacts(
                node=config.node.name,
                cluster=config.node.cluster,
                program=PROGRAM,
                simulated=config.simulated,
                boot_id=simulated_boot_id(config) or boot_id(),
                tick_ns=tick_ns,
            ),
            clock=self._clock,
            source=NvmlSource(
                self._clock,
                self._table,
                known=known_devices(self._disk),
                deadline_seconds=config.sampling.deadline_seconds,
            ),
            attributor=EnvironmentAttributor(processes, self._registry),
            disk=self._disk,
            spool=self._spool,
            key=load_or_create_key(self._disk),
            random_bytes=secrets.token_bytes,
            synchronised=clock_is_synchronised,
        )
        self._tick_ns = tick_ns
        self._stop = threading.Event()
        self._ticks = 0
        self._tick_seconds = 0.0
        self._server = exposition.make_server(
            exposition.AgentExposition(
                view=lambda: self._loop.view,
                counts=self._loop.meters.counts,
                shipping=self._shipping_counts,
                ticks=lambda: (self._ticks, self._tick_seconds),
                table=self._table,
                version=__version__,
                simulated=config.simulated,
            ),
            listen_address(config.web.listen_address),
        )

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; everything open is sealed before this returns."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        threads = [
            threading.Thread(target=self._server.serve_forever, name="page", daemon=True),
            threading.Thread(target=self._ship, name="shipper", daemon=True),
        ]
        self._tag_server.start()
        for thread in threads:
            thread.start()
        host, port = self._server.server_address[:2]
        log.info("metrics on http://%s:%s/metrics", host, port, extra={"action": "started"})
        try:
            self._sample_until_stopped()
        finally:
            self._loop.stop()
            self._deliver_once_more()
            self._stop.set()
            self._server.shutdown()
            self._server.server_close()
            self._tag_server.stop()
            threads[1].join(THREAD_JOIN_SECONDS)
            if self._driver is not None:
                self._driver.release_hangs()
                self._driver.uninstall()
        log.info(
            "stopped; %d batches wait in the spool", len(self._spool), extra={"action": "stopped"}
        )
        return 0

    def _sample_until_stopped(self) -> None:
        """Tick on the clock's grid, so that ticks do not drift against UTC minutes."""
        while not self._stop.is_set():
            began = time.perf_counter()
            self._loop.tick()
            self._ticks += 1
            self._tick_seconds += time.perf_counter() - began
            now_ns = self._clock.wall_unix_ns()
            wait_ns = self._tick_ns - now_ns % self._tick_ns
            self._stop.wait(self._clock.sleep_seconds(wait_ns / NS_PER_SECOND))

    def _ship(self) -> None:
        jitter_ns = int(
            self._config.collector.jitter_seconds
            * NS_PER_SECOND
            * random.Random(self._config.node.name).random()  # noqa: S311 (spreads load)
        )
        while not self._stop.is_set():
            sent = False
            if self._clock.wall_unix_ns() % (60 * NS_PER_SECOND) >= jitter_ns:
                sent = self.ship_once()
            if not sent:
                self._stop.wait(self._clock.sleep_seconds(SHIP_IDLE_SECONDS))

    def ship_once(self) -> bool:
        """One request, if there is something to send now; True when it was answered."""
        now_ns = self._clock.boottime_ns()
        if not self._shipper.may_try(now_ns):
            return False
        with self._loop.spool_lock:
            batches = self._shipper.next_batches(now_ns, self._loop.view.stream_id)
            contents = [self._spool.read(batch) for batch in batches]
        try:
            if self._loop.view.ledger_id is None:
                self._loop.learn_ledger(self._collector.ledger_id())
            if not batches:
                return False
            answers = self._collector.send(b"".join(content or b"" for content in contents))
        except CollectorUnreachable as error:
            with self._loop.spool_lock:
                self._shipper.on_failure(now_ns, error.reason, str(error))
            log.warning("%s", error, extra={"action": "ship_failed"})
            return False
        with self._loop.spool_lock:
            self._shipper.on_answers(now_ns, batches, answers)
        refused = [answer for answer in answers.answers if answer.outcome not in DURABLE]
        for answer in refused:
            log.error(
                "batch %d of stream %s: the collector answered %s: %s",
                answer.sequence, answer.stream_id, answer.outcome, answer.message,
                extra={"action": "batch_refused"},
            )  # fmt: skip
        return not refused

    def _deliver_once_more(self) -> None:
        deadline = time.monotonic() + STOP_DELIVERY_SECONDS
        self._shipper.hurry()
        while len(self._spool) and time.monotonic() < deadline:
            if not self.ship_once():
                return

    def _shipping_counts(self) -> exposition.ShippingCounts:
        with self._loop.spool_lock:
            return exposition.ShippingCounts(
                batches=len(self._spool),
                size_bytes=self._spool.size_bytes,
                oldest_age_seconds=self._oldest_age_seconds(),
                quarantined=self._spool.quarantined,
                shipped=self._shipper.shipped,
                failures=dict(self._shipper.failures),
                blocked_streams=len(self._shipper.blocked),
            )

    def _oldest_age_seconds(self) -> float:
        return self._spool.oldest_age_ns(self._clock.wall_unix_ns()) / NS_PER_SECOND


def known_devices(disk: Disk) -> tuple[Device, ...]:
    """Devices that the last agent saw: they are expected until they answer again."""
    memory = stream.recall(disk)
    if memory is None:
        return ()
    return tuple(state.anchor.device for state in memory.meter.devices.values())


def make_clock(config: AgentConfig) -> clocks.Clock:
    """The node's clock, or the scaled one of a demonstration."""
    return clocks.SystemClock() if config.clock is None else clocks.ScaledClock(config.clock)


def lock_state(directory: Path) -> int:
    """Hold the state directory for this process alone; the kernel lets go when it dies."""
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateError(
            f"state.directory is {str(directory)!r}: another agent holds it; stop that one first"
        ) from error
    return descriptor


def install_simulated_driver(config: AgentConfig, clock: clocks.Clock) -> SimulatedDriver | None:
    """Put the configured scenario behind pynvml; None with a real driver."""
    if config.gpus.driver != "simulated" or config.gpus.scenario is None:
        return None
    # Imported only here: a production agent never loads the simulator.
    from flopledger_agent.gpus import simulated  # noqa: PLC0415

    return simulated.install(simulated.load_scenario(Path(config.gpus.scenario)), clock)


def simulated_boot_id(config: AgentConfig) -> str | None:
    """A scaled clock has boots of its own, one per origin."""
    return None if config.clock is None else f"simulated-{config.clock.origin_unix_ns}"


def process_table(driver: SimulatedDriver | None) -> ProcessTable:
    """The operating system's processes, and before them a scenario's imagined ones."""
    real = PsutilProcessTable()
    if driver is None:
        return real
    from flopledger_agent.gpus.simulated.process_table import (  # noqa: PLC0415
        ScenarioProcessTable,
    )

    return CombinedProcessTable(ScenarioProcessTable(driver), real)


def run(config: AgentConfig, announce: Callable[[str], None]) -> int:
    """Build and run the daemon; errors of construction become one sentence."""
    try:
        daemon = Daemon(config)
    except OSError as error:
        raise AgentError(
            f"web.listen_address is {config.web.listen_address!r}: {error.strerror}; choose a "
            "free address"
        ) from error
    announce(f"{PROGRAM}: state in {config.state.directory}, shipping to {config.collector.url}")
    return daemon.run()
