"""What `flopledger-agent check` and `spool` say: the node as the agent would see it, with remedies.

It looks and changes nothing: no key is made, no tag is taken, and the state directory of a
running agent is only read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent import control, daemon
from flopledger_agent.attribution.owners import describe_claims
from flopledger_agent.attribution.tags import TagRegistry
from flopledger_agent.delivery import HttpCollector
from flopledger_agent.disk import unusable
from flopledger_agent.errors import CollectorUnreachable, StateError
from flopledger_agent.gpus import ladder
from flopledger_agent.gpus import report as gpu_report
from flopledger_agent.gpus.interface import NodeSample
from flopledger_agent.gpus.observed import ObservedSource
from flopledger_agent.host import report as host_report
from flopledger_agent.host.building import host_meter
from flopledger_agent.host.node import clock_is_synchronised
from flopledger_agent.keys import KEY_FILE
from flopledger_agent.loop import reading_of
from flopledger_agent.metering import PAUSED
from flopledger_agent.spool import DIRECTORY, QUARANTINE, sealed_unix_ms
from flopledger_core.accelerators import load_table
from flopledger_core.errors import InvalidInput
from flopledger_core.signing import SigningKey
from flopledger_core.units import MS_PER_SECOND, NS_PER_MS

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import ProcessTable
    from flopledger_agent.attribution.schedulers import Schedulers
    from flopledger_agent.clocks import Clock
    from flopledger_agent.config import AgentConfig
    from flopledger_agent.gpus.simulated import SimulatedDriver
    from flopledger_core.accelerators import AcceleratorTable

SAMPLES_MIN: Final = 2  # the first begins the means
SAMPLES_MAX: Final = 6  # a device may need some to tell the scale of its counters
SOCKET_TIMEOUT_SECONDS: Final = 2.0  # a local agent answers at once or not at all
HEADER_BYTES_MAX: Final = 2 * 1024 * 1024  # the longest first line of a batch
HOST_SECONDS: Final = 15.0  # a management controller may take ten to answer
BETWEEN_SAMPLES_SECONDS: Final = 0.3  # GPM refreshes every 100 ms


class DeviceOwners(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a device now, a line each, and why."""

    uuid: str
    owners: tuple[str, ...]


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `check` tells; every finding names its remedy."""

    node: str
    gpus: gpu_report.NodeReport
    host: host_report.HostReport | None  # None: not metered
    owners: tuple[DeviceOwners, ...]
    schedulers: tuple[str, ...]  # what keeps them from being heard, with remedies
    clock_synchronised: bool | None
    collector: str
    tag_socket: str
    metering: str  # going on, or paused by whom and until when
    state_directory: str
    public_key: str | None  # None: no key yet, it is made at the first start
    permissions: tuple[str, ...]
    can_meter: bool


class WaitingStream(msgspec.Struct, frozen=True, kw_only=True):
    """The batches of one stream that wait."""

    stream_id: str
    batches: int
    first_sequence: int
    last_sequence: int


class SpoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in a state directory."""

    directory: str
    batches: int
    size_bytes: int
    max_bytes: int
    oldest_age_seconds: int | None  # None: nothing waits, or its header cannot be read
    streams: tuple[WaitingStream, ...]
    quarantined: tuple[str, ...]


def inspect(config: AgentConfig) -> Inspection:
    """Look at the node through the same readers the daemon uses."""
    clock = daemon.make_clock(config)
    driver = daemon.install_simulated_driver(config, clock)
    try:
        return _inspected(config, clock, driver)
    finally:
        if driver is not None:
            driver.uninstall()


def _inspected(config: AgentConfig, clock: Clock, driver: SimulatedDriver | None) -> Inspection:
    table = load_table()
    state = _state(Path(config.tags.socket))
    processes = daemon.process_table(driver)
    schedulers = daemon.make_schedulers(config, clock, _nobody_waits)
    schedulers.start()
    if state is not None and state.paused:  # somebody needs the driver for himself
        sample = _untouched(clock)
    else:
        sample = _gpus(config, clock, driver, table, schedulers)
    attributor = schedulers.attributor(config.attribution, processes, TagRegistry(processes))
    owners = tuple(
        DeviceOwners(
            uuid=item.device.key,
            owners=describe_claims(attributor.claims(item.processes, reading_of(item, sample))),
        )
        for item in sample.samples
    )
    host = _host(config, clock, processes, schedulers)
    findings = schedulers.findings()
    schedulers.close()
    return Inspection(
        node=config.node.name,
        gpus=gpu_report.describe(sample, table),
        host=host,
        owners=owners,
        schedulers=(*findings.troubles, *findings.ghosts),
        clock_synchronised=clock_is_synchronised(),
        collector=_collector(config),
        tag_socket=_tag_socket(Path(config.tags.socket)),
        metering="no agent meters here now" if state is None else control.sentence(state),
        state_directory=config.state.directory,
        public_key=_public_key(config),
        permissions=_permissions(config, sample),
        can_meter=bool(sample.samples)
        or sample.failure == PAUSED
        or (host is not None and host.cpu_count is not None),
    )


def _nobody_waits() -> None:
    """Whom a changed allocation tells: nobody here."""


def _untouched(clock: Clock) -> NodeSample:
    """What `check` says of the GPUs while metering is paused: nothing, and why."""
    return NodeSample(
        boot_ns=clock.boottime_ns(), unix_ns=clock.wall_unix_ns(), samples=(), failures=(),
        driver=None, failure=PAUSED,
    )  # fmt: skip


def _gpus(
    config: AgentConfig,
    clock: Clock,
    driver: SimulatedDriver | None,
    table: AcceleratorTable,
    schedulers: Schedulers,
) -> NodeSample:
    """Enough samples of the GPUs for the last one to tell everything."""
    source = ObservedSource(
        ladder.over(
            daemon.gpu_source(config, clock, driver),
            config.gpus.dcgm,
            clock,
            table,
            config.node.name,
        ),
        schedulers.observe,
    )
    pause = threading.Event()
    sample = source.sample()
    for number in range(2, SAMPLES_MAX + 1):
        warming = any(failure.reason == "warming_up" for failure in sample.failures) or any(
            item.absent.get("dcgm") == "dcgm_not_asked_yet" for item in sample.samples
        )
        if number > SAMPLES_MIN and not warming:
            break
        pause.wait(BETWEEN_SAMPLES_SECONDS)
        sample = source.sample()
    source.close()
    return sample


def _host(
    config: AgentConfig, clock: Clock, processes: ProcessTable, schedulers: Schedulers
) -> host_report.HostReport | None:
    """The node itself; a management controller is waited for, within its own deadline."""
    if config.simulated or not config.host.enabled:
        return None
    registry = TagRegistry(processes)
    meter = host_meter(
        config.host,
        clock=clock,
        attributor=schedulers.attributor(config.attribution, processes, registry),
        registry=registry,
        monotonic_seconds=time.monotonic,
    )
    pause, deadline = threading.Event(), time.monotonic() + HOST_SECONDS
    sample = meter.sample()
    while "first_reading" in sample.absent.values() and time.monotonic() < deadline:
        pause.wait(BETWEEN_SAMPLES_SECONDS)
        sample = meter.sample()
    meter.close()
    return host_report.describe(sample)


def as_lines(report: Inspection) -> list[str]:
    """The inspection for people."""
    told = [f"node {report.node}"]
    failure = report.gpus.failure
    if failure is not None and failure.reason == PAUSED:
        told.append("GPUs: not looked at, because metering is paused and the driver was left alone")
    else:
        told += gpu_report.lines(report.gpus)
    told += host_report.lines(report.host)
    for device in report.owners:
        told.append(f"owners of {device.uuid}")
        told += [f"  {line}" for line in device.owners]
    told += [f"scheduler: {line}" for line in report.schedulers]
    synchronised = {
        True: "synchronised",
        False: "not synchronised: run chrony, ntpd or systemd-timesyncd",
        None: "cannot be told on this kernel",
    }[report.clock_synchronised]
    told.append(f"node clock: {synchronised}")
    told.append(f"collector: {report.collector}")
    told.append(f"tag socket: {report.tag_socket}")
    told.append(report.metering)
    told.append(f"state directory: {report.state_directory}")
    told.append(f"public key: {report.public_key or 'none yet, it is made at the first start'}")
    told += [f"permission: {line}" for line in report.permissions]
    told.append("this node can be metered" if report.can_meter else "nothing can be metered here")
    return told


def inspect_spool(config: AgentConfig) -> SpoolReport:
    """Count what waits, beside a running agent: listings, sizes and one header a stream.

    Raises StateError when the state directory is absent or cannot be read.
    """
    root = Path(config.state.directory)
    try:
        list(root.iterdir())  # absent and unreadable are no empty spools
        files = [path for path in _files(root / DIRECTORY) if path.suffix == ".batch"]
        quarantined = _files(root / QUARANTINE)
    except OSError as error:
        raise unusable(root, error) from error
    size_bytes = 0
    found: dict[str, list[Path]] = {}
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # delivered meanwhile
            size_bytes += path.stat().st_size
            found.setdefault(path.name.partition("-")[0], []).append(path)
    now_unix_ms = daemon.make_clock(config).wall_unix_ns() // NS_PER_MS
    sealed = [ms for paths in found.values() if (ms := _sealed_unix_ms(paths[0]))]
    return SpoolReport(
        directory=str(root),
        batches=sum(map(len, found.values())),
        size_bytes=size_bytes,
        max_bytes=config.spool.max_bytes,
        oldest_age_seconds=max(0, now_unix_ms - min(sealed)) // MS_PER_SECOND if sealed else None,
        streams=tuple(_waiting(stream_id, paths) for stream_id, paths in found.items()),
        quarantined=tuple(path.name for path in quarantined),
    )


def spool_lines(report: SpoolReport) -> list[str]:
    """The spool for people."""
    told = [
        f"state directory {report.directory}",
        f"{report.batches} batches wait, {report.size_bytes} of {report.max_bytes} bytes",
    ]
    if report.oldest_age_seconds is not None:
        told.append(f"the oldest was sealed {report.oldest_age_seconds} seconds ago")
    told += [
        f"stream {stream.stream_id}: {stream.batches} batches, sequence {stream.first_sequence} "
        f"to {stream.last_sequence}"
        for stream in report.streams
    ]
    if report.quarantined:
        told.append("quarantined files, which are not what was sealed; look at them, then remove:")
        told += [f"  {name}" for name in report.quarantined]
    return told


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix != ".tmp")
    except FileNotFoundError:
        return []  # the agent makes it at its first start


def _waiting(stream_id: str, paths: list[Path]) -> WaitingStream:
    sequences = [
        int(text) for path in paths if (text := path.stem.partition("-")[2]).isdecimal()
    ] or [0]
    return WaitingStream(
        stream_id=stream_id,
        batches=len(paths),
        first_sequence=min(sequences),
        last_sequence=max(sequences),
    )


def _sealed_unix_ms(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sealed_unix_ms(file.readline(HEADER_BYTES_MAX))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; make it readable") from error


def _tag_socket(path: Path) -> str:
    """Whether somebody listens where jobs register; nothing is registered by asking."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(SOCKET_TIMEOUT_SECONDS)
            probe.connect(str(path))
    except OSError as error:
        return (
            f"nobody answers at {path} ({error.strerror or error}); jobs tag by their environment "
            "until the agent runs"
        )
    return f"an agent answers at {path}; what is registered there is known to that agent alone"


def _state(path: Path) -> control.ControlAnswer | None:
    """What the agent that runs here says of itself; None where none answers."""
    try:
        return control.tell(path, control.ControlRequest(command="status"))
    except control.NotCarriedOut:
        return None


def _collector(config: AgentConfig) -> str:
    url = config.collector.url
    try:
        ledger_id = HttpCollector(url, config.collector.timeout_seconds, daemon.PROGRAM).ledger_id()
    except CollectorUnreachable as error:
        return f"{error}; batches would wait in the spool"
    return f"{url} answers for ledger {ledger_id}"


def _public_key(config: AgentConfig) -> str | None:
    """The key's public half, for the collector's list of trusted keys."""
    path = Path(config.state.directory) / KEY_FILE
    try:
        return SigningKey.from_pem(path.read_bytes()).public_key
    except FileNotFoundError:
        return None
    except (OSError, InvalidInput) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return f"not readable ({reason}): run as the owner of {path}"


def _permissions(config: AgentConfig, sample: NodeSample) -> tuple[str, ...]:
    told: list[str] = []
    root = Path(config.state.directory)
    existing = next((path for path in (root, *root.parents) if os.path.lexists(path)), Path("/"))
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        told.append(f"state.directory {root} cannot be written; give it to the agent's user")
    if any(item.processes is None for item in sample.samples):
        told.append("processes on a device cannot be listed; their work would be unattributed")
    if os.geteuid() != 0:
        told.append(
            "environments of other users' processes need CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; "
            "without them jobs tag themselves with `flopledger-agent tag`"
        )
    return tuple(told)
