"""A GPU divided anew: old devices end and new ones begin at one instant, whatever the source."""

from __future__ import annotations

import msgspec
import pytest

from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_agent.layouts import relaid
from flopledger_agent.metering import empty_state, halt, observe
from flopledger_agent.windows import Anchor
from flopledger_core.records import Device, GapRecord, Slices, UsageRecord
from tests.agent.sampling import BOOT_NS, GPU, SECOND_NS, UNIX_NS, claim, cycles, node, sample


def part(first: int, count: int, gpu_instance: int | None = None) -> Device:
    """A part of a GPU of 7 slices."""
    slices = Slices(first_index=first, count=count, of_count=7, sms_of=132)
    return msgspec.structs.replace(
        GPU, gpu_instance=gpu_instance, slices=slices, sm_count=16 * count
    )


def reading(at_ns: int, device: Device, elapsed: int = 0, energy_mj: int = 0) -> GpuSample:
    """One reading of a part, its energy cut from the GPU's counter."""
    read = sample(at_ns, cycles(elapsed), energy_mj, device)
    own = energy_mj if device.slices is None else device.slices.part(energy_mj)
    return msgspec.structs.replace(read, energy_mj=own, energy_counter_mj=energy_mj)


def anchor(at_ns: int, device: Device, **more: object) -> Anchor:
    """A part's last reading."""
    base = Anchor(
        device=device, boot_ns=BOOT_NS + at_ns, unix_ns=UNIX_NS + at_ns, cycles=cycles(100),
        energy_mj=1, energy_counter_mj=7_000,
    )  # fmt: skip
    return msgspec.structs.replace(base, **more)


LEFT, RIGHT, WHOLE = part(0, 3, 1), part(3, 4, 2), part(0, 7, 5)


def change_of(tick: NodeSample, *anchors: Anchor) -> tuple[list[str], dict[str, Anchor], int]:
    """Ended keys, what begins by key, and milliseconds of gaps."""
    change = relaid(tick, {each.device.key: each for each in anchors})
    begun = {each.device.key: each for each in change.begun}
    gaps = sum(each.record.gap_ms for each in change.gaps if isinstance(each.record, GapRecord))
    return sorted(change.ended), begun, gaps


def test_new_parts_begin_where_the_old_ones_ended() -> None:
    """Time, the raw energy counter and whether anybody watched go over; cycles do not."""
    tick = node(9 * SECOND_NS, reading(9 * SECOND_NS, WHOLE))
    ended, begun, gaps = change_of(tick, anchor(5, LEFT), anchor(5, RIGHT, watched=False))

    assert (ended, gaps) == (["GPU-1/1", "GPU-1/2"], 0)
    assert begun["GPU-1/5"].boot_ns == BOOT_NS + 5
    assert (begun["GPU-1/5"].energy_mj, begun["GPU-1/5"].energy_counter_mj) == (7_000, 7_000)
    assert begun["GPU-1/5"].cycles is None
    assert not begun["GPU-1/5"].watched


def test_a_part_that_ended_earlier_leaves_a_gap() -> None:
    """Time between an old part's end and the new layout's begin is stated, not lost."""
    tick = node(9 * SECOND_NS, reading(9 * SECOND_NS, WHOLE))
    _, begun, gaps = change_of(tick, anchor(SECOND_NS, LEFT), anchor(4 * SECOND_NS, RIGHT))

    assert gaps == 3_000
    assert begun["GPU-1/5"].boot_ns == BOOT_NS + 4 * SECOND_NS


def test_the_same_layout_changes_nothing() -> None:
    """Parts that are there again, and parts that failed this time, stay as they are."""
    failed = DeviceFailure(device=RIGHT, reason="timeout")
    tick = node(9 * SECOND_NS, reading(9 * SECOND_NS, LEFT), failures=(failed,))
    assert change_of(tick, anchor(5, LEFT), anchor(5, RIGHT)) == ([], {}, 0)
    assert change_of(node(9), anchor(5, LEFT), anchor(5, GPU)) == ([], {}, 0)


def test_a_moved_instance_goes_on_counting() -> None:
    """The same instance at other slices keeps its cycles; one of another size does not."""
    moved, grown = part(0, 4, 2), part(0, 5, 2)
    for device, kept in ((moved, cycles(100)), (grown, None)):
        tick = node(9 * SECOND_NS, reading(9 * SECOND_NS, device))
        ended, begun, _ = change_of(tick, anchor(5, LEFT), anchor(5, RIGHT))
        assert ended == ["GPU-1/1", "GPU-1/2"]
        assert begun["GPU-1/2"].cycles == kept


def test_retired_devices_end_without_a_successor() -> None:
    """A GPU declared gone is no longer expected, and nothing begins in its place."""
    tick = msgspec.structs.replace(node(9), retired=("GPU-1/1",))
    assert change_of(tick, anchor(5, LEFT)) == (["GPU-1/1"], {}, 0)


def test_boot_time_that_went_back_is_a_gap_by_wall_time() -> None:
    """Nothing begins in the future."""
    tick = node(SECOND_NS, reading(SECOND_NS, WHOLE))
    ended, begun, gaps = change_of(tick, anchor(9 * SECOND_NS, LEFT))
    assert (ended, begun, gaps) == (["GPU-1/1"], {}, 0)


@pytest.mark.parametrize("paused", [True, False])
def test_a_layout_changed_in_a_pause_bridges_nothing(*, paused: bool) -> None:
    """The pause stays a gap under the new layout; without one its energy is bridged."""
    claims = {device.key: (claim(),) for device in (LEFT, RIGHT, WHOLE)}
    state = empty_state("boot")
    first = node(0, reading(0, LEFT), reading(0, RIGHT))
    state, _ = observe(state, first, claims, tick_ns=SECOND_NS)
    if paused:
        state = halt(state, "paused")
    for second in (2, 3):
        at_ns = second * SECOND_NS
        tick = node(at_ns, reading(at_ns, WHOLE, second, 700 * second))
        state, pieces = observe(state, tick, claims, tick_ns=SECOND_NS)
        energies = [piece.energy_mj for piece in pieces]
        assert energies == ([None] if paused and second == 2 else [1400 if second == 2 else 700])


def test_records_of_a_new_layout_tile_the_time() -> None:
    """Seven parts over odd milliseconds: their device time sums to the wall time, exactly."""
    parts = [part(index, 1, index) for index in range(7)]
    claims = {device.key: (claim(),) for device in (GPU, *parts)}
    state = empty_state("boot")
    layouts = {0: [GPU], 997: [GPU], 1_999: parts, 3_331: parts, 4_447: [GPU], 5_003: [GPU]}
    for at_ms, devices in layouts.items():
        at_ns = at_ms * 10**6
        tick = node(at_ns, *(reading(at_ns, device, at_ms, 3 * at_ms) for device in devices))
        state, _ = observe(state, tick, claims, tick_ns=SECOND_NS)
    last = state.devices["GPU-1"].window
    assert last is not None
    usage = [item.record for item in state.closed if isinstance(item.record, UsageRecord)]

    assert sum(record.gpu_time_ms for record in usage) == last.first.start_boot_ns // 10**6 - (
        BOOT_NS // 10**6
    )
    assert sum(record.energy_mj or 0 for record in usage) + (last.energy_mj or 0) == 3 * 5_003
    assert {record.wall_time_ms for record in usage if record.device.slices} == {1_002, 1_332}
