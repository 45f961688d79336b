"""Measurement windows: slices that are alike add up, and close into records, one per owner. Pure.

A window is an interval between two samples of one device in which the owners, the tier and what
could be read did not change. Time is conserved: over the owners `gpu_time_ms` sums exactly to the
window. What nobody could read becomes a gap with its reason, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim, same_owners
from flopledger_agent.attribution.splitting import record_weights, with_rule
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    NO_CYCLES,
    AgentRecord,
    Attribution,
    Cycles,
    CyclesOrigin,
    Device,
    EnergyOrigin,
    EnergyScope,
    GapRecord,
    Tier,
    UsageRecord,
)
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS, NS_PER_SECOND, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

MICRO: Final = 1_000_000  # window sums are kept in millionths of an SM-cycle, so slices add exactly

MW_NS_PER_MJ: Final = 1_000_000_000  # a milliwatt for a second is a millijoule

# The check of the energy counter against integrated power. Sensors are accurate to 5 % (pynvml
# documentation), the counter moves every 20 to 100 ms: a tenth of a one-second window, a hundredth
# of ten seconds. So a difference of more than a tenth over ten seconds is no sensor's tolerance.
CROSS_CHECK_AFTER_NS: Final = 10 * NS_PER_SECOND
CROSS_CHECK_PER_MILLE: Final = 100
# Power is a mean of the second before (Ampere and later, but not GA100): where the load changed at
# an edge of the window, the integral has up to a second of the old load in it.
POWER_AVERAGING_NS: Final = NS_PER_SECOND

NO_ALLOCATION: Final = {"allocated_time": "no_scheduler_source"}
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

# A process list can be empty because of pid namespaces, or because whoever worked came and went
# between two readings: such work is nobody's that we know, and not idleness.
UNSEEN_CLAIM: Final = msgspec.structs.replace(
    UNKNOWN_CLAIM, evidence="activity without a visible process"
)


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """The last reading of a device: where its next slice begins."""

    device: Device
    boot_ns: int
    unix_ns: int
    cycles: Cycles | None
    energy_mj: int | None
    energy_counter_mj: int | None = None  # the whole GPU's, of which `energy_mj` may be a part
    cycles_tier: Tier = "gpm_cycles"  # whose counters `cycles` are: two sources' never mix
    watched: bool = True  # False: nobody watched the device from here to its next sample
    power_mw: int | None = None
    sm_clock_khz: int | None = None
    uncertain_cycles: int = 0  # of the cycle counters at this reading
    processes: tuple[int, ...] | None = None  # who was on the device; None: not known
    claims: tuple[Claim, ...] = ()  # what those processes led to
    # Why counting was stopped on purpose here: nothing bridges the time to the next sample.
    halted: str | None = None
    frozen: tuple[str, ...] = ()  # counters that answered but stood still: "cycles", "energy"
    flags: tuple[str, ...] = ()  # of a reading that ended no slice; the next one carries them


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
    energy_scope: EnergyScope = "gpu"  # of the counter; sampled power is always the GPU's
    power_start_mw: int | None = None  # both None where power tells nothing about this slice
    power_end_mw: int | None = None
    uncertain_start_cycles: int = 0  # how far the counters may lie from the truth at each end
    uncertain_end_cycles: int = 0

    @property
    def power_twice_mw_ns(self) -> int | None:
        """Twice the trapezoid under sampled power, in mW x ns: exact integers without halves.

        Power is read of the whole GPU; a part of a partitioned one gets its slices' part of it.
        """
        if self.power_start_mw is None or self.power_end_mw is None:
            return None
        span_ns = self.end_boot_ns - self.start_boot_ns
        return _part(self.device, (self.power_start_mw + self.power_end_mw) * span_ns)

    def is_like(self, other: Slice) -> bool:
        """Slices that are alike may share a window: they could read and say the same."""
        return (
            self.flags == other.flags
            and self.tier == other.tier
            and self.derived == other.derived
            and self.energy_scope == other.energy_scope
            and (self.energy_mj is None) == (other.energy_mj is None)
            and (self.sm_clock_khz is None) == (other.sm_clock_khz is None)
            and self._has_power == other._has_power
            and self.micro_cycles.keys() == other.micro_cycles.keys()
            and self.absent == other.absent
            and self.device == other.device
        )

    @property
    def _has_power(self) -> bool:
        return self.power_start_mw is not None and self.power_end_mw is not None


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """An open measurement window: the sum of slices that are alike."""

    first: Slice
    last: Slice
    micro_cycles: dict[str, int]
    energy_mj: int | None
    clock_khz_ns: int
    power_twice_mw_ns: int | None = None  # sum of the slices'
    # Percent of the SMs times the time it was told of, of each claim in the order of `ordered`.
    used_percent_ns: tuple[int, ...] = ()

    @property
    def minute(self) -> int:
        """The UTC minute in which the window began."""
        return self.first.start_unix_ns // NS_PER_MS // MS_PER_MINUTE


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """A finished record and the user's name that will be sealed beside it."""

    record: AgentRecord
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
        window.first.is_like(piece)
        and same_owners(window.first.claims, piece.claims)
        and "recovered" not in piece.flags
        and "clock_stepped" not in piece.flags
    )


def extended(window: Window | None, piece: Slice) -> Window:
    """The window with the slice added; a new one of this slice where there is none."""
    span_ns = piece.end_boot_ns - piece.start_boot_ns
    clock = (piece.sm_clock_khz or 0) * span_ns
    used = tuple((claim.used_percent or 0) * span_ns for claim in ordered(piece.claims))
    if window is None:
        return Window(
            first=piece,
            last=piece,
            micro_cycles=dict(piece.micro_cycles),
            energy_mj=piece.energy_mj,
            clock_khz_ns=clock,
            power_twice_mw_ns=piece.power_twice_mw_ns,
            used_percent_ns=used,
        )
    power = piece.power_twice_mw_ns
    return Window(
        first=window.first,
        last=piece,
        micro_cycles={
            name: window.micro_cycles[name] + amount for name, amount in piece.micro_cycles.items()
        },
        energy_mj=None if piece.energy_mj is None else (window.energy_mj or 0) + piece.energy_mj,
        clock_khz_ns=window.clock_khz_ns + clock,
        power_twice_mw_ns=None if power is None else (window.power_twice_mw_ns or 0) + power,
        used_percent_ns=tuple(
            before + now for before, now in zip(window.used_percent_ns, used, strict=True)
        ),
    )


def window_records(window: Window) -> list[Closed]:
    """The window's records, one per owner, every quantity split by the same weights."""
    first, last = window.first, window.last
    start_ms = first.start_boot_ns // NS_PER_MS
    end_ms = last.end_boot_ns // NS_PER_MS
    if end_ms == start_ms:
        return []  # shorter than a millisecond: its counts stay below what a record can place
    claims = ordered(first.claims)
    energy = _energy(window)
    if not window.micro_cycles and energy.amount_mj is None:
        return [_gap(window, claims, start_ms, end_ms)]
    weights, by_use = record_weights(
        [claim.weight for claim in claims],
        window.used_percent_ns if all(claim.used_percent is not None for claim in claims) else (),
    )
    times = shares(_part(first.device, end_ms) - _part(first.device, start_ms), weights)
    cycles = {
        name: shares(amount // MICRO, weights) for name, amount in window.micro_cycles.items()
    }
    energies = _shared(energy.amount_mj, weights)
    powers = _shared(energy.integral_mj, weights)
    span_ns = max(1, last.end_boot_ns - first.start_boot_ns)
    result: list[Closed] = []
    for index, claim in enumerate(claims):
        flags = {*first.flags, *energy.flags, *claim.flags}
        attribution = claim.attribution(len(claims), sum(weights))
        absent = energy.absent if claim.allocated else {**energy.absent, **NO_ALLOCATION}
        if len(claims) > 1:
            flags.add("shared")
            attribution = msgspec.structs.replace(
                attribution,
                weight=weights[index],
                evidence=with_rule(claim.evidence, by_use=by_use),
            )
        if energy.amount_mj is not None and _is_part(first.device):
            flags.add("apportioned")
        record = UsageRecord(
            device=first.device,
            start_unix_ms=first.start_unix_ns // NS_PER_MS,
            start_boot_ms=start_ms,
            end_boot_ms=end_ms,
            owner=claim.owner,
            attribution=attribution,
            gpu_time_ms=times[index],
            allocated_time_ms=end_ms - start_ms if claim.allocated else None,
            wall_time_ms=end_ms - start_ms,
            tier=first.tier,
            precision=claim.precision,
            precision_origin=claim.precision_origin,
            cycles=_cycles(cycles, index),
            cycles_origin=_cycles_origin(window),
            energy_mj=None if energies is None else energies[index],
            energy_origin=energy.origin,
            energy_counter_mj=last.energy_counter_mj,
            energy_scope=energy.scope,
            power_integral_mj=None if powers is None else powers[index],
            sm_clock_khz=None if first.sm_clock_khz is None else window.clock_khz_ns // span_ns,
            uncertain_cycles=_uncertain_cycles(window, weights[index], sum(weights)),
            absent=dict(sorted(absent.items())),
            flags=tuple(sorted(flags)),
            user_commitment=None,
        )
        result.append(Closed(record=record, user=claim.user))
    return result


class _Energy(msgspec.Struct, frozen=True, kw_only=True):
    """A window's energy, where it comes from, and what its cross-check says."""

    amount_mj: int | None
    origin: EnergyOrigin
    scope: EnergyScope
    integral_mj: int | None
    flags: tuple[str, ...]
    absent: dict[str, str]


def _energy(window: Window) -> _Energy:
    """The counter's energy, else the integral of sampled power, else none.

    What the integral deserves as bounds (`energy_origin` "power_integral"): power at the samples
    says nothing about the time between them (a sensor that averages looks at a quarter of it), so
    low is 0 and high is the power limit times the time; only the central value is the integral.
    """
    first = window.first
    absent = dict(first.absent)
    twice = window.power_twice_mw_ns
    integral_mj = None if twice is None else twice // (2 * MW_NS_PER_MJ)
    if window.energy_mj is None and integral_mj is not None:
        if "energy" in absent:  # it is the counter that is absent, not the energy
            absent["energy_counter"] = absent.pop("energy")
        return _Energy(
            amount_mj=integral_mj,
            origin="power_integral",
            scope="gpu",
            integral_mj=integral_mj,
            flags=(),
            absent=absent,
        )
    checked = window.energy_mj is not None and integral_mj is not None
    if checked and first.energy_scope != "gpu":
        absent["energy_cross_check"] = "module_counter"  # CPU and memory are in it, not in power
        checked = False
    return _Energy(
        amount_mj=window.energy_mj,
        origin="absent" if window.energy_mj is None else "counter",
        scope=first.energy_scope,
        integral_mj=integral_mj,
        flags=("energy_cross_check",) if checked and _disagrees(window) else (),
        absent=absent,
    )


def _disagrees(window: Window) -> bool:
    """Whether counter and integral of a long enough window lie further apart than meters do."""
    first, last = window.first, window.last
    if last.end_boot_ns - first.start_boot_ns < CROSS_CHECK_AFTER_NS:
        return False
    counted = (window.energy_mj or 0) * 2 * MW_NS_PER_MJ
    apart = abs(counted - (window.power_twice_mw_ns or 0))
    swing_mw = abs((last.power_end_mw or 0) - (first.power_start_mw or 0))
    edges = _part(first.device, 2 * swing_mw * POWER_AVERAGING_NS)
    return apart * 1000 > counted * CROSS_CHECK_PER_MILLE + edges * 1000


def _uncertain_cycles(window: Window, weight: int, weights: int) -> int:
    """How far each counted sum may lie from the truth: what its two ends may, at most.

    Slices telescope: every reading between the ends is added once and subtracted once. Only
    counted cycles have ends; derived ones are bounded by their tier.
    """
    if window.first.derived or not window.micro_cycles:
        return 0
    ends = window.first.uncertain_start_cycles + window.last.uncertain_end_cycles
    return ceil_div(ends * weight, weights)


def _shared(total: int | None, weights: Sequence[int]) -> list[int] | None:
    return None if total is None else shares(total, weights)


def _is_part(device: Device) -> bool:
    return device.slices is not None and device.slices.count < device.slices.of_count


def _part(device: Device, whole: int) -> int:
    return whole if device.slices is None else device.slices.part(whole)


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
        anchor,
        now_boot_ns // NS_PER_MS - start_ms,
        reason,
        start_boot_ms=start_ms,
        flags=anchor.flags,
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


def ordered(claims: Sequence[Claim]) -> list[Claim]:
    """The claims in the order in which remainders are dealt out; one and the same for a window."""
    return sorted(claims, key=_claim_order) if len(claims) > 1 else list(claims)


def _claim_order(claim: Claim) -> tuple[str, ...]:
    owner = claim.owner
    parts = (owner.kind, owner.project, owner.model, owner.run, owner.attempt, owner.job)
    more = (owner.activity, claim.precision, claim.user, claim.source, claim.precision_origin)
    return (*(part or "" for part in (*parts, *more)), owner.entity or "", *claim.flags)
