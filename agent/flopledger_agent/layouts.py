"""A GPU that is divided anew (MIG): which devices end, which begin, and where. Pure.

The parts that end do so at their last sample, and the parts that follow begin right there: no time
and no energy falls between them or is counted for both. What the first reading of a new part covers
is therefore the time since the old parts' last one. Cycle counters go on only where the same GPU
instance merely lies elsewhere. Nothing is asked of the source but samples: so a layout that changed
while the agent was away is found all the same.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.windows import Anchor, Closed, boot_gap, wall_gap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_agent.gpus.interface import NodeSample
    from flopledger_core.records import Device

LAYOUT_CHANGED: Final = "layout_changed"
WENT_BACK: Final = "boot_time_went_back"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the devices of every GPU whose layout is another one now."""

    ended: tuple[str, ...] = ()  # keys; their windows close
    begun: tuple[Anchor, ...] = ()  # in their place, some under a key that ended
    gaps: tuple[Closed, ...] = ()  # time of an ended part that no new one covers


def relaid(node: NodeSample, anchors: Mapping[str, Anchor]) -> Change:
    """The changes that a tick shows against the devices known until now."""
    failed = {failure.device.key for failure in node.failures} - set(node.retired)
    now: dict[str, dict[str, Device]] = defaultdict(dict)
    for sample in node.samples:
        now[sample.device.uuid][sample.device.key] = sample.device
    boots = {sample.device.uuid: sample.boot_ns for sample in node.samples}
    ended: dict[str, list[Anchor]] = defaultdict(list)
    for key, anchor in anchors.items():
        parts = now.get(anchor.device.uuid)
        there = None if parts is None else parts.get(key)
        if there is None:
            gone = key in node.retired or (parts is not None and key not in failed)
        else:
            gone = there.slices != anchor.device.slices
        if gone:
            ended[anchor.device.uuid].append(anchor)
    begun: list[Anchor] = []
    gaps: list[Closed] = []
    for uuid, last in ended.items():
        reached = max(last, key=lambda anchor: anchor.boot_ns)
        if uuid in boots and boots[uuid] < reached.boot_ns:
            unix_ns = max(0, boots[uuid] + node.unix_ns - node.boot_ns)
            gaps += [wall_gap(anchor, unix_ns, WENT_BACK) for anchor in last]
            continue
        gaps += [
            boot_gap(anchor, reached.boot_ns, LAYOUT_CHANGED)
            for anchor in last
            if anchor.boot_ns < reached.boot_ns
        ]
        before = {anchor.device.key: anchor for anchor in last}
        begun += [
            _begin(device, reached, before.get(key), watched=all(item.watched for item in last))
            for key, device in now[uuid].items()
            if key in before or key not in anchors
        ]
    return Change(
        ended=tuple(anchor.device.key for last in ended.values() for anchor in last),
        begun=tuple(begun),
        gaps=tuple(gaps),
    )


def _begin(device: Device, reached: Anchor, own: Anchor | None, *, watched: bool) -> Anchor:
    """Where a device begins: at the last reading of what was in its place."""
    counter_mj = counter_of(reached)
    anchor = Anchor(
        device=device,
        boot_ns=reached.boot_ns,
        unix_ns=reached.unix_ns,
        cycles=None,
        energy_mj=None if counter_mj is None else part(device, counter_mj),
        energy_counter_mj=counter_mj,
        watched=watched,
        power_mw=reached.power_mw,
        sm_clock_khz=reached.sm_clock_khz,
        halted=reached.halted,
        frozen=tuple(name for name in reached.frozen if name == "energy"),
        flags=reached.flags,
    )
    if own is None or own.boot_ns != reached.boot_ns or not _goes_on(own.device, device):
        return anchor
    return msgspec.structs.replace(
        anchor,
        cycles=own.cycles,
        cycles_tier=own.cycles_tier,
        uncertain_cycles=own.uncertain_cycles,
        processes=own.processes,
        claims=own.claims,
        frozen=own.frozen,
        flags=own.flags,
    )


def _goes_on(before: Device, now: Device) -> bool:
    """Whether it is the same GPU instance, at another place: its own counters count on."""
    if before.gpu_instance is None or before.slices is None or now.slices is None:
        return False
    return (before.slices.count, before.sm_count) == (now.slices.count, now.sm_count)


def counter_of(anchor: Anchor) -> int | None:
    """The GPU's own energy counter at a reading."""
    if anchor.energy_counter_mj is not None:
        return anchor.energy_counter_mj
    return anchor.energy_mj if anchor.device.slices is None else None


def part(device: Device, whole: int) -> int:
    """A device's part of a cumulative whole of its GPU."""
    return whole if device.slices is None else device.slices.part(whole)
