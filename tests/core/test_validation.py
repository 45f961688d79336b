"""What no honest device could report is found, and what an honest one reports is not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flopledger_core.accelerators import load_table
from flopledger_core.batch import decode
from flopledger_core.flop import estimate
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    Attribution,
    Cycles,
    Device,
    GapRecord,
    HostRecord,
    Record,
    Slices,
    UsageRecord,
)
from flopledger_core.validation import CHECKS, NOTED_CODES, findings
from tests.core.sealed import ELAPSED, H100, MINUTE_MS, sealed, usage

TABLE = load_table()


def codes(*records: Record, **header: Any) -> list[str]:
    """The codes of a batch's findings."""
    return [finding.code for finding in findings(decode(sealed(list(records), **header)), TABLE)]


def shared(record: UsageRecord, gpu_time_ms: int) -> UsageRecord:
    """The record with another share of its window."""
    return msgspec.structs.replace(record, gpu_time_ms=gpu_time_ms)


def test_an_honest_minute_has_no_findings() -> None:
    """The passing fixture of every check."""
    assert codes(usage()) == []


def active_above_elapsed() -> list[Record]:
    """A pipe busier than the clock."""
    cycles = msgspec.structs.replace(usage().cycles, fp32=ELAPSED + 1)
    return [usage(cycles=cycles)]


def elapsed_above_clock() -> list[Record]:
    """More cycles than the highest clock gives."""
    cycles = msgspec.structs.replace(usage().cycles, elapsed=ELAPSED * 2)
    return [usage(cycles=cycles)]


def energy_above_power() -> list[Record]:
    """A kilowatt and a half from a 700 W part."""
    return [usage(energy_mj=1_500 * 60_000)]


def shares_that_do_not_tile() -> list[Record]:
    """Two tenants who were each charged the whole minute."""
    return [shared(usage(), 60_000), shared(usage(), 60_000)]


def overlapping_windows() -> list[Record]:
    """The same half minute twice."""
    first = usage(end_boot_ms=40_000, gpu_time_ms=35_000)
    second = usage(start_boot_ms=30_000, gpu_time_ms=35_000)
    return [first, second]


def gap_over_usage() -> list[Record]:
    """A window that was metered and dark at once."""
    gap = GapRecord(
        device=H100, start_unix_ms=1_764_000_010_000, start_boot_ms=15_000, gap_ms=1_000,
        owner=UNATTRIBUTED_OWNER, attribution=Attribution(source="none"), precision=None,
        reason="timeout", flags=(), user_commitment=None,
    )  # fmt: skip
    return [usage(), gap]


def cycles_in_no_time() -> list[Record]:
    """A window without length that claims work."""
    return [usage(end_boot_ms=5_000, gpu_time_ms=0, wall_time_ms=0)]


def instance(first: int, count: int, sm_count: int | None, number: int | None) -> Device:
    """One part of an H100 in seven slices."""
    slices = Slices(first_index=first, count=count, of_count=7, sms_of=132)
    return msgspec.structs.replace(H100, gpu_instance=number, sm_count=sm_count, slices=slices)


def part(device: Device, **changes: Any) -> UsageRecord:
    """A minute of one part, its time and energy cut at absolute boundaries."""
    slices = device.slices
    assert slices is not None
    start, end = changes.pop("start", 5_000), changes.pop("end", 65_000)
    share = (device.sm_count or 0) * ELAPSED // 132 * (end - start) // MINUTE_MS
    fields: dict[str, Any] = {
        "device": device, "start_boot_ms": start, "end_boot_ms": end,
        "gpu_time_ms": slices.part(end) - slices.part(start), "flags": ("apportioned",),
        "cycles": Cycles(elapsed=share), "wall_time_ms": end - start,
        "energy_mj": slices.part(600 * end) - slices.part(600 * start),
    }  # fmt: skip
    return usage(**(fields | changes))


def host(**changes: Any) -> HostRecord:
    """A minute of a host with 64 CPUs, all of it one owner's."""
    fields: dict[str, Any] = {
        "start_unix_ms": 1_764_000_000_000, "start_boot_ms": 5_000, "window_ms": MINUTE_MS,
        "owner": UNATTRIBUTED_OWNER, "attribution": Attribution(source="none"), "cpu_count": 64,
        "cpu_time_ms": 64 * MINUTE_MS, "energy_mj": {"cpu_package": 400 * MINUTE_MS},
        "energy_sources": {"cpu_package": "rapl"}, "absent": {"flop": "cpu_flop_not_counted"},
        "flags": (), "user_commitment": None,
    }  # fmt: skip
    return HostRecord(**(fields | changes))


def estimated(**changes: Any) -> UsageRecord:
    """A record with its own first estimate, or with parts of it replaced."""
    first = estimate(usage(), TABLE)
    assert first is not None
    return usage(estimate=msgspec.structs.replace(first, **changes))


STRANGER = Device(uuid="GPU-1", name="NVIDIA X1", compute_capability="9.0")
SMALL = instance(0, 1, 16, 1)


def test_honest_parts_of_a_gpu_have_no_findings() -> None:
    """Instances and unconfigured slices, each with windows of its own, tile the GPU's time."""
    rest = instance(4, 3, None, None)
    records = [
        part(instance(0, 1, 16, 1), start=5_003, end=31_001),
        part(instance(0, 1, 16, 1), start=31_001, end=65_002),
        part(instance(1, 3, 60, 2)),
        part(rest, tier="none", cycles=Cycles(), cycles_origin="absent", energy_mj=None,
             energy_origin="absent", absent={"cycles": "slices_not_configured"}),
    ]  # fmt: skip

    assert codes(*records) == []


def test_sharers_of_an_instance_tile_its_part() -> None:
    """Two owners of one instance hold its share of the window between them."""
    shares = Attribution(source="tag", sharers=2, weight=1, weights=2)
    whole = part(SMALL)
    times_ms = [whole.gpu_time_ms // 2, whole.gpu_time_ms - whole.gpu_time_ms // 2]
    half = Cycles(elapsed=(whole.cycles.elapsed or 0) // 2)
    energy_mj = (whole.energy_mj or 0) // 2
    owners = [
        part(SMALL, gpu_time_ms=own, attribution=shares, cycles=half, energy_mj=energy_mj)
        for own in times_ms
    ]

    assert codes(*owners) == []


def test_honest_hosts_have_no_findings() -> None:
    """Owners of a node hold all its CPU time; unread CPU time is no contradiction."""
    idle = host(cpu_time_ms=63 * MINUTE_MS, energy_mj={}, energy_sources={})
    busy = host(cpu_time_ms=MINUTE_MS)

    assert codes(idle, busy) == []
    assert codes(host(cpu_time_ms=None)) == []


def test_an_honest_estimate_has_no_findings() -> None:
    """Ours, and one of another version, which can only be shown."""
    assert codes(estimated()) == []
    assert codes(estimated(table_version="1999-01-01", flop_central="7", flop_low="0")) == []
    assert codes(estimated(model_version="0", flop_central="7", flop_low="0")) == []


def test_a_wrong_estimate_disputes_no_counter() -> None:
    """It is noted: the record's own cycles stay as good as they were."""
    wrong = codes(estimated(flop_central="7", flop_low="0"))

    assert wrong == ["estimate_differs"]
    assert set(wrong) <= NOTED_CODES


def test_an_estimate_of_a_device_without_flop_is_noted() -> None:
    """Nothing here gives FLOP to a device of no known architecture."""
    nameless = Device(uuid="GPU-1", name="NVIDIA X1")

    assert codes(msgspec.structs.replace(estimated(), device=nameless)) == ["estimate_differs"]


def test_counters_past_a_doubles_reach_may_disagree_by_what_they_say() -> None:
    """A pipe a little above elapsed is honest where the record says so, and only there."""
    found = msgspec.structs.replace(usage().cycles, fp32=ELAPSED + 8)

    assert codes(usage(cycles=found, uncertain_cycles=4)) == []
    assert codes(usage(cycles=found, uncertain_cycles=3)) == ["active_exceeds_elapsed"]


def test_module_energy_is_held_against_the_modules_limit() -> None:
    """A GH200 module may draw a kilowatt, and no more."""
    gh200 = Device(uuid="GPU-1", name="NVIDIA GH200 480GB", sm_count=132)
    drawn = usage(device=gh200, energy_scope="module", energy_mj=1_000 * MINUTE_MS)

    assert codes(drawn) == []
    assert "energy_exceeds_power" in codes(
        msgspec.structs.replace(drawn, energy_mj=1_300 * MINUTE_MS)
    )


@pytest.mark.parametrize(
    ("code", "records", "header"),
    [
        ("wrong_author", [usage()], {"author": "collector"}),
        ("active_exceeds_elapsed", active_above_elapsed(), {}),
        ("elapsed_exceeds_clock", elapsed_above_clock(), {}),
        ("energy_exceeds_power", energy_above_power(), {}),
        ("gpu_time_does_not_tile", shares_that_do_not_tile(), {}),
        ("windows_overlap", overlapping_windows(), {}),
        ("windows_overlap", gap_over_usage(), {}),
        ("elapsed_exceeds_clock", cycles_in_no_time(), {}),
        ("energy_exceeds_power", cycles_in_no_time(), {}),
        ("time_exceeds_window", [usage(wall_time_ms=2**62)], {}),
        ("gpu_time_does_not_tile", [part(SMALL, gpu_time_ms=MINUTE_MS)], {}),
        ("elapsed_exceeds_clock", [part(SMALL, cycles=Cycles(elapsed=ELAPSED))], {}),
        ("energy_exceeds_power", [part(SMALL, energy_mj=600 * MINUTE_MS)], {}),
        ("elapsed_exceeds_clock", [usage(device=STRANGER, cycles=Cycles(elapsed=ELAPSED * 2))], {}),
        ("energy_exceeds_power", [usage(device=STRANGER, energy_mj=1_500 * MINUTE_MS)], {}),
        ("cpu_time_does_not_tile", [host(cpu_time_ms=63 * MINUTE_MS)], {}),
        ("cpu_time_does_not_tile", [host(), host(cpu_count=32, cpu_time_ms=0)], {}),
        ("host_energy_exceeds_power", [host(energy_mj={"cpu_package": 2**50})], {}),
        ("windows_overlap", [host(), host(start_boot_ms=6_000)], {}),
        ("estimate_differs", [estimated(flop_high=None)], {}),
    ],
)
def test_each_check_has_a_failing_fixture(
    code: str, records: list[Record], header: dict[str, Any]
) -> None:
    """Every check in the list can fail, by its own code."""
    assert code in codes(*records, **header)


def test_every_check_is_in_the_matrix_above() -> None:
    """A new check needs a failing fixture of its own."""
    assert len(CHECKS) == 10
