"""What a record adds to a sum: no counter, share or slice is taken for more than it says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_core.accelerators import load_table
from flopledger_core.basis import basis, basis_of_cycles, tensor_cross_check
from flopledger_core.bounds import Bounds, exactly
from flopledger_core.energy import energy_bounds, host_energy_bounds
from flopledger_core.flop import Work, estimate, work
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    PIPES,
    Attribution,
    Cycles,
    Device,
    GapRecord,
    HostRecord,
    Record,
    Slices,
    UsageRecord,
)
from tests.core.sealed import ELAPSED, H100, MINUTE_MS, usage
from tests.core.usages import cycles, usages

TABLE = load_table()
ROW = TABLE.by_key("H100 SXM")
COUNTED = Cycles(elapsed=1000, sm_active=1000, any_tensor=600, hmma=300, imma=200, dmma=100,
                 dfma=0, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
THREE_OF_SEVEN = Slices(first_index=0, count=3, of_count=7, sms_of=132)
INSTANCE = msgspec.structs.replace(H100, gpu_instance=1, sm_count=60, slices=THREE_OF_SEVEN)


def work_of(record: Record, precision: str | None = "bf16") -> Work:
    """Work of one record on an H100."""
    return work(basis(record), table=TABLE, accelerator=ROW, device_name="", precision=precision)


def gap(device: Device, **changes: Any) -> GapRecord:
    """A dark minute of a device."""
    fields: dict[str, Any] = {
        "device": device, "start_unix_ms": 1_764_000_000_000, "start_boot_ms": 5_000,
        "gap_ms": MINUTE_MS, "owner": UNATTRIBUTED_OWNER, "attribution": Attribution(source="none"),
        "precision": None, "reason": "lost", "flags": (), "user_commitment": None,
    }  # fmt: skip
    return GapRecord(**(fields | changes))


# --- uncertain counters ----------------------------------------------------------------------


@given(cycles(absent=False), st.integers(0, 10**6), st.data())
def test_bounds_hold_when_every_counter_is_a_little_off(
    true: Cycles, uncertain: int, data: st.DataObject
) -> None:
    """Each counter may err by what the record says; the true FLOP stays within the bounds."""
    seen = {
        name: max(0, value + data.draw(st.integers(-uncertain, uncertain), label=name))
        for name, value in true.as_dict().items()
        if value is not None
    }
    truth = work_of(usage(cycles=true))
    found = work_of(usage(cycles=Cycles(**seen), uncertain_cycles=uncertain))
    for name in ("flop", "tensor_integer_operations", "integer_operations"):
        limits, amount = getattr(found, name), getattr(truth, name).central

        assert limits.low <= amount
        assert limits.high is None or amount <= limits.high


def test_each_counter_of_a_difference_may_be_off() -> None:
    """Any tensor, integer and FP64 all enter the float work: three times the uncertainty."""
    sums = basis(usage(cycles=COUNTED, uncertain_cycles=10))

    assert sums["float_tensor"] == 300
    assert sums["float_tensor_deficit"] == sums["float_tensor_excess"] == 30
    assert sums["fp64_tensor_deficit"] == sums["int_tensor_excess"] == sums["fp32_excess"] == 10


def test_one_of_two_fp64_counters_does_not_tell_for_both() -> None:
    """FP64 work that only the hidden counter saw is not claimed as sixteen times as many FLOP."""
    hidden = msgspec.structs.replace(COUNTED, any_tensor=600, hmma=0, imma=0, dmma=None, dfma=0)
    result = work_of(usage(cycles=hidden)).flop
    truth = 600 * 256

    assert result.low <= truth
    assert result.high is not None
    assert truth <= result.high


def test_exact_counters_widen_nothing() -> None:
    """Without uncertainty the FLOP of integer and FP64 work are exact to the cycle."""
    result = work_of(usage(cycles=COUNTED))

    assert result.tensor_integer_operations.central == result.tensor_integer_operations.high
    assert result.flop.high == result.flop.central == 300 * 4096 + 100 * 256


# --- scraped pipes ---------------------------------------------------------------------------


def test_scraped_gauges_say_little_of_the_time_between() -> None:
    """A gauge shows the exporter's last interval: central is its share, high is everything."""
    gauge = usage(tier="dcgm_pipes", cycles_origin="derived")
    result = work_of(gauge).flop
    dark = work_of(usage(tier="none", cycles=Cycles(), cycles_origin="absent")).flop

    assert (result.low, result.central) == (0, ELAPSED // 2 * 4096)
    assert result.high is not None
    assert dark.high is not None
    assert dark.high <= result.high <= dark.high * 1001 // 1000


def test_scraped_cycle_totals_are_counters() -> None:
    """The exporter's cycle totals count as the driver's own do."""
    scraped = usage(tier="dcgm_pipes", cycles_origin="measured")

    assert work_of(scraped) == work_of(usage())


# --- partitioned devices ---------------------------------------------------------------------


def test_a_dark_instance_could_have_used_its_own_sms_and_no_more() -> None:
    """An H100's 3g instance has 60 of 132 SMs: that much, not three sevenths nor the GPU."""
    dark = usage(device=INSTANCE, tier="none", cycles=Cycles(), cycles_origin="absent")
    sums = basis(dark)

    assert sums["cycles_possible_time_ms"] == -(-(MINUTE_MS + 1) * 60 // 132)
    high = work_of(dark).flop.high
    whole = work_of(gap(H100)).flop.high
    assert high is not None
    assert whole is not None
    assert whole * 60 // 132 <= high <= whole * 60 // 132 * 1001 // 1000


def test_unconfigured_slices_can_do_nothing() -> None:
    """Where no instance is, nothing runs: absent cycles with that reason are no possibility."""
    rest = msgspec.structs.replace(
        H100, sm_count=None, slices=Slices(first_index=3, count=4, of_count=7, sms_of=132)
    )
    unused = usage(device=rest, tier="none", cycles=Cycles(), cycles_origin="absent",
                   absent={"cycles": "slices_not_configured"})  # fmt: skip

    assert work_of(unused).flop == exactly(0)
    assert work_of(gap(rest, reason="slices_not_configured")).flop == exactly(0)
    assert work_of(msgspec.structs.replace(unused, flags=("recovered",))).flop.high != 0
    assert work_of(gap(rest)).flop.high != 0


def test_the_gaps_of_all_parts_make_the_gap_of_the_gpu() -> None:
    """Dark time of a partitioned GPU is stated once, by slices, whatever the parts' edges."""
    edges = [(0, 3), (3, 2), (5, 0), (5, 2)]
    parts = [
        msgspec.structs.replace(
            H100, slices=Slices(first_index=first, count=count, of_count=7, sms_of=132)
        )
        for first, count in edges
    ]
    for boot_ms in (5_003, None):
        sums = [basis(gap(part, start_boot_ms=boot_ms, gap_ms=59_999)) for part in parts]

        assert sum(part.get("gap_time_ms", 0) for part in sums) == 59_999
        assert all(part["energy_possible_time_ms"] == 60_100 for part in sums)


@given(
    st.integers(0, 10**15), st.integers(0, 10**9),
    st.tuples(st.integers(0, 7), st.integers(0, 7)), st.tuples(st.integers(1, 4),
                                                               st.integers(1, 4)),
)  # fmt: skip
def test_apportioned_energy_may_have_been_all_or_nothing(
    counter: int, whole: int, place: tuple[int, int], share: tuple[int, int]
) -> None:
    """Cut by slices and again by owners, the bounds still reach from none to the whole GPU's."""
    first, count = place[0], min(place[1], 7 - place[0])
    weight, weights = min(share), max(share)
    slices = Slices(first_index=first, count=count, of_count=7, sms_of=132)
    part = slices.part(counter + whole) - slices.part(counter)
    shared = usage(
        device=msgspec.structs.replace(INSTANCE, slices=slices),
        energy_mj=part * weight // weights, flags=("apportioned",),
        attribution=Attribution(source="tag", sharers=1 if weight == weights else 2,
                                weight=weight, weights=weights),
    )  # fmt: skip
    found = energy_bounds(basis(shared), ROW)

    assert found.high is not None
    if count < 7 or weight < weights:
        assert found.low == 0
        most = 700 * MINUTE_MS if count == 0 else whole
        assert found.high >= min(whole, most)
    else:
        assert found.central == whole


# --- sharers ---------------------------------------------------------------------------------


@given(cycles(), st.integers(1, 9), st.integers(1, 9))
def test_sharers_hold_the_devices_whole_work_between_them(
    found: Cycles, weight: int, others: int
) -> None:
    """Each owner's bounds reach from none to all that the device's counters could be."""
    weights = weight + others
    alone = work_of(usage(cycles=found)).flop
    split = Cycles(**{
        name: None if value is None else value * weight // weights
        for name, value in found.as_dict().items()
    })  # fmt: skip
    shared = usage(cycles=split, gpu_time_ms=MINUTE_MS * weight // weights,
                   attribution=Attribution(source="tag", sharers=2, weight=weight,
                                           weights=weights))  # fmt: skip
    result = work_of(shared).flop

    assert result.low == 0
    assert alone.high is not None
    assert result.high is not None
    assert result.high >= alone.high


# --- energy ----------------------------------------------------------------------------------


def test_integrated_power_is_bounded_by_the_power_limit() -> None:
    """Samples miss what lies between them: from none to the limit all along."""
    sampled = usage(energy_origin="power_integral")

    assert energy_bounds(basis(sampled), ROW) == Bounds(
        low=0, central=600 * MINUTE_MS, high=840 * (MINUTE_MS + 101)
    )


def test_integrated_power_above_the_limit_is_not_cut() -> None:
    """Excursions above the limit are real: central never lies above high."""
    sampled = usage(energy_mj=900 * MINUTE_MS, energy_origin="power_integral")
    found = energy_bounds(basis(sampled), ROW)

    assert found.central == found.high == 900 * MINUTE_MS


def test_module_energy_is_told_apart_and_summed_at_its_own_scope() -> None:
    """A statement can say which joules cover CPU and memory too."""
    module = usage(energy_scope="module", energy_mj=42)
    sums = basis(module)

    assert (sums.get("energy_mj", 0), sums["energy_module_mj"]) == (0, 42)
    assert energy_bounds(sums, ROW) == exactly(42)


def test_dark_energy_of_a_grace_part_reaches_its_modules_limit() -> None:
    """What the counter covers decides what it could have counted."""
    dark = basis(gap(H100))

    assert energy_bounds(dark, TABLE.by_key("GH200")).high == 1200 * (MINUTE_MS + 101)
    assert energy_bounds(dark, None).high is None


# --- hosts -----------------------------------------------------------------------------------


def host(**changes: Any) -> HostRecord:
    """A minute of an owner on a host with 64 CPUs, metered by RAPL."""
    fields: dict[str, Any] = {
        "start_unix_ms": 1_764_000_000_000, "start_boot_ms": 5_000, "window_ms": MINUTE_MS,
        "owner": UNATTRIBUTED_OWNER, "attribution": Attribution(source="none"), "cpu_count": 64,
        "cpu_time_ms": 64 * MINUTE_MS, "energy_mj": {"cpu_package": 1000, "dram": 100},
        "energy_sources": {"cpu_package": "rapl", "dram": "rapl"},
        "absent": {"flop": "cpu_flop_not_counted"}, "flags": (), "user_commitment": None,
    }  # fmt: skip
    return HostRecord(**(fields | changes))


def test_a_hosts_boundaries_are_summed_apart_and_never_make_flop() -> None:
    """CPU-seconds and each boundary's energy; what nobody read is absent for the window."""
    sums = basis(host())

    assert sums == {
        "host_window_ms": MINUTE_MS, "host_cpu_time_ms": 64 * MINUTE_MS,
        "host_energy_mj_cpu_package": 1000, "host_energy_mj_dram": 100,
        "host_platform_absent_time_ms": MINUTE_MS, "host_node_absent_time_ms": MINUTE_MS,
    }  # fmt: skip
    assert work_of(host()) == Work()
    assert host_energy_bounds(sums, "dram") == exactly(100)
    assert host_energy_bounds(sums, "node") == Bounds(low=0, central=0, high=None)


def test_unread_cpu_time_is_absent_and_not_zero() -> None:
    """A host whose CPU time could not be read says for how long."""
    sums = basis(host(cpu_time_ms=None, energy_mj={}, energy_sources={}))

    assert "host_cpu_time_ms" not in sums
    assert sums["host_cpu_absent_time_ms"] == sums["host_dram_absent_time_ms"] == MINUTE_MS


def test_a_hosts_sharers_may_each_have_drawn_all_its_energy() -> None:
    """Energy cut by CPU time is a rule: from none to the whole meter's."""
    shares = Attribution(source="tag", sharers=2, weight=1, weights=4)
    sums = basis(host(attribution=shares, energy_mj={"dram": 25}, energy_sources={"dram": "rapl"}))
    found = host_energy_bounds(sums, "dram")

    assert (found.low, found.central) == (0, 25)
    assert found.high is not None
    assert found.high >= 100


@given(st.integers(0, 10**7), st.lists(st.integers(0, 10**6), min_size=2, max_size=5))
def test_a_hosts_energy_cut_by_cpu_time_keeps_the_whole_in_reach(
    whole: int, weights: list[int]
) -> None:
    """From an owner's own record alone, the bounds reach from none to the node's whole energy."""
    total, cpus_ms, reached = sum(weights), 64 * MINUTE_MS, 0
    if not total:
        return
    for weight in weights:
        ends = [(reached + part) * of // total for of in (whole, cpus_ms) for part in (0, weight)]
        reached += weight
        share = host(
            energy_mj={"dram": ends[1] - ends[0]}, energy_sources={"dram": "rapl"},
            cpu_time_ms=ends[3] - ends[2], flags=("apportioned",),
        )  # fmt: skip
        found = host_energy_bounds(basis(share), "dram")

        assert found.low == 0
        assert found.high is not None
        assert found.high >= whole


# --- first estimates -------------------------------------------------------------------------


def test_first_estimates_sum_by_version_beside_the_cycles() -> None:
    """What was said at sealing stays as it was said, with how many records said it."""
    first = estimate(usage(), TABLE)
    assert first is not None
    opened = msgspec.structs.replace(first, flop_high=None, table_version="old")
    sums = basis(usage(estimate=first))
    now = f"{first.model_version}/{first.table_version}"
    plain = basis(usage())

    assert {name: sums[name] for name in plain} == plain
    assert sums[f"first_flop@{now}"] == ELAPSED // 2 * 4096
    assert sums[f"first_flop_low@{now}"] == ELAPSED // 2 * 2560
    assert sums[f"first_flop_high@{now}"] == ELAPSED // 2 * 4096
    assert sums[f"first_flop_records@{now}"] == 1
    assert basis(usage(estimate=opened))[f"first_flop_open_records@{first.model_version}/old"] == 1


# --- the cross-check -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "flagged"),
    [
        ({}, False),
        ({"hmma": 200}, False),  # overlap and skew, not a missed family
        ({"hmma": 149}, True),
        ({"hmma": 0}, True),  # tcgen05, as if HMMA did not see it
        ({"hmma": None}, False),
        ({"imma": None}, False),
        ({"dmma": None, "dfma": None}, False),
        ({"dmma": None}, True),  # what DFMA leaves over: 400, of which HMMA has 149
        ({"hmma": 0, "elapsed": 10**9}, False),  # rounding, not work
    ],
)
def test_hmma_far_below_what_is_left_to_it_is_flagged(
    changes: dict[str, int | None], flagged: bool
) -> None:
    """HMMA is a cross-check of any tensor minus integer minus FP64, and only that."""
    if changes == {"dmma": None}:
        changes = {"dmma": None, "hmma": 149}

    assert tensor_cross_check(msgspec.structs.replace(COUNTED, **changes)) is flagged


# --- sums ------------------------------------------------------------------------------------


@given(usages())
def test_every_record_has_bounds_in_order(record: UsageRecord) -> None:
    """Low, central and high in order, whatever a record lacks; no quantity is negative."""
    sums = basis(record)

    assert all(amount > 0 for amount in sums.values())
    for bounds in (*_bounds(work_of(record, record.precision)), energy_bounds(sums, ROW)):
        assert 0 <= bounds.low <= bounds.central
        assert bounds.high is None or bounds.central <= bounds.high


@given(usages(), usages(), st.sampled_from(["H100 SXM", "H20", "GH200"]))
def test_another_record_never_lowers_a_bound(
    one: UsageRecord, other: UsageRecord, key: str
) -> None:
    """Totals only grow, on devices with a ceiling as well."""
    row = TABLE.by_key(key)
    sums = basis(one)
    both = dict(sums)
    for name, amount in basis(other).items():
        both[name] = both.get(name, 0) + amount
    before, after = (
        [*_bounds(work(s, table=TABLE, accelerator=row, device_name="", precision=one.precision)),
         energy_bounds(s, row)]
        for s in (sums, both)
    )  # fmt: skip
    for less, more in zip(before, after, strict=True):
        assert less.low <= more.low
        assert less.central <= more.central
        assert more.high is None or (less.high is not None and less.high <= more.high)


@given(st.sets(st.sampled_from(PIPES)), st.sampled_from(["gpm_util", "dcgm_pipes"]))
def test_the_page_and_the_ledger_read_cycles_alike(hidden: set[str], tier: str) -> None:
    """Cycles of a whole device make the same sums with a record around them as without."""
    seen = dict.fromkeys(hidden) | {"elapsed": ELAPSED}
    found = msgspec.structs.replace(usage().cycles, **seen)
    sums = basis(usage(cycles=found, tier=tier, cycles_origin="derived"))
    alone = basis_of_cycles(found, tier, MINUTE_MS)

    assert {name: amount for name, amount in alone.items() if amount}.items() <= sums.items()


def _bounds(result: Work) -> list[Bounds]:
    return [result.flop, result.flop_tensor, result.flop_cores,
            result.tensor_integer_operations, result.integer_operations]  # fmt: skip
