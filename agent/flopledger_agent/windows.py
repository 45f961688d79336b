"""Measurement windows: slices of one shape add up, and close into records, one per owner. Pure.

A window is an interval between two samples of one device in which the owners, the tier and what
could be read did not change. Time is conserved: over the owners `gpu_time_ms` sums exactly to the
window. What nobody could read becomes a gap with its reason, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim, same_owners
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    NO_CYCLES,
    Attribution,
    Cycles,
    CyclesOrigin,
    Device,
    GapRecord,
    Tier,
    UsageRecord,
)
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Sequence

MICRO: Final = 1_000_000  # window sums are kept in millionths of an SM-cycle, so slices add exactly

UNKNOWN_CLAIM: Final = Claim(
    owner=UNATTRIBUTED_OWNER,
    weight=1,
    source="none",
    evidence="nobody watched the device",
    precision=None,
    precision_origin="unknown",
    user=None,
    flags=(),
)


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """The last reading of a device: where its next slice begins."""

    device: Device
    boot_ns: int
    unix_ns: int
    cycles: Cycles | None
    energy_mj: int | None
    watched: bool = True  # False: nobody watched the device from here to its next sample


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """What one device did between two readings."""

    device: Device
    start_boot_ns: int
    start_unix_ns: int
    end_boot_ns: int
    end_unix_ns: int
    claims: tuple[Claim, ...]
    tier: Tier
    micro_cycles: dict[str, int]  # by `Cycles` field, only what could be read
    derived: bool
    energy_mj: int | None
    energy_counter_mj: int | None
    sm_clock_khz: int | None
    absent: dict[str, str]
    flags: tuple[str, ...]

    @property
    def shape(self) -> tuple[object, ...]:
        """Slices with one shape may share a window."""
        return (
            self.device,
            self.tier,
            self.derived,
            tuple(sorted(self.micro_cycles)),
            self.energy_mj is None,
            self.sm_clock_khz is None,
            tuple(sorted(self.absent.items())),
            self.flags,
        )


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """An open measurement window: the sum of slices of one shape."""

    first: Slice
    last: Slice
    micro_cycles: dict[str, int]
    energy_mj: int | None
    clock_khz_ns: int

    @property
    def minute(self) -> int:
        """The UTC minute in which the window began."""
        return self.first.start_unix_ns // NS_PER_MS // MS_PER_MINUTE


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """A finished record and the user's name that will be sealed beside it."""

    record: UsageRecord | GapRecord
    user: str | None


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` cut in proportion to `weights`, exactly: the parts sum to it.

    The fixed rule for remainders: part i ends where the rounded-down share of all parts up to i
    ends, so no part is off by more than one unit.
    """
    if len(weights) == 1:
        return [total]
    whole = sum(weights)
    parts: list[int] = []
    reached, before = 0, 0
    for weight in weights:
        reached += weight
        edge = total * reached // whole
        parts.append(edge - before)
        before = edge
    return parts


def fits(window: Window, piece: Slice) -> bool:
    """True when the slice may join the window; one that was dark or stepped stands alone."""
    return (
        window.first.shape == piece.shape
        and same_owners(window.first.claims, piece.claims)
        and "recovered" not in piece.flags
        and "clock_stepped" not in piece.flags
    )


def extended(window: Window | None, piece: Slice) -> Window:
    """The window with the slice added; a new one of this slice where there is none."""
    span_ns = piece.end_boot_ns - piece.start_boot_ns
    clock = (piece.sm_clock_khz or 0) * span_ns
    if window is None:
        return Window(
            first=piece,
            last=piece,
            micro_cycles=dict(piece.micro_cycles),
            energy_mj=piece.energy_mj,
            clock_khz_ns=clock,
        )
    return Window(
        first=window.first,
        last=piece,
        micro_cycles={
            name: window.micro_cycles[name] + amount for name, amount in piece.micro_cycles.items()
        },
        energy_mj=None if piece.energy_mj is None else (window.energy_mj or 0) + piece.energy_mj,
        clock_khz_ns=window.clock_khz_ns + clock,
    )


def window_records(window: Window) -> list[Closed]:
    """The window's records, one per owner, every quantity split by the same weights."""
    first, last = window.first, window.last
    start_ms = first.start_boot_ns // NS_PER_MS
    end_ms = last.end_boot_ns // NS_PER_MS
    if end_ms == start_ms:
        return []  # shorter than a millisecond: its counts stay below what a record can place
    claims = sorted(first.claims, key=_claim_order)
    if not window.micro_cycles and window.energy_mj is None:
        return [_gap(window, claims, start_ms, end_ms)]
    weights = [claim.weight for claim in claims]
    times = shares(end_ms - start_ms, weights)
    cycles = {
        name: shares(amount // MICRO, weights) for name, amount in window.micro_cycles.items()
    }
    energies = None if window.energy_mj is None else shares(window.energy_mj, weights)
    span_ns = max(1, last.end_boot_ns - first.start_boot_ns)
    result: list[Closed] = []
    for index, claim in enumerate(claims):
        flags = {*first.flags, *claim.flags, *(("shared",) if len(claims) > 1 else ())}
        record = UsageRecord(
            device=first.device,
            start_unix_ms=first.start_unix_ns // NS_PER_MS,
            start_boot_ms=start_ms,
            end_boot_ms=end_ms,
            owner=claim.owner,
            attribution=claim.attribution(len(claims), sum(weights)),
            gpu_time_ms=times[index],
            allocated_time_ms=None,
            wall_time_ms=end_ms - start_ms,
            tier=first.tier,
            precision=claim.precision,
            precision_origin=claim.precision_origin,
            cycles=_cycles(cycles, index),
            cycles_origin=_cycles_origin(window),
            energy_mj=None if energies is None else energies[index],
            energy_origin="absent" if energies is None else "counter",
            energy_counter_mj=last.energy_counter_mj,
            sm_clock_khz=None if first.sm_clock_khz is None else window.clock_khz_ns // span_ns,
            absent=dict(sorted({**first.absent, "allocated_time": "no_scheduler_source"}.items())),
            flags=tuple(sorted(flags)),
            user_commitment=None,
        )
        result.append(Closed(record=record, user=claim.user))
    return result


def _cycles(parts: dict[str, list[int]], index: int) -> Cycles:
    if not parts:
        return NO_CYCLES
    return Cycles(**{name: values[index] for name, values in parts.items()})


def _cycles_origin(window: Window) -> CyclesOrigin:
    if not window.micro_cycles:
        return "absent"
    return "derived" if window.first.derived else "measured"


def _gap(window: Window, claims: list[Claim], start_ms: int, end_ms: int) -> Closed:
    """Nothing was readable: a gap of the one owner, or of nobody where there were several."""
    claim = claims[0] if len(claims) == 1 else UNKNOWN_CLAIM
    first = window.first
    reason = first.absent.get("cycles") or first.absent.get("energy") or "nothing_readable"
    return Closed(
        record=GapRecord(
            device=first.device,
            start_unix_ms=first.start_unix_ns // NS_PER_MS,
            start_boot_ms=start_ms,
            gap_ms=end_ms - start_ms,
            owner=claim.owner,
            attribution=claim.attribution(1, claim.weight),
            precision=claim.precision,
            reason=reason,
            flags=tuple(sorted({*first.flags, *claim.flags})),
            user_commitment=None,
        ),
        user=claim.user,
    )


def wall_gap(anchor: Anchor, now_unix_ns: int, reason: str) -> Closed:
    """Dark time between two boots: only wall time can say how long it was."""
    gap_ms = now_unix_ns // NS_PER_MS - anchor.unix_ns // NS_PER_MS
    return _dark_gap(
        anchor,
        max(0, gap_ms),
        reason,
        start_boot_ms=None,
        flags=("clock_stepped",) if gap_ms < 0 else (),
    )


def boot_gap(anchor: Anchor, now_boot_ns: int, reason: str) -> Closed:
    """Dark time inside one boot, from a device's last reading."""
    start_ms = anchor.boot_ns // NS_PER_MS
    return _dark_gap(
        anchor, now_boot_ns // NS_PER_MS - start_ms, reason, start_boot_ms=start_ms, flags=()
    )


def _dark_gap(
    anchor: Anchor, gap_ms: int, reason: str, *, start_boot_ms: int | None, flags: tuple[str, ...]
) -> Closed:
    record = GapRecord(
        device=anchor.device,
        start_unix_ms=anchor.unix_ns // NS_PER_MS,
        start_boot_ms=start_boot_ms,
        gap_ms=gap_ms,
        owner=UNATTRIBUTED_OWNER,
        attribution=Attribution(source="none", evidence=UNKNOWN_CLAIM.evidence),
        precision=None,
        reason=reason,
        flags=flags,
        user_commitment=None,
    )
    return Closed(record=record, user=None)


def _claim_order(claim: Claim) -> tuple[str, ...]:
    owner = claim.owner
    parts = (owner.kind, owner.project, owner.model, owner.run, owner.attempt, owner.job)
    return tuple(part or "" for part in (*parts, owner.activity, claim.precision, claim.user))
