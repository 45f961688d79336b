"""Metering: two samples and the owners between them become usage records. Pure.

Each tick turns the time since a device's previous sample into one slice; slices add up in windows
(`windows.py`), which close at UTC minutes and whenever owners, tier or readability change. A
device's windows follow each other without a hole from its first sample to its last. A counter that
restarted, or time too long to bridge, becomes an absent quantity or a gap, never a zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.layouts import relaid
from flopledger_agent.slices import (
    counting_tier,
    halted_slice,
    holders,
    reported,
    slice_between,
    standing_still,
    without_a_face,
)
from flopledger_agent.windows import (
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
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.gpus.interface import GpuSample, NodeSample
    from flopledger_core.records import AgentRecord, Device

DARK_TICKS: Final = 5  # a device unseen for longer than this many ticks was dark, not late
GAP_AFTER_NS: Final = 3_600_000_000_000  # after an hour dark time is stated, not waited for
PAUSED: Final = "paused"  # the reason of time in which somebody stopped the metering
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
    dark time becomes a gap. It stays expected: from here on it is dark until it is sampled, however
    late that is. A boot without an id, or whose time went back, is another boot.
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
    devices = {
        key: DeviceState(
            anchor=_unread(device.anchor.device, now_boot_ns, now_unix_ns), window=None
        )
        for key, device in state.devices.items()
    }
    return MeterState(boot_id=boot_id, devices=devices, closed=(*state.closed, *gaps))


def observe(
    state: MeterState,
    node: NodeSample,
    claims: Mapping[str, tuple[Claim, ...]],
    *,
    tick_ns: int,
    ended: frozenset[int] = frozenset(),
) -> tuple[MeterState, tuple[Slice, ...]]:
    """Fold one tick into the state; also returns its slices, for the metrics page.

    `claims` are the owners seen in this tick by device key, `ended` the processes whose exit was
    told by then; whose a slice is, `slices.py` says.
    """
    devices = dict(state.devices)
    closed = list(state.closed)
    slices: list[Slice] = []
    _relay(node, devices, closed)
    for sample in node.samples:
        key = sample.device.key
        unix_ns = max(0, sample.boot_ns + node.unix_ns - node.boot_ns)
        known = devices.get(key)
        anchor = _anchor(sample, unix_ns, claims[key])
        if known is None:
            devices[key] = DeviceState(anchor=anchor, window=None)
            continue
        if sample.boot_ns < known.anchor.boot_ns:
            closed.extend([] if known.window is None else window_records(known.window))
            closed.append(wall_gap(known.anchor, unix_ns, "boot_time_went_back"))
            devices[key] = DeviceState(anchor=anchor, window=None)
            continue
        if sample.boot_ns == known.anchor.boot_ns:  # no time has passed: the next will cover it
            devices[key] = _carrying(known, reported(sample))
            continue
        if known.anchor.halted is not None:
            piece = halted_slice(known.anchor, sample.boot_ns, unix_ns, known.anchor.halted)
        else:
            dark = not known.anchor.watched or (
                sample.boot_ns - known.anchor.boot_ns > DARK_TICKS * tick_ns
            )
            frozen = standing_still(known.anchor, sample, dark=dark)
            whose = holders(known.anchor, sample, claims[key], ended, dark=dark)
            piece = without_a_face(
                slice_between(known.anchor, sample, whose, unix_ns, dark=dark, frozen=frozen)
            )
            anchor = msgspec.structs.replace(anchor, frozen=frozen)
        slices.append(piece)
        devices[key] = _extended(known.window, piece, anchor, closed)
    _go_on_without(node, devices, closed, slices)
    return MeterState(boot_id=state.boot_id, devices=devices, closed=tuple(closed)), tuple(slices)


def halt(state: MeterState, reason: str) -> MeterState:
    """Counting stops here on purpose: the time up to each device's next sample is a gap.

    Nothing bridges it, whatever the counters say afterwards: the gap is the evidence. It belongs
    to whoever held the device alone at the last reading, else to nobody.
    """
    devices = {
        key: DeviceState(
            anchor=msgspec.structs.replace(
                device.anchor,
                cycles=None,
                energy_mj=None,
                energy_counter_mj=None,
                power_mw=None,
                halted=reason,
                frozen=(),
            ),
            window=device.window,
        )
        for key, device in state.devices.items()
    }
    return msgspec.structs.replace(state, devices=devices)


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


# --- devices ---------------------------------------------------------------------------------


def _relay(node: NodeSample, devices: dict[str, DeviceState], closed: list[Closed]) -> None:
    """Where a GPU was divided anew, its old devices end and the new ones begin there."""
    change = relaid(node, {key: device.anchor for key, device in devices.items()})
    for key in change.ended:
        window = devices.pop(key).window
        closed.extend([] if window is None else window_records(window))
    closed.extend(change.gaps)
    for anchor in change.begun:
        devices[anchor.device.key] = DeviceState(anchor=anchor, window=None)


def _anchor(sample: GpuSample, unix_ns: int, claims: tuple[Claim, ...]) -> Anchor:
    return Anchor(
        device=sample.device,
        boot_ns=sample.boot_ns,
        unix_ns=unix_ns,
        cycles=sample.cycles,
        energy_mj=sample.energy_mj,
        energy_counter_mj=sample.energy_counter_mj,
        cycles_tier=counting_tier(sample),
        power_mw=sample.power_mw,
        sm_clock_khz=sample.sm_clock_khz,
        uncertain_cycles=sample.uncertain_cycles,
        processes=sample.processes,
        claims=claims,
    )


def _extended(
    window: Window | None, piece: Slice, anchor: Anchor, closed: list[Closed]
) -> DeviceState:
    """The device after one more slice; a window that it does not fit is closed."""
    if window is not None and not fits(window, piece):
        closed.extend(window_records(window))
        window = None
    return DeviceState(anchor=anchor, window=extended(window, piece))


def _carrying(device: DeviceState, flags: tuple[str, ...]) -> DeviceState:
    """The device with flags that its next slice will have."""
    if not flags:
        return device
    carried = tuple(sorted({*device.anchor.flags, *flags}))
    anchor = msgspec.structs.replace(device.anchor, flags=carried)
    return DeviceState(anchor=anchor, window=device.window)


def _go_on_without(
    node: NodeSample,
    devices: dict[str, DeviceState],
    closed: list[Closed],
    slices: list[Slice],
) -> None:
    """What becomes of devices without a sample: halted time is told as it passes, dark time waits.

    A device that is first met while metering is paused begins with the pause.
    """
    sampled = {sample.device.key for sample in node.samples}
    reasons: dict[str, str] = {}
    for failure in node.failures:
        key = failure.device.key
        reasons[key] = failure.reason
        if key in devices:
            devices[key] = _carrying(devices[key], reported(failure))
    for key, device in list(devices.items()):
        anchor = device.anchor
        if key in sampled or node.boot_ns <= anchor.boot_ns:
            continue
        reason = reasons.get(key) or node.failure or "not_seen"
        if anchor.halted is not None:
            piece = halted_slice(anchor, node.boot_ns, node.unix_ns, reason)
            slices.append(piece)
            later = msgspec.structs.replace(
                anchor, boot_ns=node.boot_ns, unix_ns=node.unix_ns, flags=()
            )
            devices[key] = _extended(device.window, piece, later, closed)
        elif node.boot_ns - anchor.boot_ns > GAP_AFTER_NS:
            devices[key] = _given_up(device, node, reason, closed)
    for failure in node.failures:
        if failure.reason == PAUSED and failure.device.key not in devices:
            begun = _unread(failure.device, node.boot_ns, node.unix_ns)
            devices[failure.device.key] = DeviceState(
                anchor=msgspec.structs.replace(begun, halted=PAUSED), window=None
            )


def _unread(device: Device, boot_ns: int, unix_ns: int) -> Anchor:
    """From this instant on nobody has read anything of the device."""
    return Anchor(
        device=device,
        boot_ns=boot_ns,
        unix_ns=unix_ns,
        cycles=None,
        energy_mj=None,
        watched=False,
    )


def _given_up(
    device: DeviceState, node: NodeSample, reason: str, closed: list[Closed]
) -> DeviceState:
    """A device that has been dark for an hour: the time so far is a gap, whatever comes later.

    Its counters are let go with it, so that what they bridge later is not counted twice.
    """
    anchor = device.anchor
    closed.extend([] if device.window is None else window_records(device.window))
    closed.append(boot_gap(anchor, node.boot_ns, reason))
    return DeviceState(anchor=_unread(anchor.device, node.boot_ns, node.unix_ns), window=None)


def records_of(closed: Iterable[Closed]) -> list[AgentRecord]:
    """Just the records."""
    return [item.record for item in closed]
