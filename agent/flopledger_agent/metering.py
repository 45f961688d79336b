"""Metering: two samples and the owners between them become usage records. Pure.

Each tick turns the time since a device's previous sample into one slice; slices of one shape
(owners, tier, what could be read) add up in an open window; windows close at UTC minutes and
whenever the shape changes, so that no record mixes what was read with what was not. Time is
conserved: a device's windows follow each other without a hole from its first sample to its last,
and over its owners `gpu_time_ms` sums exactly to the window. A counter that restarted, or time too
long to bridge, becomes an absent quantity or a gap with its reason, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.interface import Claim, same_owners
from flopledger_core.energy import counter_delta
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    CYCLE_FIELDS,
    NO_CYCLES,
    AgentRecord,
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
    from collections.abc import Iterable, Mapping, Sequence

    from flopledger_agent.gpus.interface import GpuSample, NodeSample

MICRO: Final = 1_000_000  # window sums are kept in millionths of an SM-cycle, so slices add exactly
CLOCK_STEP_MS: Final = 500  # wall time that moved this far against boot time has stepped
DARK_TICKS: Final = 5  # a device unseen for longer than this many ticks was dark, not late
GAP_AFTER_NS: Final = 3_600_000_000_000  # after an hour dark time is stated, not waited for
UNKNOWN_BOOT: Final = "unknown"  # what the node says where the kernel has no boot id
WINDOW_MINUTES: Final = (1, 10, 60)  # how wide windows get as the spool fills

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


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device: its last reading and, if slices came since the last close, its window."""

    anchor: Anchor
    window: Window | None


class MeterState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything metering remembers; it is persisted at every tick."""

    boot_id: str
    devices: dict[str, DeviceState]
    closed: tuple[Closed, ...]  # records of windows that closed and are not sealed yet


class Closed(msgspec.Struct, frozen=True, kw_only=True):
    """A finished record and the user's name that will be sealed beside it."""

    record: UsageRecord | GapRecord
    user: str | None


def empty_state(boot_id: str) -> MeterState:
    """A meter that has seen nothing."""
    return MeterState(boot_id=boot_id, devices={}, closed=())


def resume(state: MeterState, boot_id: str, now_boot_ns: int, now_unix_ns: int) -> MeterState:
    """The state of a meter that starts again after a pause or a crash.

    Open windows hold what was read before; they close as they are. In the same boot the anchors
    stay, so cumulative counters bridge the dark time; after a reboot they cannot, and each device's
    dark time becomes a gap. A boot without an id, or whose time went back, is another boot.
    """
    state = close_windows(state)
    reached_ns = max((device.anchor.boot_ns for device in state.devices.values()), default=0)
    if state.boot_id == boot_id != UNKNOWN_BOOT and now_boot_ns >= reached_ns:
        devices = {
            key: DeviceState(
                anchor=msgspec.structs.replace(device.anchor, watched=False), window=None
            )
            for key, device in state.devices.items()
        }
        return msgspec.structs.replace(state, devices=devices)
    gaps = tuple(
        _wall_gap(device.anchor, now_unix_ns, "node_restarted") for device in state.devices.values()
    )
    return MeterState(boot_id=boot_id, devices={}, closed=(*state.closed, *gaps))


def observe(
    state: MeterState,
    node: NodeSample,
    claims: Mapping[str, tuple[Claim, ...]],
    *,
    tick_ns: int,
) -> tuple[MeterState, tuple[Slice, ...]]:
    """Fold one tick into the state; also returns its slices, for the metrics page.

    `claims` are the owners seen in this tick by device key. A slice belongs to the owners seen
    at its end: whoever is on the device when it is read held it since the reading before.
    """
    devices = dict(state.devices)
    closed = list(state.closed)
    slices: list[Slice] = []
    offset_ns = node.unix_ns - node.boot_ns
    for sample in node.samples:
        key = sample.device.key
        unix_ns = max(0, sample.boot_ns + offset_ns)
        anchor = Anchor(
            device=sample.device,
            boot_ns=sample.boot_ns,
            unix_ns=unix_ns,
            cycles=sample.cycles,
            energy_mj=sample.energy_mj,
        )
        known = devices.get(key)
        if known is None or sample.boot_ns < known.anchor.boot_ns:
            if known is not None:
                closed.extend([] if known.window is None else _records(known.window))
                closed.append(_wall_gap(known.anchor, unix_ns, "boot_time_went_back"))
            devices[key] = DeviceState(anchor=anchor, window=None)
            continue
        if sample.boot_ns == known.anchor.boot_ns:
            continue  # no time has passed: the next sample will cover it
        span_ns = sample.boot_ns - known.anchor.boot_ns
        dark = not known.anchor.watched or span_ns > DARK_TICKS * tick_ns
        owners = (UNKNOWN_CLAIM,) if dark else claims[key]
        piece = _slice(known.anchor, sample, owners, unix_ns, dark=dark)
        slices.append(piece)
        window = known.window
        if window is not None and not _fits(window, piece):
            closed.extend(_records(window))
            window = None
        devices[key] = DeviceState(anchor=anchor, window=_extended(window, piece))
    sampled = {sample.device.key for sample in node.samples}
    for key, device in state.devices.items():
        if key not in sampled and node.boot_ns - device.anchor.boot_ns > GAP_AFTER_NS:
            devices[key] = _given_up(device, node, closed)
    return MeterState(boot_id=state.boot_id, devices=devices, closed=tuple(closed)), tuple(slices)


def close_windows(state: MeterState) -> MeterState:
    """Close every open window; the devices' anchors stay, so time goes on without a hole."""
    closed = list(state.closed)
    devices: dict[str, DeviceState] = {}
    for key, device in state.devices.items():
        if device.window is not None:
            closed.extend(_records(device.window))
        devices[key] = DeviceState(anchor=device.anchor, window=None)
    return MeterState(boot_id=state.boot_id, devices=devices, closed=tuple(closed))


def is_due(state: MeterState, now_unix_ns: int, window_minutes: int) -> bool:
    """True when the minute (or wider period) in which open windows began is over."""
    now = now_unix_ns // NS_PER_MS // MS_PER_MINUTE // window_minutes
    return any(
        device.window is not None and device.window.minute // window_minutes != now
        for device in state.devices.values()
    ) or (bool(state.closed) and not any(device.window for device in state.devices.values()))


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


# --- slices ----------------------------------------------------------------------------------


def _slice(
    anchor: Anchor, sample: GpuSample, claims: tuple[Claim, ...], unix_ns: int, *, dark: bool
) -> Slice:
    absent = dict(sample.absent)
    flags: list[str] = []
    tier, micro, derived = _cycles_between(anchor, sample, absent, flags, dark=dark)
    energy = _energy_between(anchor, sample, absent, flags)
    if dark:
        flags.append("recovered")
    span_ns = sample.boot_ns - anchor.boot_ns
    if abs((unix_ns - anchor.unix_ns) - span_ns) > CLOCK_STEP_MS * NS_PER_MS:
        flags.append("clock_stepped")
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
        energy_counter_mj=sample.energy_mj,
        sm_clock_khz=None if dark else sample.sm_clock_khz,
        absent=absent,
        flags=tuple(sorted(set(flags))),
    )


def _cycles_between(
    anchor: Anchor, sample: GpuSample, absent: dict[str, str], flags: list[str], *, dark: bool
) -> tuple[Tier, dict[str, int], bool]:
    """Tier, micro-cycles by field, and whether they are derived rather than counted."""
    if sample.tier == "gpm_cycles" and sample.cycles is not None and anchor.cycles is not None:
        counted = _counted(anchor.cycles, sample.cycles, absent)
        if counted is not None:
            return "gpm_cycles", counted, False
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
    return "none", {}, False


def _counted(before: Cycles, now: Cycles, absent: dict[str, str]) -> dict[str, int] | None:
    """Counted micro-cycles by field; None when a counter restarted."""
    micro: dict[str, int] = {}
    for name in CYCLE_FIELDS:
        earlier: int | None = getattr(before, name)
        later: int | None = getattr(now, name)
        if earlier is None or later is None:
            absent.setdefault(f"cycles.{name}", "not_readable_at_both_ends")
            continue
        delta = counter_delta(earlier, later)
        if delta.restarted:
            return None
        micro[name] = delta.amount * MICRO
    return micro


def _energy_between(
    anchor: Anchor, sample: GpuSample, absent: dict[str, str], flags: list[str]
) -> int | None:
    if sample.energy_mj is None or anchor.energy_mj is None:
        absent.setdefault("energy", "not_readable_at_both_ends")
        return None
    delta = counter_delta(anchor.energy_mj, sample.energy_mj)
    if delta.restarted:
        flags.append("counter_reset")
        absent["energy"] = "counter_restarted"
        return None
    return delta.amount


# --- windows ---------------------------------------------------------------------------------


def _fits(window: Window, piece: Slice) -> bool:
    return (
        window.first.shape == piece.shape
        and same_owners(window.first.claims, piece.claims)
        and "recovered" not in piece.flags
        and "clock_stepped" not in piece.flags
    )


def _extended(window: Window | None, piece: Slice) -> Window:
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


def _records(window: Window) -> list[Closed]:
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


def _wall_gap(anchor: Anchor, now_unix_ns: int, reason: str) -> Closed:
    """Dark time between two boots: only wall time can say how long it was."""
    start_ms = anchor.unix_ns // NS_PER_MS
    gap_ms = now_unix_ns // NS_PER_MS - start_ms
    return Closed(
        record=GapRecord(
            device=anchor.device,
            start_unix_ms=start_ms,
            start_boot_ms=None,
            gap_ms=max(0, gap_ms),
            owner=UNATTRIBUTED_OWNER,
            attribution=Attribution(source="none", evidence=UNKNOWN_CLAIM.evidence),
            precision=None,
            reason=reason,
            flags=("clock_stepped",) if gap_ms < 0 else (),
            user_commitment=None,
        ),
        user=None,
    )


def _given_up(device: DeviceState, node: NodeSample, closed: list[Closed]) -> DeviceState:
    """A device that has been dark for an hour: the time so far is a gap, whatever comes later.

    Its counters are let go with it, so that what they bridge later is not counted twice.
    """
    anchor = device.anchor
    closed.extend([] if device.window is None else _records(device.window))
    reasons = {failure.device.key: failure.reason for failure in node.failures}
    start_ms = anchor.boot_ns // NS_PER_MS
    closed.append(
        Closed(
            record=GapRecord(
                device=anchor.device,
                start_unix_ms=anchor.unix_ns // NS_PER_MS,
                start_boot_ms=start_ms,
                gap_ms=node.boot_ns // NS_PER_MS - start_ms,
                owner=UNATTRIBUTED_OWNER,
                attribution=Attribution(source="none", evidence=UNKNOWN_CLAIM.evidence),
                precision=None,
                reason=reasons.get(anchor.device.key) or node.failure or "not_seen",
                flags=(),
                user_commitment=None,
            ),
            user=None,
        )
    )
    return DeviceState(
        anchor=Anchor(
            device=anchor.device,
            boot_ns=node.boot_ns,
            unix_ns=node.unix_ns,
            cycles=None,
            energy_mj=None,
            watched=False,
        ),
        window=None,
    )


def _claim_order(claim: Claim) -> tuple[str, ...]:
    owner = claim.owner
    parts = (owner.kind, owner.project, owner.model, owner.run, owner.attempt, owner.job)
    return tuple(part or "" for part in (*parts, owner.activity, claim.precision, claim.user))


def records_of(closed: Iterable[Closed]) -> list[AgentRecord]:
    """Just the records."""
    return [item.record for item in closed]
