"""Made-up allocations, processes of jobs, and an attributor over them, for tests of schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_agent.attribution.allocations import Allocation, AllocationView
from flopledger_agent.attribution.interface import DeviceReading
from flopledger_agent.attribution.owners import EnvironmentAttributor
from flopledger_agent.attribution.precedence import Membership
from flopledger_agent.attribution.scheduled import SchedulerAttributor
from flopledger_agent.attribution.tags import TagRegistry
from tests.agent.attribution.people import FakeProcessTable
from tests.agent.sampling import BOOT_NS, GPU, UNIX_NS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_agent.attribution.allocations import SchedulerName
    from flopledger_agent.attribution.interface import Process
    from flopledger_agent.attribution.precedence import JobKey, Site


def allocation(
    job: str = "12",
    *,
    scheduler: SchedulerName = "slurm",
    device: str = GPU.key,
    user: str | None = "alice",
    tags: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    attempt: str | None = None,
    since_unix_ms: int | None = None,
    shared: bool = False,
) -> Allocation:
    """One job on one device."""
    return Allocation(
        scheduler=scheduler, device=device, job=job, user=user, tags=dict(tags or {}),
        names=dict(names or {}), attempt=attempt, since_unix_ms=since_unix_ms, shared=shared,
        evidence="job file 12.job",
    )  # fmt: skip


class FakeSource:
    """Answers with the allocations it is set to."""

    def __init__(self, *allocations: Allocation) -> None:
        self.now = allocations
        self.closed = False

    def allocations(self) -> AllocationView:
        """What the test set."""
        return AllocationView(allocations=self.now, troubles=("a trouble",), ghosts=("a ghost",))

    def close(self) -> None:
        """Remembered, so that a test can see it."""
        self.closed = True


class FakeMemberships:
    """The jobs of processes as the test set them; of others nothing is known."""

    def __init__(self) -> None:
        self.by_pid: dict[int, Membership] = {}

    def put(self, pid: int, *jobs: JobKey, is_service: bool = False) -> None:
        """A process is in these jobs, and in no others."""
        self.by_pid[pid] = Membership(jobs=frozenset(jobs), is_service=is_service)

    def membership(self, process: Process) -> Membership | None:
        """What the test set."""
        return self.by_pid.get(process.pid)


class Cluster:
    """An attributor over made-up processes, jobs and tags."""

    def __init__(self, *processes: Process, site: Site | None = None) -> None:
        self.table = FakeProcessTable(*processes)
        self.registry = TagRegistry(self.table)
        self.source = FakeSource()
        self.memberships = FakeMemberships()
        self.attributor = SchedulerAttributor(
            EnvironmentAttributor(self.table, self.registry),
            self.table,
            [self.source],
            memberships=self.memberships,
            site=site,
        )


def reading(
    at_ns: int = 0, device: str = GPU.key, utilization: dict[int, int] | None = None
) -> DeviceReading:
    """A reading of a device at a time of the tests."""
    return DeviceReading(
        device=device, boot_ns=BOOT_NS + at_ns, unix_ns=UNIX_NS + at_ns,
        process_utilization=utilization,
    )  # fmt: skip
