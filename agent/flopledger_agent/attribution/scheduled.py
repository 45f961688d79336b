"""Attribution where schedulers give devices to jobs: their word first, then what processes say.

It joins the views of allocation sources with the processes on a device and asks `precedence.py`.
What a job's processes said of themselves is remembered while the job holds a device, so that a GPU
it holds and leaves idle is charged to the same project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from flopledger_agent.attribution.precedence import (
    RANKS,
    Holder,
    Membership,
    Occupant,
    Placed,
    Site,
    free_claims,
    held_claims,
    placed,
    statement,
)
from flopledger_agent.attribution.tag_values import scheduler_job
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flopledger_agent.attribution.allocations import Allocation, AllocationSource
    from flopledger_agent.attribution.interface import (
        Attributor,
        Claim,
        DeviceReading,
        Process,
        ProcessTable,
    )
    from flopledger_agent.attribution.precedence import JobKey

# A source may know of a job before the reading that its owners are asked for is looked at. A start
# further ahead is another clock's, and is believed.
AHEAD_MS_MAX: Final = 5_000
PROJECTS_PER_JOB_MAX: Final = 8  # remembered; with more than one nothing follows from any


class Memberships(Protocol):
    """Knows which jobs processes are in, from what the kernel says."""

    def membership(self, process: Process) -> Membership | None:
        """The jobs of a process; None where it cannot be told."""
        ...


class Witness(Protocol):
    """Names who holds a device from the processes on it, where no scheduler gave it away."""

    def __call__(self, on_devices: Mapping[str, Sequence[Process]], /) -> tuple[Allocation, ...]:
        """The holders, from processes by device key."""
        ...


class _Remembered:
    """What the processes of one job said, by project."""

    def __init__(self, attempt: str | None) -> None:
        self.attempt = attempt
        self.claims: dict[str, Claim] = {}

    def learn(self, claim: Claim) -> None:
        project = claim.owner.project
        if project is not None and (
            project in self.claims or len(self.claims) < PROJECTS_PER_JOB_MAX
        ):
            self.claims[project] = claim

    def agreed(self) -> Claim | None:
        """What the job's processes said, when they named one project."""
        return next(iter(self.claims.values())) if len(self.claims) == 1 else None


class SchedulerAttributor:
    """Implements `Attributor` around another one, which judges single processes; one thread."""

    def __init__(  # noqa: PLR0913 (one argument per port, named at the call)
        self,
        own: Attributor,
        processes: ProcessTable,
        sources: Sequence[AllocationSource],
        *,
        memberships: Memberships | None = None,
        witness: Witness | None = None,
        site: Site | None = None,
    ) -> None:
        self._own = own
        self._processes = processes
        self._sources = tuple(sources)
        self._memberships = memberships
        self._witness = witness
        self._site = Site() if site is None else site
        self._remembered: dict[JobKey, _Remembered] = {}

    def claims(
        self, processes: tuple[int, ...] | None, reading: DeviceReading | None = None
    ) -> tuple[Claim, ...]:
        """The owners of a device on which `processes` run; without a reading, theirs alone."""
        known = [] if processes is None else [self._known(pid) for pid in sorted(set(processes))]
        occupants = [occupant for occupant, _process in known]
        told = [item for source in self._sources for item in source.allocations().allocations]
        if reading is None:
            return self._of_processes(occupants, told) if occupants else free_claims((), self._site)
        here = [item for item in told if item.device == reading.device and _begun(item, reading)]
        if not here and self._witness is not None:
            there = [process for _occupant, process in known if process is not None]
            here = list(self._witness({reading.device: there})) if there else []
        utilization = reading.process_utilization
        if not here:
            listed = None if processes is None else occupants
            return free_claims(listed, self._site, utilization=utilization)
        where = placed(here, occupants)
        self._forget({(item.scheduler, item.job): item.attempt for item in (*told, *here)})
        self._learn(where)
        return held_claims(
            where, self._site, remembered=self._agreed(where), utilization=utilization
        )

    def troubles(self) -> tuple[str, ...]:
        """What keeps sources from answering, and job files left behind: a sentence each."""
        views = [source.allocations() for source in self._sources]
        return tuple(line for view in views for line in (*view.troubles, *view.ghosts))

    def close(self) -> None:
        """Let go of the sources, and forget everything."""
        self._own.close()
        for source in self._sources:
            source.close()
        self._remembered.clear()

    def _known(self, pid: int) -> tuple[Occupant, Process | None]:
        claim = self._own.claims((pid,))[0]
        process = self._processes.identify(pid)
        if process is None:
            return Occupant(pid=pid, user=claim.user, claim=claim), None
        return Occupant(
            pid=pid,
            user=process.user,
            claim=claim,
            membership=None if self._memberships is None else self._memberships.membership(process),
            session_job=scheduler_job(process.environ or {}),
        ), process

    def _of_processes(
        self, occupants: Sequence[Occupant], told: Sequence[Allocation]
    ) -> tuple[Claim, ...]:
        """Whose processes are, on any device: of the job they are known to be in, else their own.

        The node's own meter asks so about CPU time; it asks about one process at a time.
        """
        ranked = sorted(told, key=lambda item: RANKS[item.scheduler])
        claims: list[Claim] = []
        for occupant in occupants:
            jobs = () if occupant.membership is None else occupant.membership.jobs
            holders = (Holder(allocation=item, occupants=(occupant,)) for item in ranked)
            holder = next((item for item in holders if not item.ids.isdisjoint(jobs)), None)
            if holder is None:
                claims.extend(free_claims((occupant,), self._site))
                continue
            where = Placed(holders=(holder,))
            self._learn(where)
            claims.extend(held_claims(where, self._site))
        return tuple(claims)

    def _learn(self, where: Placed) -> None:
        for holder in where.holders:
            for occupant in holder.occupants:
                said = statement(holder, occupant)
                if said is not None:
                    self._remembered.setdefault(
                        holder.key, _Remembered(holder.allocation.attempt)
                    ).learn(said)

    def _agreed(self, where: Placed) -> dict[JobKey, Claim]:
        found = {
            holder.key: self._remembered[holder.key].agreed()
            for holder in where.holders
            if holder.key in self._remembered
        }
        return {key: _as_remembered(claim) for key, claim in found.items() if claim is not None}

    def _forget(self, held: Mapping[JobKey, str | None]) -> None:
        """Drop jobs that hold nothing any more, and what an earlier attempt of a job said."""
        self._remembered = {
            key: item
            for key, item in self._remembered.items()
            if key in held and item.attempt == held[key]
        }


def _as_remembered(claim: Claim) -> Claim:
    return msgspec.structs.replace(claim, evidence=f"as said before: {claim.evidence}")


def _begun(allocation: Allocation, reading: DeviceReading) -> bool:
    """Whether a job held the device at a reading, not just after it."""
    since_ms = allocation.since_unix_ms
    return since_ms is None or not 0 < since_ms - reading.unix_ns // NS_PER_MS <= AHEAD_MS_MAX


class JoinedMemberships:
    """Several sources of membership as one: a job may run in a pod, so what any knows counts."""

    def __init__(self, *asked: Callable[[Process], Membership | None]) -> None:
        self._asked = asked

    def membership(self, process: Process) -> Membership | None:
        """The jobs of a process; None where none of the sources can tell."""
        found = [answer for ask in self._asked if (answer := ask(process)) is not None]
        if not found:
            return None
        return Membership(
            jobs=frozenset(job for answer in found for job in answer.jobs),
            is_service=any(answer.is_service for answer in found),
        )
