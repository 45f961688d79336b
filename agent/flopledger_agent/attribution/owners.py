"""Who holds a device: from the processes on it to claims with their evidence.

An explicit tag of the process or of an ancestor comes first, its own environment second. Work that
nobody tagged is `unattributed`, a device without processes is `idle`; a scheduler's job id adds to
an owner and never makes one. The same processes and tags always give the same claims in the same
order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.attribution.tag_values import Verdict, evidence, judge, scheduler_job, tags_in
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import IDLE_OWNER, UNATTRIBUTED_OWNER, require_id

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import DeviceReading, Process, ProcessTable
    from flopledger_agent.attribution.tags import TagRegistry

# Of one device in one window. A GPU runs the work of some dozens at once; whatever is beyond this
# is nobody's, so that no one can fill the ledger with names.
OWNERS_MAX: Final = 128
JUDGED_MAX: Final = 4096  # remembered judgements; forgetting them costs time only

IDLE_CLAIM: Final = Claim(
    owner=IDLE_OWNER,
    weight=1,
    source="idle",
    evidence="no process on the device",
    precision=None,
    precision_origin="unknown",
    user=None,
    flags=(),
)


class EnvironmentAttributor:
    """Attributes by registered tags and by the environments of the processes."""

    def __init__(self, processes: ProcessTable, registry: TagRegistry) -> None:
        self._processes = processes
        self._registry = registry
        self._judged: dict[int, tuple[Process, int, Claim]] = {}

    def claims(
        self, processes: tuple[int, ...] | None, reading: DeviceReading | None = None
    ) -> tuple[Claim, ...]:
        """The owners of a device on which `processes` run, whichever device; never empty."""
        del reading
        if processes is None:
            return (unattributed_claim("the processes on the device could not be listed", None),)
        if not processes:
            return (IDLE_CLAIM,)
        merged: dict[tuple[object, ...], list[Claim]] = {}
        for pid in sorted(set(processes)):
            claim = self._claim(pid)
            merged.setdefault(_key(claim), []).append(claim)
        found = tuple(_merge(merged[key]) for key in sorted(merged, key=_order))
        if len(found) <= OWNERS_MAX:
            return found
        rest = found[OWNERS_MAX:]
        nobody = unattributed_claim(
            f"{len(rest)} owners more than {OWNERS_MAX} on one device", None
        )
        weight = sum(claim.weight for claim in rest)
        return (*found[:OWNERS_MAX], msgspec.structs.replace(nobody, weight=weight))

    def close(self) -> None:
        """Forget everything."""
        self._judged.clear()

    def _claim(self, pid: int) -> Claim:
        process = self._processes.identify(pid)
        if process is None:
            ended = self._judged.pop(pid, None)
            if ended is not None:
                return ended[2]  # it held the device and ended between the listing and this look
            return unattributed_claim(f"process {pid} has ended or is hidden from the agent", None)
        version = self._registry.version
        known = self._judged.get(pid)
        if known is not None and known[0] is process and known[1] == version:
            return known[2]
        claim = self._judge(process)
        if len(self._judged) >= JUDGED_MAX:
            self._judged.clear()
        self._judged[pid] = (process, version, claim)
        return claim

    def _judge(self, process: Process) -> Claim:
        environ = process.environ or {}
        job = scheduler_job(environ)
        tag = self._registry.find(process)
        if tag is not None:
            reason = f"tag registered for process {tag.pid}"
            return _claim("tag", judge(tag.tags, job), reason, process.user)
        tags = tags_in(environ)
        if tags is not None:
            reason = f"environment of process {process.pid}"
            return _claim("environment", judge(tags, job), reason, process.user)
        if process.environ is None:
            reason = f"environment not readable: {process.reason or 'unknown reason'}"
            return unattributed_claim(f"process {process.pid}: {reason}", process.user)
        return _untagged(process, job)


def describe_claims(claims: tuple[Claim, ...]) -> tuple[str, ...]:
    """The owners of a device and why, one line each, for people."""
    total = sum(claim.weight for claim in claims)
    lines: list[str] = []
    for claim in claims:
        parts = [claim.owner.account]
        for field in ("model", "run", "attempt", "job"):
            value = getattr(claim.owner, field)
            if value is not None:
                parts.append(f"{field} {value}")
        if claim.owner.kind == "attributed":
            parts.append(claim.owner.activity)
        if claim.precision is not None:
            parts.append(claim.precision)
        if len(claims) > 1:
            parts.append(f"share {claim.weight} of {total}")
        if claim.user is not None:
            parts.append(f"user {claim.user}")
        flags = f" [{', '.join(claim.flags)}]" if claim.flags else ""
        lines.append(f"{', '.join(parts)}: {claim.evidence or claim.source}{flags}")
    return tuple(lines)


def _claim(source: str, verdict: Verdict, reason: str, user: str | None) -> Claim:
    attributed = verdict.owner.kind == "attributed"
    return Claim(
        owner=verdict.owner,
        weight=1,
        source=source if attributed else "none",
        evidence=evidence(f"{reason}: {verdict.trouble}" if verdict.trouble else reason),
        precision=verdict.precision,
        precision_origin="unknown" if verdict.precision is None else "declared",
        user=user,
        flags=verdict.flags,
    )


def unattributed_claim(reason: str, user: str | None) -> Claim:
    """Work that is nobody's, with the reason why it is."""
    return Claim(
        owner=UNATTRIBUTED_OWNER,
        weight=1,
        source="none",
        evidence=evidence(reason),
        precision=None,
        precision_origin="unknown",
        user=user,
        flags=(),
    )


def _untagged(process: Process, job: str | None) -> Claim:
    """Nobody's work, with the scheduler's job id where there is one, so that it can be claimed."""
    claim = unattributed_claim(
        f"no FLOPLEDGER_PROJECT in the environment of process {process.pid}", process.user
    )
    if job is None:
        return claim
    try:
        owner = msgspec.structs.replace(UNATTRIBUTED_OWNER, job=require_id("scheduler job", job))
    except InvalidInput:
        return msgspec.structs.replace(claim, flags=("invalid_tag",))
    return msgspec.structs.replace(claim, owner=owner)


def _key(claim: Claim) -> tuple[object, ...]:
    """What must be equal for two processes to be one claim: what a record keeps of them."""
    return (claim.owner, claim.source, claim.precision, claim.precision_origin, claim.user)


def _order(key: tuple[object, ...]) -> str:
    return repr(key)


def _merge(claims: list[Claim]) -> Claim:
    if len(claims) == 1:
        return claims[0]
    reason = claims[0].evidence or ""
    return msgspec.structs.replace(
        claims[0],
        weight=len(claims),
        evidence=evidence(f"{len(claims)} processes; {reason}"),
        flags=tuple(sorted({flag for claim in claims for flag in claim.flags})),
    )
