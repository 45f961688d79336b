"""Metering: two samples and the owners between them become usage records. Pure.

Each tick turns the time since a device's previous sample into one slice; slices add up in windows
(`windows.py`), which close at UTC minutes and whenever owners, tier or readability change. A
device's windows follow each other without a hole from its first sample to its last. A counter that
restarted, or time too long to bridge, becomes an absent quantity or a gap, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.windows import (
    MICRO,
    UNKNOWN_CLAIM,
    Anchor,
    Closed,
    Slice,
    Window,
    boot_gap,
    extended,
    fits,
    wall_gap,
    window_records,
)
from flopledger_core.energy import counter_delta
from flopledger_core.records import CYCLE_FIELDS, AgentRecord, Cycles, Tier
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.gpus.interface import GpuSample, NodeSample

CLOCK_STEP_MS: Final = 500  # wall time that moved this far against boot time has stepped
DARK_TICKS: Final = 5  # a device unseen for longer than this many ticks was dark, not late
GAP_AFTER_NS: Final = 3_600_000_000_000  # after an hour dark time is stated, not waited for
UNKNOWN_BOOT: Final = "unknown"  # what the node says where the kernel has no boot id
WINDOW_MINUTES: Final = (1, 10, 60)  # how wide windows get as the spool fills


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device: its last reading and, if slices came since the last close, its window."""

    anchor: Anchor
    window: Window | None


class MeterState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything metering remembers; it is persisted at every tick."""

    boot_id: str
    devices: dict[str, DeviceState]
    closed: tuple[Closed, ...]  # records of windows that closed and are not sealed yet


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
        wall_gap(device.anchor, now_unix_ns, "node_restarted") for device in state.devices.values()
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
                closed.extend([] if known.window is None else window_records(known.window))
                closed.append(wall_gap(known.anchor, unix_ns, "boot_time_went_back"))
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
        if window is not None and not fits(window, piece):
            closed.extend(window_records(window))
            window = None
        devices[key] = DeviceState(anchor=anchor, window=extended(window, piece))
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
            closed.extend(window_records(device.window))
        devices[key] = DeviceState(anchor=device.anchor, window=None)
    return MeterState(boot_id=state.boot_id, devices=devices, closed=tuple(closed))


def is_due(state: MeterState, now_unix_ns: int, window_minutes: int) -> bool:
    """True when the minute (or wider period) in which open windows began is over."""
    now = now_unix_ns // NS_PER_MS // MS_PER_MINUTE // window_minutes
    return any(
        device.window is not None and device.window.minute // window_minutes != now
        for device in state.devices.values()
    ) or (bool(state.closed) and not any(device.window for device in state.devices.values()))


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


def _given_up(device: DeviceState, node: NodeSample, closed: list[Closed]) -> DeviceState:
    """A device that has been dark for an hour: the time so far is a gap, whatever comes later.

    Its counters are let go with it, so that what they bridge later is not counted twice.
    """
    anchor = device.anchor
    closed.extend([] if device.window is None else window_records(device.window))
    reasons = {failure.device.key: failure.reason for failure in node.failures}
    reason = reasons.get(anchor.device.key) or node.failure or "not_seen"
    closed.append(boot_gap(anchor, node.boot_ns, reason))
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


def records_of(closed: Iterable[Closed]) -> list[AgentRecord]:
    """Just the records."""
    return [item.record for item in closed]
