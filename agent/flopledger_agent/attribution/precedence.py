"""Who holds a device and what its work is: allocations, processes, rules and a default. Pure.

One order, from what cannot be argued with to what is guessed. The scheduler decides WHO holds a
device and since when, also while the job runs nothing on it. WHAT the work is says the job itself
to the scheduler, then a registered tag, then the environment, then a mapping rule, then the
default; else it is `unattributed`, with the job's id so that a late tag can claim it. A tag that
contradicts the scheduler's job loses, and a process outside every job is never charged to one;
both are flagged and the evidence names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from flopledger_agent.attribution.allocations import Allocation, SchedulerName
from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.mapping import RuleBook
from flopledger_agent.attribution.owners import IDLE_CLAIM, unattributed_claim
from flopledger_agent.attribution.splitting import Part, split
from flopledger_agent.attribution.statements import (
    NOTHING,
    Said,
    given_by,
    said_by,
    stated_by,
    usable_id,
)
from flopledger_agent.attribution.tag_values import evidence
from flopledger_core.activities import UNCLASSIFIED
from flopledger_core.identity import UNATTRIBUTED_OWNER, Owner

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

JobKey: TypeAlias = tuple[SchedulerName, str]

# A job of Slurm may run in a pod, a pod in a container: the innermost that holds the device has it.
RANKS: Final[dict[SchedulerName, int]] = {
    "slurm": 0,
    "kubernetes": 1,
    "docker": 2,
    "podman": 2,
    "containerd": 2,
}
# These grant a device to a job and take it back. A container of the others holds what its processes
# use, and is told by them: nothing runs outside such an allocation.
GRANTING: Final[frozenset[SchedulerName]] = frozenset({"slurm", "kubernetes"})
# Where Slurm calls a job otherwise in control groups and in SLURM_JOB_ID than people do (123_4).
JOB_ID_NAMES: Final = ("job_id", "sluid")
ROOT: Final = "root"  # what an administrator tags in a job is no contradiction of its user
SOURCE_LENGTH_MAX: Final = 100  # of a scheduler's own evidence, so that what follows is not cut off


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """Where the kernel says that a process belongs."""

    jobs: frozenset[JobKey] = frozenset()  # whose control group it is in; they may be nested
    is_service: bool = False  # it works for whoever holds the device, as the server of MPS does


class Occupant(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a device, and what it says of itself."""

    pid: int
    user: str | None
    claim: Claim  # by its registered tag or its environment, else nobody's
    membership: Membership | None = None  # None: could not be told
    session_job: str | None = None  # the scheduler's id in its environment, which its user chose


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A job that holds a device, with its processes there."""

    allocation: Allocation
    occupants: tuple[Occupant, ...] = ()

    @property
    def key(self) -> JobKey:
        """Which job."""
        return (self.allocation.scheduler, self.allocation.job)

    @property
    def is_granted(self) -> bool:
        """Whether the device is the job's whether or not it runs anything there."""
        return self.allocation.scheduler in GRANTING

    @property
    def user(self) -> str | None:
        """Whose job it is, where a scheduler says so; a container may hold several users'."""
        return self.allocation.user if self.is_granted else None

    @property
    def words(self) -> str:
        """Which job, for people."""
        of = f" of {self.user}" if self.user else ""
        what = "job" if self.is_granted else "container"
        return f"{self.allocation.scheduler} {what} {self.allocation.job}{of}"

    @property
    def ids(self) -> frozenset[JobKey]:
        """Every form of the job's id."""
        told = (self.allocation.names.get(name) for name in JOB_ID_NAMES)
        names = {self.allocation.job, *(name for name in told if name)}
        return frozenset((self.allocation.scheduler, name) for name in names)


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The processes of a device by whose they are, according to the scheduler."""

    holders: tuple[Holder, ...]
    outsiders: tuple[Occupant, ...] = ()  # in none of the jobs that hold the device


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What the site says of work that nobody tagged."""

    rules: RuleBook = RuleBook()
    default_project: str | None = None


def placed(allocations: Iterable[Allocation], occupants: Sequence[Occupant]) -> Placed:
    """Which processes belong to which job that holds the device.

    The kernel's control groups decide; a job's id in the environment counts for processes of the
    job's own user. Where neither can be told, a process belongs to the only job that can be its.
    """
    holders = _holders(allocations)
    found: dict[JobKey, list[Occupant]] = {holder.key: [] for holder in holders}
    outsiders: list[Occupant] = []
    for occupant in occupants:
        key, is_outside = _place(occupant, holders)
        if key is not None:
            found[key].append(occupant)
        elif is_outside:
            outsiders.append(occupant)
    return Placed(
        holders=tuple(
            msgspec.structs.replace(holder, occupants=tuple(found[holder.key]))
            for holder in holders
        ),
        outsiders=tuple(outsiders),
    )


def statement(holder: Holder, occupant: Occupant) -> Claim | None:
    """What a process of a job says its work is, unless that contradicts the job; None: nothing."""
    own = occupant.claim
    is_sound = own.owner.kind == "attributed" and _contradiction(holder, occupant) is None
    return own if is_sound else None


def held_claims(
    where: Placed,
    site: Site,
    *,
    remembered: Mapping[JobKey, Claim] | None = None,
    utilization: Mapping[int, int] | None = None,
) -> tuple[Claim, ...]:
    """The owners of a device that is held by jobs; every holder is one, busy or not.

    `remembered` is what a job's processes said of themselves before, on any device.
    """
    parts: list[Part] = []
    is_granted = any(holder.is_granted for holder in where.holders)
    for holder in where.holders:
        known = (remembered or {}).get(holder.key)
        for occupant in holder.occupants or (None,):
            claim = _composed(holder, occupant, known, site)
            if where.outsiders and is_granted:
                claim = _noted(claim, _outside(where.outsiders), ("outside_allocation",))
            parts.append(_part(claim, repr(holder.key), occupant, utilization))
    for occupant in where.outsiders:
        if not is_granted:
            claim = _composed(None, occupant, None, site)
        elif utilization is None or utilization.get(occupant.pid):
            claim = _outsider(occupant, where.holders)
        else:
            continue  # there without using anything: the holders' flag tells of it
        parts.append(_part(claim, f"outside {claim.owner} {claim.user}", occupant, utilization))
    return split(parts, by_group=is_granted)


def free_claims(
    occupants: Sequence[Occupant] | None,
    site: Site,
    *,
    utilization: Mapping[int, int] | None = None,
) -> tuple[Claim, ...]:
    """The owners of a device that no scheduler speaks of: its processes tell."""
    if occupants is None:
        return (unattributed_claim("the processes on the device could not be listed", None),)
    workers = [item for item in occupants if not (item.membership and item.membership.is_service)]
    workers = workers or list(occupants)
    if not workers:
        return (IDLE_CLAIM,)
    parts = [
        _part(_composed(None, occupant, None, site), "", occupant, utilization)
        for occupant in workers
    ]
    return split(parts, by_group=False)


# --- whose process -------------------------------------------------------------------------------


def _holders(allocations: Iterable[Allocation]) -> tuple[Holder, ...]:
    """Each job once, however often and by however many schedulers it is told."""
    told = sorted(allocations, key=lambda item: (RANKS[item.scheduler], item.scheduler, item.job))
    if not told:
        return ()
    rank = RANKS[told[0].scheduler]
    jobs: dict[JobKey, Allocation] = {}
    for item in told:
        if RANKS[item.scheduler] == rank:
            jobs.setdefault((item.scheduler, item.job), item)
    return tuple(Holder(allocation=item) for item in jobs.values())


def _place(occupant: Occupant, holders: Sequence[Holder]) -> tuple[JobKey | None, bool]:
    """The job a process belongs to, or none; and whether it is known to be outside all of them."""
    member = occupant.membership
    if member is not None:
        if member.is_service:
            return None, False
        for holder in holders:
            if not holder.ids.isdisjoint(member.jobs):
                return holder.key, False
        schedulers = {scheduler for scheduler, _job in member.jobs}
        if any(holder.allocation.scheduler in schedulers for holder in holders):
            return None, True  # in another job of the same scheduler, whatever it says of itself
    possible = [
        holder
        for holder in holders
        if holder.user is None or occupant.user in {None, holder.user, ROOT}
    ]
    named = [
        holder
        for holder in possible
        if (holder.allocation.scheduler, occupant.session_job) in holder.ids
        and (member is None or (occupant.user is not None and occupant.user == holder.user))
    ]
    if len(named) == 1:
        return named[0].key, False
    if member is not None or not possible:
        return None, True
    return (possible[0].key if len(possible) == 1 else None), False


# --- what work -----------------------------------------------------------------------------------


def _composed(
    holder: Holder | None, occupant: Occupant | None, known: Claim | None, site: Site
) -> Claim:
    """The claim of a job, or of a process without one, for one thing that was said of it."""
    stated = NOTHING if holder is None else stated_by(holder.allocation)
    conflict = None if holder is None or occupant is None else _contradiction(holder, occupant)
    told = known if occupant is None else occupant.claim
    own = NOTHING if told is None or conflict is not None else said_by(told)
    if stated.project is not None and own.project not in {None, stated.project}:
        own = NOTHING  # remembered from before the job said otherwise
    user = occupant.user if occupant is not None else None
    if holder is not None and holder.user is not None:
        user = holder.user
    hit = site.rules.first({} if holder is None else holder.allocation.names, user)
    rule = NOTHING if hit is None else given_by(hit.rule)
    is_guessed = not stated.is_refused and not own.is_refused
    sources: tuple[tuple[str, str | None, str | None], ...] = (
        ("scheduler", stated.project, "the job named it to the scheduler"),
        (
            "none" if told is None else told.source,
            own.project,
            None if told is None else told.evidence,
        ),
        ("rule", rule.project if is_guessed else None, None if hit is None else hit.told),
        ("default", site.default_project if is_guessed else None, "attribution.default_project"),
    )
    source, project, why = next(
        (item for item in sources if item[1] is not None),
        ("scheduler" if holder is not None and holder.is_granted else "none", None, None),
    )
    if why is None:
        why = stated.trouble or (None if told is None else told.evidence)
    said = [item for item in (own, stated, rule) if item.project in {None, project}]
    owner = _owner(project, said, holder, told)
    precision = next((item for item in said if item.precision is not None), NOTHING)
    flags = {*stated.flags, *own.flags, *(() if conflict is None else ("tag_conflict",))}
    if holder is not None and owner.job is None:
        flags.add("invalid_tag")
    return Claim(
        owner=owner,
        weight=1,
        source=source,
        evidence=_reason(holder, project, conflict, why),
        precision=precision.precision if project is not None else None,
        precision_origin=precision.precision_origin if project is not None else "unknown",
        user=user,
        flags=tuple(sorted(flags)),
        allocated=holder is not None and holder.is_granted,
        since_unix_ms=None if holder is None else holder.allocation.since_unix_ms,
    )


def _owner(
    project: str | None, said: Sequence[Said], holder: Holder | None, told: Claim | None
) -> Owner:
    """The account, each part from the first that says it; the job id is the scheduler's."""
    job = None if told is None else told.owner.job
    attempt = None
    if holder is not None:
        job = usable_id(holder.allocation.job)
        attempt = usable_id(holder.allocation.attempt)
    if project is None:
        return msgspec.structs.replace(UNATTRIBUTED_OWNER, job=job, attempt=attempt)

    def first(name: str) -> str | None:
        return next((value for item in said if (value := getattr(item, name)) is not None), None)

    return Owner(
        kind="attributed",
        entity=first("entity"),
        project=project,
        model=first("model"),
        run=first("run"),
        attempt=attempt or first("attempt"),
        job=job,
        activity=first("activity") or UNCLASSIFIED,
    )


def _contradiction(holder: Holder, occupant: Occupant) -> str | None:
    """How a process's tag contradicts its job, in words; None when it does not."""
    project = occupant.claim.owner.project
    if project is None:
        return None
    user, of = holder.user, f" of {occupant.user}" if occupant.user else ""
    says = f"process {occupant.pid}{of} says project {project}"
    if user is not None and occupant.user not in {None, user, ROOT}:
        return f"{says}, and is not {user}'s"
    stated = stated_by(holder.allocation).project
    if stated not in {None, project}:
        return f"{says}, {holder.allocation.scheduler} job {holder.allocation.job} says {stated}"
    return None


def _reason(
    holder: Holder | None, project: str | None, conflict: str | None, why: str | None
) -> str:
    parts = [] if conflict is None else [conflict]
    if holder is not None:
        told = evidence(holder.allocation.evidence)[:SOURCE_LENGTH_MAX]
        verb = "holds the device" if holder.is_granted else "is there"
        parts.append(f"{holder.words} {verb} ({told})")
        parts.append("nobody named a project" if project is None else f"project {project}")
    if why:
        parts.append(why)
    return evidence("; ".join(parts))


def _outsider(occupant: Occupant, holders: Sequence[Holder]) -> Claim:
    """A process in none of the jobs that hold the device: nobody's work, whatever it says."""
    schedulers = {holder.allocation.scheduler for holder in holders}
    member = occupant.membership
    jobs = (
        sorted(job for scheduler, job in member.jobs if scheduler in schedulers) if member else []
    )
    project = occupant.claim.owner.project
    says = "" if project is None else f"; it says project {project}"
    claim = unattributed_claim(
        f"{_outside((occupant,))}; {holders[0].words} holds it{says}", occupant.user
    )
    return msgspec.structs.replace(
        claim,
        owner=msgspec.structs.replace(
            UNATTRIBUTED_OWNER, job=usable_id(jobs[0]) if len(jobs) == 1 else None
        ),
        flags=("outside_allocation",)
        if project is None
        else ("outside_allocation", "tag_conflict"),
    )


def _outside(outsiders: Sequence[Occupant]) -> str:
    first = outsiders[0]
    more = f" and {len(outsiders) - 1} more" if len(outsiders) > 1 else ""
    of = f" of {first.user}" if first.user else ""
    return f"process {first.pid}{of}{more} used the device outside its allocation"


def _noted(claim: Claim, note: str, flags: tuple[str, ...]) -> Claim:
    return msgspec.structs.replace(
        claim,
        evidence=evidence(f"{note}; {claim.evidence}"),
        flags=tuple(sorted({*claim.flags, *flags})),
    )


def _part(
    claim: Claim, group: str, occupant: Occupant | None, utilization: Mapping[int, int] | None
) -> Part:
    used: int | None = None
    if utilization is not None:
        used = 0 if occupant is None else max(0, utilization.get(occupant.pid, 0))
    return Part(claim=claim, group=group, used_percent=used)
