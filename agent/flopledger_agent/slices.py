"""Slices: what one device did between two readings, from the readings themselves. Pure.

Every rule of a slice is here: whose it is, and which counters may be used over it. A counter that
restarted, stood still or was not read leaves an absent quantity with its reason, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.layouts import counter_of, part
from flopledger_agent.windows import MICRO, UNKNOWN_CLAIM, UNSEEN_CLAIM, Anchor, Slice
from flopledger_core.energy import counter_delta
from flopledger_core.records import CYCLE_FIELDS, Cycles, Tier
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.gpus.interface import DeviceFailure, GpuSample

CLOCK_STEP_MS: Final = 500  # wall time that moved this far against boot time has stepped
# A counter that has not moved for this long stands still: GPM refreshes every 100 ms, the energy
# counter every 20 to 100 ms, and half a period more for the reading itself.
FROZEN_AFTER_NS: Final = 150_000_000
# A device without a visible process worked when its SMs or a pipe of them were active for more than
# this share of the elapsed cycles: a millisecond of work in a second. A GPU at rest counts nothing;
# the room is for skew between counters. Coarse utilisation is in whole hundredths: any is above it.
ACTIVE_PER_MILLE: Final = 1
_NOTHING: Final[tuple[Tier, dict[str, int], bool]] = ("none", {}, False)


def holders(
    anchor: Anchor,
    sample: GpuSample,
    claims: tuple[Claim, ...],
    ended: frozenset[int],
    *,
    dark: bool,
) -> tuple[Claim, ...]:
    """Whose a slice is: the owners at its end; where it ends at an exit, those at its start.

    Who is on the device when it is read held it since the reading before. A process that was there
    then, and whose exit was told, is gone from this reading because this reading was taken for its
    exit: it held the device until now. Time that nobody watched is nobody's.
    """
    if dark:
        return _held_through(anchor, claims)
    if _changed_hands(anchor, sample, claims):
        return anchor.claims
    before, after = anchor.processes, sample.processes
    if before and after is not None and anchor.claims and ended & (set(before) - set(after)):
        return anchor.claims
    return claims


def without_a_face(piece: Slice) -> Slice:
    """The slice of a device on which no process was visible: if it worked, it was not idle.

    Who worked is not known, and forgetting is not rewarded: `idle` counts for nobody, work that is
    `unattributed` may be anybody's.
    """
    if not _is_idle(piece.claims):
        return piece
    elapsed = piece.micro_cycles.get("elapsed", 0)
    most = max((piece.micro_cycles[name] for name in piece.micro_cycles if name != "elapsed"),
               default=0)  # fmt: skip
    if most * 1000 <= elapsed * ACTIVE_PER_MILLE:
        return piece
    return msgspec.structs.replace(piece, claims=(UNSEEN_CLAIM,))


def _is_idle(claims: tuple[Claim, ...]) -> bool:
    return all(claim.owner.kind == "idle" for claim in claims)


def _held_through(anchor: Anchor, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
    """Whose dark time was: of the jobs that held the device since before, by their scheduler."""
    held = all(
        claim.allocated
        and claim.since_unix_ms is not None
        and claim.since_unix_ms <= anchor.unix_ns // NS_PER_MS
        for claim in claims
    )
    return claims if held and claims else (UNKNOWN_CLAIM,)


def _changed_hands(anchor: Anchor, sample: GpuSample, claims: tuple[Claim, ...]) -> bool:
    """Whether an allocation ended or began within the slice, so that it is of those at its start.

    An edge makes a reading at once: a job that holds the device no more held it until now, and one
    that has held it for less than half of the slice has it from now on.
    """
    before = {_job(claim) for claim in anchor.claims if claim.allocated}
    now = {_job(claim): claim.since_unix_ms for claim in claims if claim.allocated}
    if before - now.keys():
        return True
    begun = [since for job, since in now.items() if job not in before]
    if not begun or not anchor.claims:
        return False
    middle_ns = anchor.unix_ns + (sample.boot_ns - anchor.boot_ns) // 2
    return all(since is not None and since * NS_PER_MS > middle_ns for since in begun)


def _job(claim: Claim) -> tuple[str | None, str | None]:
    return (claim.owner.job, claim.owner.attempt)


def standing_still(anchor: Anchor, sample: GpuSample, *, dark: bool) -> tuple[str, ...]:
    """Counters that answer but have not moved while the device ran: they tell nothing.

    Cycles elapse whenever the SM clock runs, so a counter of them that stands still beside a
    clock reading above zero at both ends is frozen. A sleeping GPU's clock may be gated whatever
    its reading says: with no process on it at either end and an energy counter that moves (so
    the driver is alive) nothing ran, and nothing is what was counted. No GPU draws no energy at
    a power above zero.
    """
    if dark or sample.boot_ns - anchor.boot_ns < FROZEN_AFTER_NS:
        moved = {
            "cycles": _elapsed(anchor.cycles) != _elapsed(sample.cycles),
            "energy": anchor.energy_mj != sample.energy_mj,
        }
        return tuple(name for name in anchor.frozen if not moved[name])
    frozen: list[str] = []
    energy_stands = sample.energy_mj is not None and sample.energy_mj == anchor.energy_mj
    elapsed = _elapsed(sample.cycles)
    counting = sample.tier == anchor.cycles_tier == "gpm_cycles"  # others know when they are stale
    if counting and elapsed is not None and elapsed == _elapsed(anchor.cycles):
        energy_moves = None not in (sample.energy_mj, anchor.energy_mj) and not energy_stands
        asleep = energy_moves and anchor.processes == sample.processes == ()
        if anchor.sm_clock_khz and sample.sm_clock_khz and not asleep:
            frozen.append("cycles")
    if energy_stands and anchor.power_mw and sample.power_mw:
        frozen.append("energy")
    return tuple(frozen)


def _elapsed(cycles: Cycles | None) -> int | None:
    return None if cycles is None else cycles.elapsed


def reported(reading: GpuSample | DeviceFailure) -> tuple[str, ...]:
    """Flags of what the driver reported of the device since its reading before."""
    return ("xid_error",) if reading.xids else ()


def halted_slice(anchor: Anchor, boot_ns: int, unix_ns: int, reason: str) -> Slice:
    """Time that nobody read, on purpose or right after it.

    Whoever held the device then has it. That nobody did says nothing about the time itself: a pause
    is made for a program that wants the device.
    """
    flags = {*anchor.flags, *_stepped(anchor, boot_ns, unix_ns)}
    return Slice(
        device=anchor.device,
        start_boot_ns=anchor.boot_ns,
        start_unix_ns=anchor.unix_ns,
        end_boot_ns=boot_ns,
        end_unix_ns=unix_ns,
        claims=(UNKNOWN_CLAIM,) if _is_idle(anchor.claims) else anchor.claims,
        tier="none",
        micro_cycles={},
        derived=False,
        energy_mj=None,
        energy_counter_mj=None,
        sm_clock_khz=None,
        absent={"cycles": reason, "energy": reason},
        flags=tuple(sorted(flags)),
    )


def slice_between(  # noqa: PLR0913 (two readings, whose they are, and how they may be used)
    anchor: Anchor,
    sample: GpuSample,
    claims: tuple[Claim, ...],
    unix_ns: int,
    *,
    dark: bool,
    frozen: tuple[str, ...],
) -> Slice:
    """The slice between two readings; `frozen` is what `standing_still` says of them."""
    absent = dict(sample.absent)
    flags = [*anchor.flags, *reported(sample), *_stepped(anchor, sample.boot_ns, unix_ns)]
    # A counter that stood still and moves again counts what belongs to the time before, too.
    untold = {*frozen, *anchor.frozen}
    if "cycles" in untold:
        absent["cycles"] = "counter_frozen"
        tier, micro, derived = _NOTHING
    else:
        tier, micro, derived = _cycles_between(anchor, sample, absent, flags, dark=dark)
    if "energy" in untold:
        absent["energy"], energy = "counter_frozen", None
    else:
        energy = _energy_between(anchor, sample, absent, flags)
    if dark:
        flags.append("recovered")
    power_known = not dark and anchor.power_mw is not None and sample.power_mw is not None
    if not power_known:
        why = "dark_time" if dark else sample.absent.get("power_mw", "not_readable_at_both_ends")
        absent.setdefault("power_integral", why)
    return Slice(
        device=sample.device,
        start_boot_ns=anchor.boot_ns,
        start_unix_ns=anchor.unix_ns,
        end_boot_ns=sample.boot_ns,
        end_unix_ns=unix_ns,
        claims=claims,
        tier=tier,
        micro_cycles=micro,
        derived=derived,
        energy_mj=energy,
        energy_counter_mj=_counter_of(sample),
        energy_scope=sample.energy_scope,
        power_start_mw=anchor.power_mw if power_known else None,
        power_end_mw=sample.power_mw if power_known else None,
        sm_clock_khz=None if dark else sample.sm_clock_khz,
        uncertain_start_cycles=anchor.uncertain_cycles,
        uncertain_end_cycles=sample.uncertain_cycles,
        absent=absent,
        flags=tuple(sorted(set(flags))),
    )


def _stepped(anchor: Anchor, boot_ns: int, unix_ns: int) -> tuple[str, ...]:
    """The flag of wall time that moved otherwise than boot time."""
    apart_ns = abs((unix_ns - anchor.unix_ns) - (boot_ns - anchor.boot_ns))
    return ("clock_stepped",) if apart_ns > CLOCK_STEP_MS * NS_PER_MS else ()


def counting_tier(sample: GpuSample) -> Tier:
    """Whose cumulative counters a sample's `cycles` are, whatever tier its own interval has."""
    return "dcgm_pipes" if sample.tier == "dcgm_pipes" else "gpm_cycles"


def _cycles_between(
    anchor: Anchor, sample: GpuSample, absent: dict[str, str], flags: list[str], *, dark: bool
) -> tuple[Tier, dict[str, int], bool]:
    """Tier, micro-cycles by field, and whether they are derived rather than counted."""
    counts = sample.tier == counting_tier(sample) == anchor.cycles_tier
    if counts and sample.cycles is not None and anchor.cycles is not None:
        counted = _counted(anchor.cycles, sample.cycles, absent)
        if counted is not None:
            return sample.tier, counted, False
        flags.append("counter_reset")
        absent["cycles"] = "counter_restarted"
    elif sample.utilization is not None and not dark:
        if sample.sm_clock_khz is None or sample.device.sm_count is None:
            absent["cycles"] = "no_sm_clock_or_count"
        else:
            span_ns = sample.boot_ns - anchor.boot_ns
            elapsed = sample.device.sm_count * sample.sm_clock_khz * span_ns
            micro = {"elapsed": elapsed}
            for name, ratio in sample.utilization.items():
                micro[name] = elapsed * ratio.numerator // ratio.denominator
            return sample.tier, micro, True
    elif dark:
        absent["cycles"] = "dark_time"
    elif sample.cycles is not None:
        absent["cycles"] = "first_reading"
    else:
        absent.setdefault("cycles", "no_activity_counter")
    return _NOTHING


def _counted(before: Cycles, now: Cycles, absent: dict[str, str]) -> dict[str, int] | None:
    """Counted micro-cycles by field; None when a counter restarted."""
    micro: dict[str, int] = {}
    for name in CYCLE_FIELDS:
        earlier: int | None = getattr(before, name)
        later: int | None = getattr(now, name)
        if earlier is None or later is None:
            absent.setdefault(f"cycles.{name}", "not_readable_at_both_ends")
            continue
        if later < earlier:  # as `counter_delta` says, without an object for each of ten counters
            return None
        micro[name] = (later - earlier) * MICRO
    return micro


def _energy_between(
    anchor: Anchor, sample: GpuSample, absent: dict[str, str], flags: list[str]
) -> int | None:
    """The device's part of what the GPU's counter counted: of a whole GPU, all of it."""
    before, now = counter_of(anchor), _counter_of(sample)
    if before is None or now is None:
        absent.setdefault("energy", "not_readable_at_both_ends")
        return None
    if counter_delta(before, now).restarted:
        flags.append("counter_reset")
        absent["energy"] = "counter_restarted"
        return None
    return part(sample.device, now) - part(sample.device, before)


def _counter_of(sample: GpuSample) -> int | None:
    return sample.energy_mj if sample.energy_counter_mj is None else sample.energy_counter_mj
