"""What `flopledger-agent check` and `spool` say: the node as the agent would see it, with remedies.

It looks and changes nothing: no key is made, no tag is taken, and the state directory of a
running agent is only read.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent import daemon
from flopledger_agent.attribution.owners import EnvironmentAttributor, describe_claims
from flopledger_agent.attribution.tags import TagRegistry
from flopledger_agent.delivery import HttpCollector
from flopledger_agent.errors import CollectorUnreachable
from flopledger_agent.gpus import report as gpu_report
from flopledger_agent.gpus.nvml import NvmlSource
from flopledger_agent.host.node import clock_is_synchronised
from flopledger_agent.keys import KEY_FILE
from flopledger_core.accelerators import load_table
from flopledger_core.signing import SigningKey

if TYPE_CHECKING:
    from flopledger_agent.config import AgentConfig
    from flopledger_agent.gpus.interface import NodeSample

SAMPLES_MIN: Final = 2  # the first begins the means
SAMPLES_MAX: Final = 6  # a device may need some to tell the scale of its counters
BETWEEN_SAMPLES_SECONDS: Final = 0.3  # GPM refreshes every 100 ms


class DeviceOwners(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a device now, a line each, and why."""

    uuid: str
    owners: tuple[str, ...]


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `check` tells; every finding names its remedy."""

    node: str
    gpus: gpu_report.NodeReport
    owners: tuple[DeviceOwners, ...]
    clock_synchronised: bool | None
    collector: str
    public_key: str | None  # None: no key yet, it is made at the first start
    permissions: tuple[str, ...]
    can_meter: bool


class SpoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in a state directory."""

    directory: str
    batches: int
    size_bytes: int
    max_bytes: int
    streams: tuple[str, ...]
    quarantined: tuple[str, ...]


def inspect(config: AgentConfig) -> Inspection:
    """Look at the node through the same readers the daemon uses."""
    clock = daemon.make_clock(config)
    driver = daemon.install_simulated_driver(config, clock)
    table = load_table()
    source = NvmlSource(clock, table, deadline_seconds=config.sampling.deadline_seconds)
    processes = daemon.process_table(driver)
    attributor = EnvironmentAttributor(processes, TagRegistry(processes))
    pause = threading.Event()
    sample = source.sample()
    for number in range(2, SAMPLES_MAX + 1):
        warming = any(failure.reason == "warming_up" for failure in sample.failures)
        if number > SAMPLES_MIN and not warming:
            break
        pause.wait(BETWEEN_SAMPLES_SECONDS)
        sample = source.sample()
    owners = tuple(
        DeviceOwners(
            uuid=item.device.key, owners=describe_claims(attributor.claims(item.processes))
        )
        for item in sample.samples
    )
    source.close()
    if driver is not None:
        driver.uninstall()
    return Inspection(
        node=config.node.name,
        gpus=gpu_report.describe(sample, table),
        owners=owners,
        clock_synchronised=clock_is_synchronised(),
        collector=_collector(config),
        public_key=_public_key(config),
        permissions=_permissions(config, sample),
        can_meter=bool(sample.samples),
    )


def as_lines(report: Inspection) -> list[str]:
    """The inspection for people."""
    told = [f"node {report.node}", *gpu_report.lines(report.gpus)]
    for device in report.owners:
        told.append(f"owners of {device.uuid}")
        told += [f"  {line}" for line in device.owners]
    synchronised = {
        True: "synchronised",
        False: "not synchronised: run chrony, ntpd or systemd-timesyncd",
        None: "cannot be told on this kernel",
    }[report.clock_synchronised]
    told.append(f"node clock: {synchronised}")
    told.append(f"collector: {report.collector}")
    told.append(f"public key: {report.public_key or 'none yet, it is made at the first start'}")
    told += [f"permission: {line}" for line in report.permissions]
    told.append("this node can be metered" if report.can_meter else "nothing can be metered here")
    return told


def inspect_spool(config: AgentConfig) -> SpoolReport:
    """Count what waits, beside a running agent: directory listings only."""
    root = Path(config.state.directory)
    files = sorted(root.glob("spool/*.batch"))
    sizes = [path.stat().st_size for path in files if path.exists()]
    return SpoolReport(
        directory=str(root),
        batches=len(files),
        size_bytes=sum(sizes),
        max_bytes=config.spool.max_bytes,
        streams=tuple(sorted({path.name.partition("-")[0] for path in files})),
        quarantined=tuple(path.name for path in sorted(root.glob("quarantine/*"))),
    )


def spool_lines(report: SpoolReport) -> list[str]:
    """The spool for people."""
    told = [
        f"state directory {report.directory}",
        f"{report.batches} batches wait, {report.size_bytes} of {report.max_bytes} bytes",
        *(f"stream {stream}" for stream in report.streams),
    ]
    if report.quarantined:
        told.append("quarantined files, which are no batches; look at them, then remove them:")
        told += [f"  {name}" for name in report.quarantined]
    return told


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
    except PermissionError:
        return f"not readable for this user: run as the owner of {path}"


def _permissions(config: AgentConfig, sample: NodeSample) -> tuple[str, ...]:
    told: list[str] = []
    root = Path(config.state.directory)
    existing = next((path for path in (root, *root.parents) if path.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        told.append(f"state.directory {root} cannot be written; give it to the agent's user")
    if any(item.processes is None for item in sample.samples):
        told.append("processes on a device cannot be listed; their work would be unattributed")
    if os.geteuid() != 0:
        told.append(
            "environments of other users' processes need CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; "
            "without them jobs tag themselves with `flopledger-agent tag`"
        )
    return tuple(told)
