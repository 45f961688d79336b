"""Windows of the node itself: slices of one shape add up and close into records, one per owner.

Pure. Unlike a GPU's windows these need not end when owners come and go: CPU time is measured for
each owner, so a window holds all that were seen in it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.host.interface import ENERGY_QUANTITIES
from flopledger_agent.windows import Closed, shares
from flopledger_core.identity import IDLE_OWNER, UNATTRIBUTED_OWNER
from flopledger_core.records import HostBoundary, HostEnergySource, HostRecord
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS

UJ_PER_MJ: Final = 1_000
# Owners come from environments that anybody may write: so many names a node has honestly in a
# minute, and more would only fill the disk. Those beyond them are nobody's, which hides no work.
OWNERS_MAX: Final = 256


def _claim(idle: bool, evidence: str) -> Claim:  # noqa: FBT001 (two constants below)
    return Claim(
        owner=IDLE_OWNER if idle else UNATTRIBUTED_OWNER,
        weight=1,
        source="idle" if idle else "none",
        evidence=evidence,
        precision=None,
        precision_origin="unknown",
        user=None,
        flags=(),
    )


IDLE_CPUS: Final = _claim(True, "no process was running")
UNOWNED: Final = _claim(
    False,
    "busy time of processes that nobody tagged, that ended unseen, and of the kernel",
)
UNREAD: Final = _claim(False, "CPU time could not be read")


class OwnerShare(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time of one owner."""

    claim: Claim
    cpu_ns: int


class HostSlice(msgspec.Struct, frozen=True, kw_only=True):
    """What the node did between two readings."""

    start_boot_ns: int
    start_unix_ns: int
    end_boot_ns: int
    cpu_count: int
    shares: tuple[OwnerShare, ...] | None  # None: CPU time could not be read
    energy_uj: dict[HostBoundary, int]
    energy_sources: dict[HostBoundary, HostEnergySource]
    absent: dict[str, str]
    flags: tuple[str, ...]


class HostWindow(msgspec.Struct, frozen=True, kw_only=True):
    """An open measurement window: the sum of slices of one shape."""

    start_boot_ns: int
    start_unix_ns: int
    end_boot_ns: int
    cpu_count: int
    shares: tuple[OwnerShare, ...] | None
    energy_uj: dict[HostBoundary, int]
    energy_sources: dict[HostBoundary, HostEnergySource]
    absent: dict[str, str]
    flags: tuple[str, ...]

    @property
    def minute(self) -> int:
        """The UTC minute in which the window began."""
        return self.start_unix_ns // NS_PER_MS // MS_PER_MINUTE


def fits(window: HostWindow, piece: HostSlice) -> bool:
    """True when the slice may join the window; one that was dark or stepped stands alone."""
    return (
        not piece.flags
        and not window.flags
        and window.cpu_count == piece.cpu_count
        and (window.shares is None) == (piece.shares is None)
        and window.energy_sources == piece.energy_sources
        and window.absent == piece.absent
    )


def extended(window: HostWindow | None, piece: HostSlice) -> HostWindow:
    """The window with the slice added; a new one of this slice where there is none."""
    shares = piece.shares
    if shares is not None:
        shares = _added(() if window is None else window.shares or (), shares)
    if window is None:
        fresh = HostWindow(**{name: getattr(piece, name) for name in HostWindow.__struct_fields__})
        return msgspec.structs.replace(fresh, shares=shares)
    return msgspec.structs.replace(
        window,
        end_boot_ns=piece.end_boot_ns,
        shares=shares,
        energy_uj={
            boundary: window.energy_uj[boundary] + amount
            for boundary, amount in piece.energy_uj.items()
        },
    )


def window_records(
    window: HostWindow, carried_uj: dict[HostBoundary, int]
) -> tuple[list[Closed], dict[HostBoundary, int]]:
    """The window's records, one per owner, and the microjoules that the next window takes over.

    Both ends are rounded to milliseconds as everywhere, so that windows join without a hole; CPU
    time and energy are cut by the same weights, the owners' nanoseconds.
    """
    start_ms = window.start_boot_ns // NS_PER_MS
    window_ms = window.end_boot_ns // NS_PER_MS - start_ms
    if window_ms == 0:
        return [], carried_uj  # shorter than any record can place
    owners = window.shares
    if owners is None:
        owners = (OwnerShare(claim=UNREAD, cpu_ns=window.cpu_count * window_ms),)
    owners = tuple(one for one in owners if one.cpu_ns or one.claim.owner.kind == "attributed")
    owners = tuple(sorted(owners, key=_order))
    weights = [one.cpu_ns for one in owners]
    times = cut(window.cpu_count * window_ms, weights)
    whole: dict[HostBoundary, tuple[int, int]] = {
        boundary: divmod(amount + carried_uj.get(boundary, 0), UJ_PER_MJ)
        for boundary, amount in sorted(window.energy_uj.items())
    }
    energies: dict[HostBoundary, list[int]] = {
        boundary: cut(mj, weights) for boundary, (mj, _rest) in whole.items()
    }
    apportioned = {"apportioned"} if energies and len(owners) > 1 else set[str]()
    records = [
        HostRecord(
            start_unix_ms=window.start_unix_ns // NS_PER_MS,
            start_boot_ms=start_ms,
            window_ms=window_ms,
            owner=one.claim.owner,
            attribution=one.claim.attribution(1, 1),
            cpu_count=window.cpu_count,
            cpu_time_ms=None if window.shares is None else times[index],
            energy_mj={boundary: parts[index] for boundary, parts in energies.items()},
            energy_sources=dict(sorted(window.energy_sources.items())),
            absent=window.absent,
            flags=tuple(sorted({*window.flags, *one.claim.flags, *apportioned})),
            user_commitment=None,
        )
        for index, one in enumerate(owners)
    ]
    carried: dict[HostBoundary, int] = {boundary: rest for boundary, (_mj, rest) in whole.items()}
    closed = [
        Closed(record=record, user=one.claim.user)
        for record, one in zip(records, owners, strict=True)
    ]
    return closed, carried


def dark_record(start_unix_ns: int, end_unix_ns: int, cpu_count: int | None) -> Closed:
    """Time between two boots: only wall time tells how long it was, and nothing tells the rest."""
    start_ms = start_unix_ns // NS_PER_MS
    window_ms = end_unix_ns // NS_PER_MS - start_ms
    quantities = ("cpu_time", *ENERGY_QUANTITIES.values())
    absent = {**dict.fromkeys(quantities, "node_restarted"), "flop": "cpu_flop_not_counted"}
    record = HostRecord(
        start_unix_ms=start_ms,
        start_boot_ms=None,
        window_ms=max(0, window_ms),
        owner=UNATTRIBUTED_OWNER,
        attribution=UNREAD.attribution(1, 1),
        cpu_count=cpu_count or 1,
        cpu_time_ms=None,
        energy_mj={},
        energy_sources={},
        absent=dict(sorted(absent.items())),
        flags=("clock_stepped",) if window_ms < 0 else (),
        user_commitment=None,
    )
    return Closed(record=record, user=None)


def cut(total: int, weights: list[int]) -> list[int]:
    """`windows.shares`, also where all weights are zero: then the last part takes all."""
    if not sum(weights):
        weights = [*([0] * (len(weights) - 1)), 1]
    return shares(total, weights)


def _added(before: tuple[OwnerShare, ...], more: tuple[OwnerShare, ...]) -> tuple[OwnerShare, ...]:
    sums = {_key(one.claim): one for one in before}
    unowned = _key(UNOWNED)
    for one in more:
        key, claim = _key(one.claim), one.claim
        if key not in sums and claim.owner.kind != "idle" and len(sums) >= OWNERS_MAX:
            key, claim = unowned, UNOWNED
        known = sums.get(key)
        sums[key] = OwnerShare(claim=claim, cpu_ns=one.cpu_ns + (known.cpu_ns if known else 0))
    return tuple(sums.values())


def _key(claim: Claim) -> tuple[object, ...]:
    return (claim.owner, claim.source, claim.user, claim.flags)


def _order(one: OwnerShare) -> tuple[str, ...]:
    owner = one.claim.owner
    parts = (owner.kind, owner.project, owner.entity, owner.model, owner.run, owner.attempt)
    more = (owner.job, owner.activity, one.claim.source, one.claim.user, *one.claim.flags)
    return tuple(part or "" for part in (*parts, *more))
