"""Limits hold where counter, clock and rounding are at their worst; no record breaks a fold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_core.accelerators import load_table
from flopledger_core.basis import basis
from flopledger_core.batch import decode
from flopledger_core.energy import energy_bounds, host_energy_bounds
from flopledger_core.flop import Work, estimate, work
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import (
    Attribution,
    Cycles,
    Device,
    GapRecord,
    HostBoundary,
    HostEnergySource,
    HostRecord,
    Record,
    Slices,
    UsageRecord,
)
from flopledger_core.units import INT64_MAX
from flopledger_core.validation import findings
from tests.core.sealed import ELAPSED, H100, MINUTE_MS, sealed, usage
from tests.core.usages import usages

TABLE = load_table()
ROW = TABLE.by_key("H100 SXM")
IDLE = Cycles(elapsed=ELAPSED, sm_active=0, any_tensor=0, hmma=0, imma=0, dmma=0, dfma=0, fp64=0,
              fp32=0, fp16=0, integer=0)  # fmt: skip


def work_of(sums: dict[str, int], precision: str | None = "bf16", key: str = "H100 SXM") -> Work:
    """Work of sums on one model of the table."""
    return work(
        sums, table=TABLE, accelerator=TABLE.by_key(key), device_name="", precision=precision
    )


def summed(records: list[Any]) -> dict[str, int]:
    """The sums of several records, as the ledger keeps them."""
    sums: dict[str, int] = {}
    for record in records:
        for name, amount in basis(record).items():
            sums[name] = sums.get(name, 0) + amount
    return sums


def gap(device: Device, gap_ms: int, **changes: Any) -> GapRecord:
    """Dark time of a device."""
    fields: dict[str, Any] = {
        "device": device, "start_unix_ms": 0, "start_boot_ms": 0, "gap_ms": gap_ms,
        "owner": UNATTRIBUTED_OWNER, "attribution": Attribution(source="none"), "precision": None,
        "reason": "lost", "flags": (), "user_commitment": None,
    }  # fmt: skip
    return GapRecord(**(fields | changes))


# --- sums ------------------------------------------------------------------------------------


@given(st.lists(usages(), min_size=1, max_size=5))
def test_a_total_is_the_sum_of_its_records(records: list[UsageRecord]) -> None:
    """Counted, derived and shared records of one group add up: nothing is lost to the high end."""
    records = [msgspec.structs.replace(record, precision="bf16") for record in records]
    honest = all((r.cycles.elapsed or 0) < ROW.max_sm_cycles(MINUTE_MS) // 8 for r in records)
    whole, parts = work_of(summed(records)), [work_of(basis(record)) for record in records]
    for name in ("flop", "tensor_integer_operations", "integer_operations"):
        total = getattr(whole, name)
        ends = [getattr(part, name) for part in parts]

        assert total.low == sum(end.low for end in ends)
        assert total.central == sum(end.central for end in ends)
        assert total.high <= sum(end.high for end in ends)
        assert not honest or total.high == sum(end.high for end in ends)


def test_derived_work_beside_shared_counted_work_keeps_both_in_reach() -> None:
    """An exporter's cycle totals of sharers, and its gauges of another hour, are one group."""
    half = Attribution(source="tag", sharers=2, weight=1, weights=2)
    counted = usage(tier="dcgm_pipes", cycles_origin="measured", attribution=half,
                    cycles=msgspec.structs.replace(IDLE, any_tensor=ELAPSED))  # fmt: skip
    gauge = usage(tier="gpm_util", cycles_origin="derived", cycles=IDLE)
    total = work_of(summed([counted, gauge])).flop.high

    assert total is not None
    assert total >= 2 * ELAPSED * 4096  # all of what both sharers' counters read


# --- sharers ---------------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(0, 10**4)] * 3), st.lists(st.integers(1, 1000), min_size=2, max_size=6)
)
def test_each_sharers_reach_covers_the_device_whatever_its_shares_were_rounded_to(
    pipes: tuple[int, int, int], weights: list[int]
) -> None:
    """Three counters enter float tensor work, and each share of each was rounded for itself."""
    floats, imma, fp64 = pipes
    whole = {"elapsed": 10**6, "any_tensor": floats + imma + fp64, "hmma": 0, "imma": imma,
             "dmma": fp64, "dfma": fp64, "fp64": 0, "fp32": 0, "fp16": 0, "integer": 0}  # fmt: skip
    total, reached = sum(weights), 0
    for weight in weights:
        share = {
            name: value * (reached + weight) // total - value * reached // total
            for name, value in whole.items()
        }
        reached += weight
        record = usage(
            cycles=Cycles(**share),
            attribution=Attribution(source="tag", sharers=len(weights), weight=weight,
                                    weights=total),
        )  # fmt: skip
        sums = basis(record)

        assert sums.get("float_tensor", 0) + sums.get("float_tensor_excess", 0) >= floats


def test_a_sharers_smallest_share_still_reaches_the_devices_work() -> None:
    """2,997 float cycles, of which a thousandth reads as 2 - 1 - 1: none."""
    record = usage(
        cycles=msgspec.structs.replace(IDLE, any_tensor=2, imma=1, dmma=1, dfma=1),
        attribution=Attribution(source="tag", sharers=3, weight=1, weights=1000),
    )
    sums = basis(record)

    assert sums.get("float_tensor", 0) + sums["float_tensor_excess"] >= 2997


# --- counters --------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_fp64_counters_may_read_the_same_work_or_each_its_own(
    floats: int, dmma: int, dfma: int
) -> None:
    """Nothing documents which: both truths lie within the bounds."""
    for any_tensor, fp64 in ((floats + dmma + dfma, dmma + dfma),
                             (floats + max(dmma, dfma), max(dmma, dfma))):  # fmt: skip
        seen = Cycles(elapsed=10**7, any_tensor=any_tensor, hmma=floats, imma=0, dmma=dmma,
                      dfma=dfma, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
        sums = basis(usage(cycles=seen))
        parts = {
            pipe: (sums.get(pipe, 0) - sums.get(f"{pipe}_deficit", 0),
                   sums.get(pipe, 0) + sums.get(f"{pipe}_excess", 0))
            for pipe in ("float_tensor", "fp64_tensor")
        }  # fmt: skip

        assert parts["float_tensor"][0] <= floats <= parts["float_tensor"][1]
        assert parts["fp64_tensor"][0] <= fp64 <= parts["fp64_tensor"][1]


@given(st.integers(0, 1000), st.integers(0, 1000), st.data())
def test_pipes_that_overlap_stay_in_reach_without_hmma(
    floats: int, imma: int, data: st.DataObject
) -> None:
    """Float and integer work in the same cycles: any tensor counts them once, HMMA is absent."""
    any_tensor = data.draw(st.integers(max(floats, imma), floats + imma))
    seen = Cycles(elapsed=2000, any_tensor=any_tensor, imma=imma, dmma=0, dfma=0)
    sums = basis(usage(cycles=seen))

    assert sums.get("float_tensor", 0) + sums.get("float_tensor_excess", 0) >= floats


def test_a_derived_pipe_is_never_busy_for_longer_than_the_time() -> None:
    """Whatever a record says: what a fold sums stays of the size of time."""
    absurd = msgspec.structs.replace(IDLE, elapsed=1, any_tensor=INT64_MAX)
    sums = basis(usage(tier="gpm_util", cycles_origin="derived", cycles=absurd))

    assert sums["float_tensor_busy_us"] == (MINUTE_MS + 1) * 1000


@given(st.integers(1, 10**13), st.integers(1, 10**6), st.integers(0, 999_999))
def test_a_share_that_was_cut_to_whole_cycles_stays_in_reach(
    elapsed: int, share: int, rest_ns: int
) -> None:
    """Cycles made of a percentage lose less than one; the time its edges cut off counts too."""
    active = elapsed * share // 10**6
    if not active:
        return
    seen = msgspec.structs.replace(IDLE, elapsed=elapsed, any_tensor=active, hmma=active)
    sums = basis(usage(tier="gpm_util", cycles_origin="derived", cycles=seen))
    true_ns = MINUTE_MS * 10**6 + rest_ns

    assert sums["float_tensor_busy_us"] * 1000 * 10**6 >= true_ns * share


# --- clocks and SMs --------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE.accelerators, ids=lambda row: row.key)
def test_dark_time_holds_what_a_clock_above_the_tables_maximum_did(row: Any) -> None:
    """NVML's maximum is too low on some parts: what validation believes, bounds allow."""
    dark = usage(tier="none", cycles=Cycles(), cycles_origin="absent")
    high = work_of(basis(dark), key=row.key).flop_cores.high
    sms, clock_mhz = row.most_sm_count or row.sm_count, row.max_sm_clock_mhz
    if "fp32" in row.ceiling_tera_per_second:
        return

    assert high is not None
    assert (
        high >= sms * clock_mhz * 1050 * MINUTE_MS * TABLE.of_row(row).span("fp32").high_per_cycle
    )


def test_a_gap_cut_to_whole_milliseconds_holds_the_longest_time_it_may_stand_for() -> None:
    """From 0.999 ms after its first edge's millisecond to just before the next: almost one more."""
    for gap_ms in (0, 1, 60_000):
        high = work_of(basis(gap(H100, gap_ms)), None).flop.high

        assert high is not None
        assert high >= 132 * 1980 * 1000 * (gap_ms + 1) * 8192


@pytest.mark.parametrize(
    ("capability", "sms", "clock_mhz", "watts"),
    [("7.0", 80, 1912, 450), ("7.5", 72, 2100, 295), ("8.0", 124, 1410, 500),
     ("8.6", 84, 2100, 480), ("8.9", 142, 3105, 450), ("9.0", 132, 1980, 1000),
     ("10.0", 152, 1965, 1200), ("10.3", 160, 2032, 1400), ("12.0", 188, 3165, 600)],
)  # fmt: skip
def test_a_stand_in_holds_models_that_no_row_is_like(
    capability: str, sms: int, clock_mhz: int, watts: int
) -> None:
    """A Quadro RTX 8000 is no T4, a custom A100 of 124 SMs no A100: both lie within."""
    found = TABLE.resolve("NVIDIA X1", "FFFF", capability)

    assert found is not None
    assert found.accelerator.most_sm_cycles_per_us >= sms * clock_mhz
    assert found.accelerator.max_power_watts >= watts


def test_fitted_and_disputed_models_are_bounded_by_more_than_their_fit() -> None:
    """Clocks that were fitted to a datasheet, and SM counts that sources dispute, are no limits."""
    assert TABLE.by_key("GB200").most_sm_cycles_per_us >= 152 * 2112
    for key in ("B100", "B200"):
        assert TABLE.by_key(key).most_sm_cycles_per_us >= 148 * 2112
    for key in ("H100 NVL", "H200 NVL"):
        assert TABLE.by_key(key).most_sm_cycles_per_us >= 132 * 1980
    # The sheet's 44 TFLOP/s of FP32, which no known clock gives.
    assert TABLE.by_key("H20").most_sm_cycles_per_us * 256 >= 44 * 10**6


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
     ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200"), ("NVIDIA H20", "H20"),
     ("NVIDIA H800", "H800 SXM"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA B200", "B200"),
     ("NVIDIA GB200", "GB200"), ("NVIDIA B300 SXM6 AC", "B300"), ("NVIDIA GB300", "GB300"),
     ("NVIDIA A100-SXM4-40GB", "A100 SXM"), ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
     ("NVIDIA A100-PCIE-40GB", "A100 PCIe"), ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
     ("Tesla V100-SXM2-32GB", "V100 SXM2"), ("Tesla V100-PCIE-16GB", "V100 PCIe"),
     ("Tesla T4", "T4"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX 4090")],
)  # fmt: skip
def test_a_name_as_nvml_gives_it_is_found_without_a_pci_id(name: str, key: str) -> None:
    """Names that drivers really give."""
    found = TABLE.find(name)

    assert found is not None
    assert found.key == key


# --- energy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window_ms", [1, 50, 1000, 3_600_000])
def test_dark_energy_holds_a_board_above_its_limit(window_ms: int) -> None:
    """A fifth above the limit for long, twice of it for a tenth of a second: both happen."""
    high = energy_bounds(basis(gap(H100, window_ms)), ROW).high

    assert high is not None
    assert high >= 840 * window_ms
    if window_ms <= 100:
        assert high >= 2 * 700 * window_ms


def test_a_short_window_may_hold_a_whole_step_of_its_counters() -> None:
    """Counters move every 100 ms: one step in a millisecond is honest, a second's worth is not."""

    def short(steps_ms: int) -> list[str]:
        found = Cycles(elapsed=132 * 1755 * 1000 * steps_ms)
        record = usage(end_boot_ms=5_001, gpu_time_ms=1, wall_time_ms=1, cycles=found,
                       energy_mj=700 * steps_ms)  # fmt: skip
        return [finding.code for finding in findings(decode(sealed([record])), TABLE)]

    assert short(100) == []
    assert {"elapsed_exceeds_clock", "energy_exceeds_power"} <= set(short(1000))


def test_a_superchip_whose_counter_may_cover_its_module_is_not_disputed() -> None:
    """Whether GB200's counter covers two GPUs and a CPU is not confirmed: 2,500 W may be honest."""
    gb200 = Device(uuid="GPU-1", name="NVIDIA GB200", sm_count=152)
    drawn = usage(device=gb200, energy_mj=2_500 * MINUTE_MS)

    assert findings(decode(sealed([drawn])), TABLE) == ()
    above = usage(device=gb200, energy_mj=4_000 * MINUTE_MS)
    assert [f.code for f in findings(decode(sealed([above])), TABLE)] == ["energy_exceeds_power"]


# --- unconfigured slices ---------------------------------------------------------------------


def test_only_slices_without_an_instance_can_do_nothing() -> None:
    """A whole GPU or an instance that gives that reason was dark like any other."""
    reason: dict[str, Any] = {"absent": {"cycles": "slices_not_configured"}}
    part = Slices(first_index=0, count=3, of_count=7, sms_of=132)
    instance = msgspec.structs.replace(H100, gpu_instance=1, sm_count=60, slices=part)
    for device in (H100, instance):
        dark = usage(device=device, tier="none", cycles=Cycles(), cycles_origin="absent", **reason)

        assert work_of(basis(dark)).flop.high != 0
        assert work_of(basis(gap(device, 1000, reason="slices_not_configured"))).flop.high != 0


def test_slices_that_nobody_watched_may_have_been_configured_in_between() -> None:
    """A recovered gap of the rest is dark, whatever its reason says."""
    rest = msgspec.structs.replace(
        H100, sm_count=None, slices=Slices(first_index=3, count=4, of_count=7, sms_of=132)
    )
    unwatched = gap(rest, 1000, reason="slices_not_configured", flags=("recovered",))

    assert work_of(basis(unwatched)).flop.high != 0


# --- hostile records -------------------------------------------------------------------------

edges = st.sampled_from([0, 1, 2, 2**31, 2**53, INT64_MAX - 1, INT64_MAX])
BOUNDARIES: tuple[HostBoundary, ...] = ("cpu_package", "dram", "node", "platform")
RAPL: HostEnergySource = "rapl"
CAPABILITIES = [None, *(c for a in TABLE.architectures.values() for c in a.compute_capabilities)]


@st.composite
def hostile(draw: st.DrawFn) -> Record:
    """Any decodable metered record, its numbers at the ends of what fits."""
    kind = draw(st.sampled_from(["usage", "gap", "host"]))
    weights = draw(st.sampled_from([1, 2, 4096, 1_000_000]))
    weight = draw(st.sampled_from([1, max(1, weights - 1), weights]))
    share = Attribution(source="tag", sharers=1 if weight == weights else 4096, weight=weight,
                        weights=weights)  # fmt: skip
    flags = tuple(sorted(draw(st.sets(st.sampled_from(["recovered", "apportioned", "shared"])))))
    of_count = draw(st.sampled_from([1, 7, 64]))
    slices = st.builds(
        Slices, first_index=st.just(0), count=st.integers(0, of_count),
        of_count=st.just(of_count), sms_of=st.sampled_from([None, 1, 4096]),
    )  # fmt: skip
    device = Device(
        uuid="GPU-1", gpu_instance=draw(st.none() | st.just(1)),
        name=draw(st.sampled_from(["X1", *(row.names[0] for row in TABLE.accelerators)])),
        compute_capability=draw(st.sampled_from(CAPABILITIES)),
        sm_count=draw(st.sampled_from([None, 1, 4096])), slices=draw(st.none() | slices),
    )  # fmt: skip
    wide = draw(st.sampled_from([0, 1, 10**14]))
    if kind == "gap":
        return gap(device, wide, attribution=share, flags=flags,
                   start_boot_ms=draw(st.none() | edges))  # fmt: skip
    if kind == "host":
        energy: dict[HostBoundary, int] = {
            name: draw(edges) for name in BOUNDARIES if draw(st.booleans())
        }
        sources: dict[HostBoundary, HostEnergySource] = dict.fromkeys(energy, RAPL)
        return HostRecord(
            start_unix_ms=0, start_boot_ms=draw(st.none() | edges), window_ms=wide,
            owner=UNATTRIBUTED_OWNER, attribution=share, cpu_count=65536,
            cpu_time_ms=draw(st.none() | edges), energy_mj=energy,
            energy_sources=sources, absent={}, flags=flags,
            user_commitment=None,
        )  # fmt: skip
    names = [name for name in Cycles.__struct_fields__ if draw(st.booleans())]
    found = Cycles(**{name: draw(edges) for name in names})
    energy_mj = draw(st.none() | edges)
    return usage(
        device=device, start_unix_ms=0, start_boot_ms=0, end_boot_ms=wide, attribution=share,
        tier=draw(st.sampled_from(["gpm_cycles", "gpm_util", "dcgm_pipes", "sm_active", "gpu_util",
                                   "gpu_hours", "declared", "none"])),
        cycles=found, cycles_origin=(
            draw(st.sampled_from(["measured", "derived"])) if names else "absent"
        ),
        energy_mj=energy_mj, energy_origin=(
            "absent" if energy_mj is None
            else draw(st.sampled_from(["counter", "power_integral"]))
        ),
        energy_scope=draw(st.sampled_from(["gpu", "module"])),
        power_integral_mj=draw(st.none() | edges), uncertain_cycles=draw(edges),
        gpu_time_ms=draw(edges), wall_time_ms=draw(edges),
        allocated_time_ms=draw(st.none() | edges),
        precision=draw(st.sampled_from([None, "fp64", "tf32", "bf16", "fp4", "int8"])),
        flags=flags,
    )  # fmt: skip


@settings(max_examples=200)
@given(hostile())
def test_no_decodable_record_breaks_a_fold(hostile_record: Record) -> None:
    """Basis, work, energy, estimate and validation answer, with bounds in order."""
    batch = decode(sealed([hostile_record]))
    for record in batch.records:
        sums = basis(record)
        assert all(amount > 0 for amount in sums.values())
        for boundary in BOUNDARIES:
            host_energy_bounds(sums, boundary)
        if not isinstance(record, (UsageRecord, GapRecord)):
            continue
        device = record.device
        found = TABLE.resolve(device.name, device.pci_device_id, device.compute_capability)
        made = work(sums, table=TABLE, accelerator=found, device_name=device.name,
                    precision=record.precision)  # fmt: skip
        energy_bounds(sums, found)
        if isinstance(record, UsageRecord):
            first = estimate(record, TABLE)
            assert (first is None) == (found is None)
            assert first is None or int(first.flop_central) == made.flop.central
    findings(batch, TABLE)
