"""The daemon: builds every part from the configuration and gives each its thread.

Three threads that never wait for each other: the loop (the only caller of the driver), the
shipper, and the page. A stop signal ends the loop at its next breath, seals what is open, tries to
deliver once more within a deadline, and leaves; what was not delivered waits in the spool. No step
of stopping can keep the next one from happening.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent import clocks, exposition, spool, stream
from flopledger_agent.attribution.exits import ExitWatch
from flopledger_agent.attribution.processes import CombinedProcessTable, PsutilProcessTable
from flopledger_agent.attribution.schedulers import SchedulerFindings, Schedulers
from flopledger_agent.attribution.tags import TagRegistry, TagServer
from flopledger_agent.config import listen_address
from flopledger_agent.control import Control
from flopledger_agent.delivery import HttpCollector
from flopledger_agent.disk import DIRECTORY_MODE, DirectoryDisk, unusable
from flopledger_agent.errors import AgentError, StateError
from flopledger_agent.gpus import ladder
from flopledger_agent.gpus.observed import ObservedSource
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import SimulatedNode
from flopledger_agent.gpus.worker_process import PipeWorker
from flopledger_agent.host.building import host_meter
from flopledger_agent.host.node import boot_id, clock_is_synchronised
from flopledger_agent.host.room import HostRoom
from flopledger_agent.keys import load_or_create_key
from flopledger_agent.loop import AgentLoop, LoopFacts
from flopledger_agent.node_lock import NodeLock
from flopledger_agent.rhythm import Bell, Rhythm, ring_when_set, wait_until_due
from flopledger_agent.shipper import Shipper
from flopledger_agent.shipping import Shipping
from flopledger_core import __version__
from flopledger_core.accelerators import load_table
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from http.server import ThreadingHTTPServer

    from flopledger_agent.attribution.interface import ProcessTable
    from flopledger_agent.config import AgentConfig
    from flopledger_agent.disk import Disk
    from flopledger_agent.gpus.simulated import SimulatedDriver
    from flopledger_agent.gpus.worker_process import WorkerProcess
    from flopledger_agent.loop import View
    from flopledger_core.records import Device

PROGRAM: Final = f"flopledger-agent {__version__}"
STALL_SECONDS: Final = 30.0  # real time without a tick after which the agent is not well
STALL_TICKS: Final = 5  # and as many intervals: a slow rhythm is no stall
LOCK_FILE: Final = "agent.lock"
NO_DRIVER: Final = ("nvml_not_found", "driver_not_loaded", "no_devices")  # no NVIDIA GPU to meter

log = logging.getLogger("flopledger.agent")


class Daemon:
    """Every part of a running agent; `run` returns the exit status."""

    def __init__(
        self,
        config: AgentConfig,
        stop: threading.Event,
        launch: Callable[[], WorkerProcess] = PipeWorker,
        hold_node: Callable[[Callable[[str], None]], NodeLock] = NodeLock,
    ) -> None:
        self._config = config
        self._stop = stop  # set from outside: a signal came
        self._clock = make_clock(config)
        self._schedulers = make_schedulers(config, self._clock, self._job_begins)
        self._lock = lock_state(Path(config.state.directory))  # before anything in it is touched
        try:
            self._node_lock = None if config.simulated else hold_node(_say_lock_trouble)
        except AgentError:
            os.close(self._lock)
            raise
        self._disk = DirectoryDisk(
            Path(config.state.directory), (spool.DIRECTORY, spool.QUARANTINE)
        )
        self._driver = install_simulated_driver(config, self._clock)
        self._table = load_table()
        self._gpus = gpu_source(
            config, self._clock, self._driver, known_devices(self._disk), launch
        )
        self._spool = spool.Spool(self._disk, config.spool.max_bytes)
        self._shipper = Shipper(self._spool, secrets.SystemRandom().random)
        processes = process_table(self._driver)
        self._registry = TagRegistry(processes)
        tick_ns = int(config.sampling.interval_seconds * NS_PER_SECOND)
        self._exits = ExitWatch()
        self._loop = self._make_loop(processes, tick_ns)
        self._bell = Bell(self._exits)
        self._rhythm = Rhythm(tick_ns)
        self._tag_server = TagServer(
            Path(config.tags.socket),
            self._registry,
            registered=self._job_begins,
            others=Control(self._loop.pauses, os.geteuid(), self._bell.ring),
        )
        self._shipping = Shipping(
            loop=self._loop,
            spool=self._spool,
            shipper=self._shipper,
            collector=HttpCollector(
                config.collector.url, config.collector.timeout_seconds, PROGRAM
            ),
            clock=self._clock,
            jitter_ns=jitter_ns(config),
        )
        self._tick_ns = tick_ns
        self._ticks = 0
        self._tick_seconds = 0.0
        self._last_tick_at = time.monotonic()
        self._findings = SchedulerFindings()
        self._said: str | None = None
        self._said_no_gpu = False
        try:
            self._server = self._make_page()
        except AgentError:
            self._let_go()
            raise

    def _make_loop(self, processes: ProcessTable, tick_ns: int) -> AgentLoop:
        config = self._config
        return AgentLoop(
            facts=LoopFacts(
                node=config.node.name,
                cluster=config.node.cluster,
                program=PROGRAM,
                simulated=config.simulated,
                boot_id=simulated_boot_id(config) or boot_id(),
                tick_ns=tick_ns,
                default_precision=config.gpus.default_precision,
            ),
            clock=self._clock,
            source=ObservedSource(
                ladder.over(
                    self._gpus, config.gpus.dcgm, self._clock, self._table, config.node.name
                ),
                self._schedulers.observe,
            ),
            table=self._table,
            attributor=self._schedulers.attributor(config.attribution, processes, self._registry),
            disk=self._disk,
            spool=self._spool,
            key=load_or_create_key(self._disk),
            random_bytes=secrets.token_bytes,
            synchronised=clock_is_synchronised,
            host=make_host(config, self._clock, processes, self._registry, self._schedulers),
            ended=self._exits.ended,
        )

    def _make_page(self) -> ThreadingHTTPServer:
        page = exposition.AgentExposition(
            view=lambda: self._loop.view,
            host=self._loop.host_counts,
            counts=self._loop.meters.counts,
            shipping=self._shipping_counts,
            ticks=lambda: (self._ticks, self._tick_seconds),
            workers=lambda: self._gpus.counts,
            allocations=lambda: self._findings,
            table=self._table,
            version=__version__,
            simulated=self._config.simulated,
        )
        address = self._config.web.listen_address
        try:
            return exposition.make_server(page, listen_address(address), self.trouble)
        except OSError as error:
            raise AgentError(
                f"web.listen_address is {address!r}: {error.strerror or error}; choose a free "
                "address"
            ) from error

    def _job_begins(self) -> None:
        """A tag was registered, or jobs hold other devices: all is read at once. Any thread."""
        self._loop.job_edge()
        self._bell.ring(begins=True)

    def run(self) -> int:
        """Run until `stop` is set; everything open is sealed before this returns.

        The exit status: 0, or 1 when something open could not be sealed and waits in the memory.
        """
        self._tag_server.start()
        self._schedulers.start()
        page = threading.Thread(target=self._server.serve_forever, name="page", daemon=True)
        page.start()
        self._shipping.start()
        host, port = self._server.server_address[:2]
        log.info("metrics on http://%s:%s/metrics", host, port, extra={"action": "started"})
        sealed = False
        try:
            self._sample_until_stopped()
        finally:
            sealed = self._wind_down()
        log.info(
            "stopped; %d batches wait in the spool", len(self._spool), extra={"action": "stopped"}
        )
        return 0 if sealed else 1

    def _wind_down(self) -> bool:
        """Seal, deliver, let go: each step whatever became of the others. True when sealed."""
        sealed = False
        with _guarded("seal what is open"):
            self._loop.stop()
            sealed = self._loop.seal()  # nothing is open any more, unless it could not be sealed
            if not sealed:
                log.error(
                    "windows that are open could not be sealed; the next start goes on with them",
                    extra={"action": "cannot_seal"},
                )
        for what, step in (
            ("let go of the schedulers", self._schedulers.close),
            ("let the driver go", self._gpus.close),  # nothing, unless stopping the loop failed
            ("deliver once more", self._shipping.finish),
            ("close the page", self._server.shutdown),
            ("close the page", self._server.server_close),
            ("remove the tag socket", self._tag_server.stop),
        ):
            with _guarded(what):
                step()
        self._let_go()
        return sealed

    def _let_go(self) -> None:
        """Give back what the process holds: the simulated driver's place and the state lock."""
        if self._driver is not None:
            with _guarded("unload the simulated driver"):
                self._driver.release_hangs()
                self._driver.uninstall()
        with _guarded("give the descriptors back"):
            self._bell.close()
            self._exits.close()
            if self._node_lock is not None:
                self._node_lock.release()
        os.close(self._lock)

    def trouble(self) -> str | None:
        """What keeps this agent from doing its work, in a sentence; None when nothing does."""
        silent_seconds = time.monotonic() - self._last_tick_at
        rhythm_seconds = self._clock.sleep_seconds(STALL_TICKS * self._tick_ns / NS_PER_SECOND)
        if silent_seconds > max(STALL_SECONDS, rhythm_seconds):
            return f"nothing was sampled for {silent_seconds:.0f} seconds: restart the agent"
        if not self._shipping.alive:
            return "the shipping thread has ended: restart the agent"
        return None

    def _sample_until_stopped(self) -> None:
        """Tick on the clock's grid, so that ticks do not drift against UTC minutes.

        Between two of its ticks job edges make extra ones.
        """
        ring_when_set(self._stop, self._bell)
        while not self._stop.is_set():
            began = time.perf_counter()
            self._rhythm.ticked(self._clock.boottime_ns(), self._clock.wall_unix_ns())
            self._loop.tick()
            self._ticks += 1
            self._tick_seconds += time.perf_counter() - began
            self._last_tick_at = time.monotonic()
            self._findings = self._schedulers.findings()
            self._say_sealing_trouble()
            self._say_no_gpu()
            if self._node_lock is not None:
                self._node_lock.drain()
            self._exits.watch(pids_on_devices(self._loop.view), self._registry.tagged_pids())
            wait_until_due(self._rhythm, self._bell, self._clock, self._stop.is_set)

    def _say_sealing_trouble(self) -> None:
        """Log why windows cannot be sealed when the reason is another one than before."""
        trouble = self._loop.view.last_error
        if trouble != self._said:
            self._said = trouble
            if trouble is not None:
                log.error("%s", trouble, extra={"action": "cannot_seal"})
            else:
                log.info("windows can be sealed again", extra={"action": "sealing_again"})

    def _say_no_gpu(self) -> None:
        """Log once that there is no driver here, and that the node itself is metered all the same.

        A driver that was there before is another story, told by its devices' failures.
        """
        sample = self._loop.view.sample
        if self._said_no_gpu or sample is None or sample.failure not in NO_DRIVER:
            return
        if sample.samples or sample.failures:
            return
        self._said_no_gpu = True
        log.info(
            "no GPU is metered here (%s)%s",
            sample.failure,
            "; the node's CPUs and energy are" if self._config.host.enabled else "",
            extra={"action": "no_gpu"},
        )

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


def make_schedulers(
    config: AgentConfig, clock: clocks.Clock, changed: Callable[[], None]
) -> Schedulers:
    """The configured schedulers; `changed` is called when jobs hold other devices."""
    return Schedulers(
        config.slurm,
        config.kubernetes,
        clock,
        changed,
        environ=os.environ,
        monotonic_seconds=time.monotonic,
    )


def make_host(
    config: AgentConfig,
    clock: clocks.Clock,
    processes: ProcessTable,
    registry: TagRegistry,
    schedulers: Schedulers,
) -> HostRoom | None:
    """The host's meter and its rhythm; None when it is switched off.

    A simulated node has no CPUs of its own: those of the machine that plays it are not its.
    """
    if config.simulated or not config.host.enabled:
        return None
    meter = host_meter(
        config.host,
        clock=clock,
        attributor=schedulers.attributor(config.attribution, processes, registry),
        registry=registry,
        monotonic_seconds=time.monotonic,
    )
    return HostRoom(meter, int(config.host.interval_seconds * NS_PER_SECOND))


def jitter_ns(config: AgentConfig) -> int:
    """This node's own moment within the minute, the same after every restart."""
    share = random.Random(config.node.name).random()  # noqa: S311 (spreads load)
    return int(config.collector.jitter_seconds * NS_PER_SECOND * share)


def lock_state(directory: Path) -> int:
    """Hold the state directory for this process alone; the kernel lets go when it dies."""
    try:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(directory, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            raise unusable(directory, error) from error
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


def gpu_source(
    config: AgentConfig,
    clock: clocks.Clock,
    driver: SimulatedDriver | None,
    known: tuple[Device, ...] = (),
    launch: Callable[[], WorkerProcess] = PipeWorker,
) -> SupervisedSource:
    """The node's GPUs through workers; with a scenario, workers on the same one and its time."""
    simulated: SimulatedNode | None = None
    if driver is not None:
        assert config.gpus.scenario is not None, "a simulated driver has a scenario"
        simulated = SimulatedNode(
            scenario=config.gpus.scenario,
            start_boottime_ns=driver.start_boottime_ns,
            clock=config.clock,
            tie_ns=clock.tie_ns if isinstance(clock, clocks.ScaledClock) else 0,
        )
    return SupervisedSource(
        clock,
        launch,
        time.monotonic,
        known=known,
        deadline_seconds=config.sampling.deadline_seconds,
        simulated=simulated,
    )


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


def run(config: AgentConfig, announce: Callable[[str], None], stop: threading.Event) -> int:
    """Build and run the daemon until `stop` is set; the exit status."""
    daemon = Daemon(config, stop)
    announce(f"{PROGRAM}: state in {config.state.directory}, shipping to {config.collector.url}")
    return daemon.run()


def pids_on_devices(view: View) -> Iterator[int]:
    """Every process that the last tick saw on a device."""
    for sample in () if view.sample is None else view.sample.samples:
        yield from sample.processes or ()


def _say_lock_trouble(text: str) -> None:
    log.warning("%s", text, extra={"action": "node_lock"})


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Log an error of one step of stopping, so that the next step still happens."""
    try:
        yield
    except Exception:  # whatever it is
        log.exception("could not %s", what, extra={"action": "unexpected_error"})
