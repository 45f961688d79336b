"""The schedulers of a node together: their sources, fed with what the driver tells of devices.

Everything here is asked from the loop's thread and answers from memory; the sources read on threads
of their own. Only at the first reading of a device the loop waits a moment for what they say of it,
so that jobs that ran before the agent started hold their devices from the first reading on; when
they do not answer in time, it never waits again.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.building import make_attributor
from flopledger_agent.attribution.containers import ContainerMemberships, ContainerTable, holders
from flopledger_agent.attribution.directory import DirectoryKeeper
from flopledger_agent.attribution.kubernetes import KubernetesSource, open_kubernetes
from flopledger_agent.attribution.slurm import SlurmPaths, SlurmReader, SlurmSource
from flopledger_agent.attribution.slurm_jobs import JobFolder
from flopledger_agent.attribution.slurm_memberships import SlurmMemberships
from flopledger_agent.attribution.slurm_signs import GhostWatch, NodeSigns
from flopledger_agent.errors import ConfigError
from flopledger_core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flopledger_agent.attribution.allocations import Allocation, AllocationSource
    from flopledger_agent.attribution.interface import Process, ProcessTable
    from flopledger_agent.attribution.kubernetes_section import KubernetesSection
    from flopledger_agent.attribution.mapping import AttributionSection
    from flopledger_agent.attribution.precedence import Membership
    from flopledger_agent.attribution.scheduled import SchedulerAttributor
    from flopledger_agent.attribution.slurm_section import SlurmSection
    from flopledger_agent.attribution.tags import TagRegistry
    from flopledger_agent.clocks import Clock
    from flopledger_agent.gpus.interface import NodeSample

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")
ROOT_UID: Final = 0
FIRST_ANSWER_SECONDS: Final = 2.0  # of real time; a local kubelet answers in milliseconds
LOOK_SECONDS: Final = 0.01


class SchedulerFindings(msgspec.Struct, frozen=True, kw_only=True):
    """What people should know of the schedulers, one sentence each."""

    troubles: tuple[str, ...] = ()  # what keeps them from being heard, with remedies
    ghosts: tuple[str, ...] = ()  # allocations left behind, which hold nothing


class Schedulers:
    """The configured sources and what belongs to them."""

    def __init__(  # noqa: PLR0913 (named at the call)
        self,
        slurm: SlurmSection | None,
        kubernetes: KubernetesSection | None,
        clock: Clock,
        changed: Callable[[], None],
        *,
        environ: Mapping[str, str],
        monotonic_seconds: Callable[[], float],
    ) -> None:
        """`changed` is called from any thread when allocations differ. Errors: ConfigError."""
        self._monotonic_seconds = monotonic_seconds
        self._directory = DirectoryKeeper()
        self._seen: set[str] = set()  # devices of which there was a reading
        self._is_patient = True
        self._containers = ContainerTable(PROC)
        self._kubernetes: KubernetesSource | None = None
        if kubernetes is not None:
            try:
                self._kubernetes = open_kubernetes(
                    kubernetes, environ, clock, lambda: self._directory.now, changed
                )
            except InvalidInput as error:
                raise ConfigError(str(error)) from error
        self._slurm = None if slurm is None else _slurm_source(slurm, clock, changed)

    @property
    def sources(self) -> tuple[AllocationSource, ...]:
        """Whoever knows of allocations here."""
        return tuple(source for source in (self._slurm, self._kubernetes) if source is not None)

    def attributor(
        self, section: AttributionSection, processes: ProcessTable, registry: TagRegistry
    ) -> SchedulerAttributor:
        """An attributor over the sources; for the loop's thread, and closing it closes them."""
        kubernetes = self._kubernetes
        memberships: list[Callable[[Process], Membership | None]] = [
            ContainerMemberships(
                self._containers, None if kubernetes is None else kubernetes.job_of_pod
            ).membership
        ]
        if self._slurm is not None:
            memberships.insert(0, SlurmMemberships(PROC).membership)
        return make_attributor(
            section,
            processes,
            registry,
            sources=self.sources,
            memberships=memberships,
            witness=self._witness,
        )

    def start(self) -> None:
        """Begin to look."""
        if self._slurm is not None:
            self._slurm.start()

    def observe(self, node: NodeSample) -> None:
        """Take note of the devices of a reading and of the processes on them."""
        self._directory.observe(node)
        if self._slurm is not None:
            processes = {item.device.key: item.processes or () for item in node.samples}
            self._slurm.observe(self._directory.now, processes)
        keys = {item.device.key for item in node.samples}
        if self._is_patient and not keys <= self._seen:
            self._is_patient = self._settle()
        self._seen |= keys

    def findings(self) -> SchedulerFindings:
        """What people should know now."""
        views = [source.allocations() for source in self.sources]
        return SchedulerFindings(
            troubles=(
                *(line for view in views for line in view.troubles),
                *self._containers.troubles(),
            ),
            ghosts=tuple(line for view in views for line in view.ghosts),
        )

    def close(self) -> None:
        """Let go of the sources, whoever else did."""
        for source in self.sources:
            source.close()

    def _witness(self, on_devices: Mapping[str, Sequence[Process]]) -> tuple[Allocation, ...]:
        return holders(on_devices, self._containers)

    def _settle(self) -> bool:
        """Wait until every source knows of the devices; False when a moment was not enough."""
        if self._slurm is not None:
            self._slurm.look_now()
        pause, deadline = threading.Event(), self._monotonic_seconds() + FIRST_ANSWER_SECONDS
        while not self._has_answered() and self._monotonic_seconds() < deadline:
            pause.wait(LOOK_SECONDS)
        return self._has_answered()

    def _has_answered(self) -> bool:
        slurm, kubernetes = self._slurm, self._kubernetes
        return (slurm is None or slurm.has_looked_at(self._directory.now)) and (
            kubernetes is None or kubernetes.has_answered()
        )


def _slurm_source(section: SlurmSection, clock: Clock, changed: Callable[[], None]) -> SlurmSource:
    # The prolog runs as root; whoever is this agent's own user could tell it anything anyway.
    trusted = frozenset({ROOT_UID, os.geteuid()})
    paths = SlurmPaths(
        proc=PROC,
        gres_conf=None if section.gres_conf is None else Path(section.gres_conf),
        job_mapping=None if section.job_mapping is None else Path(section.job_mapping),
    )
    reader = SlurmReader(
        clock,
        JobFolder(Path(section.folder), trusted),
        NodeSigns(PROC, CGROUPS, trusted),
        paths,
        GhostWatch(),
    )
    return SlurmSource(reader, interval_seconds=section.interval_seconds, changed=changed)
