"""FLOP from SM-cycles: exact where precision is declared, bounded where something is not known."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_core.accelerators import Accelerator, AcceleratorTable, load_table
from flopledger_core.bounds import Bounds, exactly
from flopledger_core.energy import counter_delta, energy_bounds
from flopledger_core.flop import FLOP_MODEL_VERSION, Work, basis, estimate, work
from flopledger_core.identity import UNATTRIBUTED_OWNER, Owner
from flopledger_core.records import (
    PIPES,
    Attribution,
    Cycles,
    Declaration,
    Device,
    GapRecord,
    ImportedHours,
    Record,
    UsageRecord,
)
from tests.core.sealed import ELAPSED, H100, usage
from tests.core.usages import cycles, usages

TABLE = load_table()
H100_ROW = TABLE.by_key("H100 SXM")
counts = st.integers(0, 10**15)


def flop_of(record: Record, precision: str | None = "bf16") -> Work:
    """Work of one record on an H100."""
    return work(
        basis(record), table=TABLE, accelerator=H100_ROW, device_name=H100.name,
        precision=precision,
    )  # fmt: skip


def test_declared_bf16_is_cycles_times_4096() -> None:
    """A worked example: half of the tensor cycles of a minute at 1,755 MHz."""
    result = flop_of(usage()).flop

    assert result.central == ELAPSED // 2 * 4096
    assert result.high == result.central
    assert result.low == ELAPSED // 2 * 4096 * 625 // 1000


@pytest.mark.parametrize(
    ("precision", "rate"), [("tf32", 2048), ("fp16", 4096), ("bf16", 4096), ("fp8", 8192)]
)
def test_declared_precision_chooses_the_rate(precision: str, rate: int) -> None:
    """The same cycles at another precision are another amount."""
    assert flop_of(usage(precision=precision), precision).flop.central == ELAPSED // 2 * rate


def test_unknown_precision_spans_what_the_pipe_offers() -> None:
    """From TF32 on its slowest instructions up to FP8, with the reason."""
    result = flop_of(usage(precision=None), None)

    assert result.flop.low == ELAPSED // 2 * 2048 * 625 // 1000
    assert result.flop.central == ELAPSED // 2 * 4096
    assert result.flop.high == ELAPSED // 2 * 8192
    assert "precision not declared" in result.reasons[0]


def test_a_precision_the_device_lacks_is_treated_as_unknown() -> None:
    """FP4 on Hopper is no narrower than not knowing, and says so."""
    result = flop_of(usage(precision="fp4"), "fp4")

    assert result.flop.high == ELAPSED // 2 * 8192
    assert "declared precision fp4" in result.reasons[0]


def test_integer_and_fp64_tensor_work_are_taken_out_of_any_tensor() -> None:
    """Integer tensor operations are operations, never FLOP."""
    cycles = Cycles(elapsed=1000, sm_active=1000, any_tensor=600, hmma=300, imma=200, dmma=0,
                    dfma=100, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
    result = flop_of(usage(cycles=cycles))

    assert result.flop.central == 300 * 4096 + 100 * 256
    assert result.tensor_integer_operations == Bounds(
        low=200 * 5120, central=200 * 8192, high=200 * 8192
    )
    assert result.operations.central == result.flop.central + 200 * 8192


def test_cuda_core_work_is_an_upper_bound() -> None:
    """A busy FP32 pipe may have done adds on few lanes: from zero to fused multiply-adds on all."""
    cycles = Cycles(elapsed=1000, sm_active=1000, any_tensor=0, hmma=0, imma=0, dmma=0, dfma=0,
                    fp64=0, fp32=100, fp16=0, integer=10)  # fmt: skip
    result = flop_of(usage(cycles=cycles))

    assert result.flop == Bounds(low=0, central=25_600, high=25_600)
    assert result.integer_operations == Bounds(low=0, central=1280, high=6400)


def test_an_absent_integer_pipe_widens_and_never_reads_as_zero() -> None:
    """Without IMMA, all tensor cycles could have been integer work, or none."""
    cycles = Cycles(elapsed=1000, any_tensor=600, hmma=600, dmma=0, dfma=0, fp64=0, fp32=0,
                    fp16=0, integer=0)  # fmt: skip
    result = flop_of(usage(cycles=cycles))

    assert result.flop == Bounds(low=0, central=600 * 4096, high=600 * 4096)
    assert result.tensor_integer_operations == Bounds(low=0, central=0, high=600 * 8192)


def test_an_absent_cuda_core_pipe_could_have_done_anything() -> None:
    """High counts every elapsed cycle of the pipe nobody read."""
    cycles = Cycles(elapsed=1000, any_tensor=0, imma=0, dmma=0, dfma=0, fp64=0, fp16=0, integer=0)

    assert flop_of(usage(cycles=cycles)).flop == Bounds(low=0, central=0, high=1000 * 256)


def test_unreadable_cycles_are_bounded_by_the_peak() -> None:
    """A record without cycles contributes from zero up to everything the device could do."""
    result = flop_of(usage(cycles=Cycles(), tier="none", cycles_origin="absent")).flop

    assert result.low == result.central == 0
    assert result.high is not None
    assert result.high >= H100_ROW.max_sm_cycles(60_000) * 4096


def test_a_gap_contributes_from_zero_to_the_peak() -> None:
    """Dark time is never filled with zeros and never invents a central value."""
    gap = GapRecord(device=H100, start_unix_ms=0, start_boot_ms=0, gap_ms=60_000,
                    owner=UNATTRIBUTED_OWNER, attribution=Attribution(source="none"),
                    precision=None, reason="lost", flags=(), user_commitment=None)  # fmt: skip
    result = flop_of(gap, None).flop
    energy = energy_bounds(basis(gap), H100_ROW)

    assert result.low == result.central == 0
    assert result.high is not None
    assert result.high >= H100_ROW.max_sm_cycles(60_000) * 8192
    assert energy == Bounds(low=0, central=0, high=840 * 60_101)  # a fifth above the limit


def test_an_unknown_device_has_no_flop_and_an_open_bound() -> None:
    """Absent, with the reason; the raw cycles stay in the record."""
    result = work(basis(usage()), table=TABLE, accelerator=None, device_name="NVIDIA X1",
                  precision="bf16")  # fmt: skip

    assert result.flop == Bounds(low=0, central=0, high=None)
    assert "NVIDIA X1" in result.reasons[0]


def test_coarse_tiers_are_upper_bounds() -> None:
    """GPU utilisation sees that something ran; low is zero, high is the peak of that time."""
    cycles = Cycles(elapsed=1000, sm_active=500)
    result = flop_of(usage(cycles=cycles, tier="gpu_util", cycles_origin="derived")).flop

    assert result.low == 0
    assert result.central == 150 * 4096
    assert result.high is not None
    assert result.high >= 500 * 4096


def test_scheduler_hours_use_the_stated_utilisation() -> None:
    """The Commission's N x L x H x U at the datasheet's tensor clock; at most maximum clock."""
    hours = ImportedHours(
        import_key="k", cluster="c", owner=Owner(kind="attributed", project="atlas"),
        accelerator="H100 SXM", gpus=8, start_unix_ms=0, end_unix_ms=3_600_000,
        gpu_time_ms=8 * 3_600_000, precision="bf16", utilization_per_mille=500,
        utilization_source="stated", source="sacct", at_unix_ms=0, author="ops",
    )  # fmt: skip
    result = flop_of(hours).flop
    peak = 132 * 4096 * 1830 * 10**6 * 8 * 3600

    assert (result.low, result.central) == (0, peak // 2)
    assert result.high is not None
    assert result.high >= peak * 1980 // 1830


def test_declared_model_flop_is_not_executed_flop() -> None:
    """A 6ND figure is kept, and adds nothing to what the hardware carried out."""
    fields: dict[str, Any] = {
        "project": "atlas", "model": None, "run": None, "activity": "pretrain",
        "start_unix_ms": 0, "end_unix_ms": 1, "flop_low": "1", "flop_central": "2",
        "flop_high": "3", "energy_mj": None, "gpu_time_ms": None, "cost_cents": None,
        "currency": None, "method": "6ND", "evidence": None, "at_unix_ms": 0, "author": "a",
    }  # fmt: skip
    executed = Declaration(flop_basis="executed", **fields)
    model = Declaration(flop_basis="model", **fields)

    assert flop_of(executed).flop == Bounds(low=1, central=2, high=3)
    assert flop_of(model).flop == exactly(0)
    assert basis(model)["model_flop"] == 2


@given(st.lists(st.tuples(counts, counts, counts, counts), min_size=1, max_size=6))
def test_work_is_linear_in_the_sums(rows: list[tuple[int, int, int, int]]) -> None:
    """Work of summed bases equals summed work: history restates by a linear map."""
    records = []
    for parts in rows:
        hmma, imma, fp32, rest = parts
        any_tensor = hmma + imma
        cycles = Cycles(elapsed=any_tensor + fp32 + rest, any_tensor=any_tensor, hmma=hmma,
                        imma=imma, dmma=0, dfma=0, fp64=0, fp32=fp32, fp16=0,
                        integer=0)  # fmt: skip
        records.append(usage(cycles=cycles))
    sums: dict[str, int] = {}
    for record in records:
        for name, amount in basis(record).items():
            sums[name] = sums.get(name, 0) + amount
    whole = work(sums, table=TABLE, accelerator=H100_ROW, device_name="", precision="bf16")
    parts_ = [flop_of(record).flop for record in records]

    assert whole.flop.central == sum(part.central for part in parts_)
    assert whole.flop.high == sum(part.high or 0 for part in parts_)
    assert 0 <= whole.flop.low - sum(part.low for part in parts_) < len(parts_)  # one rounding


@given(st.data())
def test_bounds_hold_whatever_is_absent(data: st.DataObject) -> None:
    """Hide any counters of a true record: the bounds still contain the true FLOP."""
    values = {name: data.draw(st.integers(0, 10**6), label=name) for name in
              ("hmma", "imma", "dfma", "fp64", "fp32", "fp16", "integer")}  # fmt: skip
    any_tensor = values["hmma"] + values["imma"] + values["dfma"]
    elapsed = any_tensor + max(values[n] for n in ("fp64", "fp32", "fp16", "integer"))
    full = Cycles(elapsed=elapsed, sm_active=elapsed, any_tensor=any_tensor,
                  dmma=values["dfma"], **values)  # fmt: skip
    truth = flop_of(usage(cycles=full)).flop.central
    hidden = data.draw(st.sets(st.sampled_from(PIPES)))
    seen = Cycles(**{name: None if name in hidden else value
                     for name, value in full.as_dict().items()})  # fmt: skip
    result = flop_of(usage(cycles=seen)).flop

    assert result.low <= truth
    assert result.high is None or truth <= result.high


# --- parts, precision, exceptions ------------------------------------------------------------


@given(usages())
def test_tensor_and_core_work_make_up_the_flop(record: UsageRecord) -> None:
    """A statement can show them apart: their bounds sum to those of all FLOP."""
    result = flop_of(record, record.precision)

    assert result.flop_tensor + result.flop_cores == result.flop


def test_core_work_is_apart_from_tensor_work() -> None:
    """A busy FP32 pipe shows under the cores, a busy tensor pipe under the tensors."""
    busy = msgspec.structs.replace(usage().cycles, fp32=1000)
    result = flop_of(usage(cycles=busy))

    assert result.flop_tensor.central == ELAPSED // 2 * 4096
    assert result.flop_cores == Bounds(low=0, central=256_000, high=256_000)
    assert result.disputed().flop_cores == Bounds(low=0, central=0, high=256_000)


def test_declared_flop_belongs_to_no_pipe() -> None:
    """Nobody counted it: it is FLOP, of neither tensor nor core counters."""
    result = work({"declared_flop_low": 1, "declared_flop": 2, "declared_flop_high": 3},
                  table=TABLE, accelerator=None, device_name="", precision=None)  # fmt: skip

    assert result.flop == Bounds(low=1, central=2, high=3)
    assert result.flop_tensor == result.flop_cores == exactly(0)


def test_a_configured_precision_narrows_as_a_declared_one_does() -> None:
    """Where it comes from is told beside it and changes no number."""
    configured = usage(precision_origin="configured")

    assert flop_of(configured) == flop_of(usage())
    assert estimate(configured, TABLE) == estimate(usage(), TABLE)


def work_on(key: str, record: Record, precision: str | None = "bf16") -> Work:
    """Work of one record on any model."""
    row = TABLE.by_key(key)
    return work(basis(record), table=TABLE, accelerator=row, device_name="", precision=precision)


def test_geforce_half_rate_is_the_low_and_central_value() -> None:
    """FP32 accumulation runs at half rate there; the pipe does not say which it was."""
    result = work_on("RTX 4090", usage()).flop_tensor

    assert result.low == result.central == ELAPSED // 2 * 512
    assert result.high == ELAPSED // 2 * 1024


@pytest.mark.parametrize(("busy", "expected"), [(0, 0), (100, 1024), (4, 1024)])
def test_h20_is_uncalibrated_and_never_above_its_ceiling(busy: int, expected: int) -> None:
    """Whatever active means there: up to full rates, capped at the sheet's peak at full clock."""
    elapsed = 78 * 1830 * 10**6 * 60
    active = elapsed * busy // 100
    found = Cycles(elapsed=elapsed, sm_active=elapsed, any_tensor=active, hmma=active, imma=0,
                   dmma=0, dfma=0, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
    result = work_on("H20", usage(cycles=found)).flop
    ceiling = 1602 * 10**8 * 60_001

    assert result.low == 0
    assert result.central == active * expected
    assert result.high is not None
    assert min(active * 4096, ceiling) <= result.high <= ceiling + 1
    assert active * 1024 <= result.high
    assert (result.high == active * 4096) == (busy <= 4)


def test_h20_in_the_dark_could_have_reached_its_ceiling_and_no_more() -> None:
    """The ceiling holds for time nobody metered too; FP8 has the highest."""
    dark = usage(tier="none", cycles=Cycles(), cycles_origin="absent")

    assert work_on("H20", dark).flop_tensor.high == (1602 + 15) * 10**8 * 60_001 + 2
    assert work_on("H20", dark, None).flop_tensor.high == (3203 + 15) * 10**8 * 60_001 + 2


def test_h20_at_full_clock_lies_below_its_ceiling() -> None:
    """A quarter of Hopper's rates at 1,980 MHz is more than the sheet, and still possible."""
    elapsed = 78 * 1980 * 10**6 * 60
    found = Cycles(elapsed=elapsed, sm_active=elapsed, any_tensor=elapsed, hmma=elapsed, imma=0,
                   dmma=0, dfma=0, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip
    result = work_on("H20", usage(cycles=found)).flop_tensor

    assert result.central == elapsed * 1024 > 148 * 10**12 * 60
    assert result.high is not None
    assert result.high >= result.central


def test_h800_double_precision_is_cut_to_its_sheet() -> None:
    """One teraflop a second, in whichever way it is held down."""
    found = msgspec.structs.replace(usage().cycles, fp64=ELAPSED)
    result = work_on("H800 SXM", usage(cycles=found)).flop_cores

    assert (result.low, result.central) == (0, ELAPSED * 4)
    assert result.high == 15 * 10**8 * 60_001 + 1


@given(st.sampled_from(TABLE.accelerators), usages())
def test_a_model_taken_for_unknown_keeps_its_truth_within_wider_bounds(
    row: Accelerator, record: UsageRecord
) -> None:
    """A stand-in's low is no higher and its high no lower than the model's own."""
    capability = TABLE.architecture_of(row).compute_capabilities[0]
    sums = basis(record)
    own, wide = (
        work(sums, table=TABLE, accelerator=device, device_name="X1", precision=record.precision)
        for device in (TABLE.of_row(row), TABLE.resolve("X1", None, capability))
    )

    for name in ("flop", "tensor_integer_operations", "integer_operations"):
        narrow, broad = getattr(own, name), getattr(wide, name)
        assert broad.low <= narrow.low
        assert broad.high >= narrow.high
    assert any("X1" in reason for reason in wide.reasons) or not wide.reasons


# --- first estimates -------------------------------------------------------------------------


@given(usages())
def test_an_estimate_is_what_the_ledger_computes(record: UsageRecord) -> None:
    """Agent and collector share one function: the same counters give the same numbers."""
    found = estimate(record, TABLE)
    own = flop_of(record, record.precision).flop

    assert found is not None
    assert (int(found.flop_low), int(found.flop_central)) == (own.low, own.central)
    assert found.flop_high is not None
    assert int(found.flop_high) == own.high
    assert (found.model_version, found.table_version) == (FLOP_MODEL_VERSION, TABLE.version)
    assert estimate(msgspec.structs.replace(record, estimate=found), TABLE) == found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "dense_at_counted_cycles"),
        ({"tier": "dcgm_pipes"}, "dense_at_counted_cycles"),
        ({"tier": "dcgm_pipes", "cycles_origin": "derived"}, "dense_at_sampled_clock"),
        ({"tier": "gpm_util", "cycles_origin": "derived"}, "dense_at_sampled_clock"),
        ({"tier": "gpu_util", "cycles_origin": "derived"}, "dense_at_sampled_clock"),
        ({"tier": "none", "cycles": Cycles(), "cycles_origin": "absent"},
         "dense_at_maximum_clock"),
    ],
)  # fmt: skip
def test_an_estimate_names_its_peak_basis(changes: dict[str, Any], expected: str) -> None:
    """Whether cycles were counted, or made from a clock, or only possible."""
    found = estimate(usage(**changes), TABLE)

    assert found is not None
    assert found.peak_basis == expected


@pytest.mark.parametrize(
    ("name", "precision", "assumed"),
    [("NVIDIA H200", "fp8", "fp8"), ("NVIDIA H200", "fp4", "bf16"), ("NVIDIA H200", None, "bf16"),
     ("NVIDIA H200", "int8", "bf16"), ("Tesla T4", None, "fp16"), ("Tesla T4", "bf16", "fp16")],
)  # fmt: skip
def test_an_estimate_names_the_precision_it_took(
    name: str, precision: str | None, assumed: str
) -> None:
    """The declared one where the pipe offers it, else what the central value was made with."""
    device = Device(uuid="GPU-1", name=name)
    found = estimate(usage(device=device, precision=precision), TABLE)

    assert found is not None
    assert found.assumed_precision == assumed


def test_an_unknown_device_of_a_known_architecture_has_a_wide_estimate() -> None:
    """Its compute capability names the extremes; without one FLOP is absent."""
    stranger = Device(uuid="GPU-1", name="NVIDIA X1", compute_capability="9.0")
    found = estimate(usage(device=stranger), TABLE)

    assert found is not None
    assert (found.flop_low, found.flop_central) == ("0", str(ELAPSED // 2 * 4096))
    nameless = msgspec.structs.replace(stranger, compute_capability=None)
    assert estimate(usage(device=nameless), TABLE) is None


# --- restatement -----------------------------------------------------------------------------


@given(st.lists(cycles(), min_size=1, max_size=5))
def test_a_corrected_rate_restates_history_and_edits_nothing(history: list[Cycles]) -> None:
    """Table B doubles one rate: totals of the same sums double, first estimates stay as said."""
    hopper = TABLE.architectures["hopper"]
    rates = hopper.flop_per_cycle_per_sm | {"tensor_bf16": 8192}
    corrected = msgspec.structs.replace(hopper, flop_per_cycle_per_sm=rates)
    table_b = AcceleratorTable("B", TABLE.architectures | {"hopper": corrected}, TABLE.accelerators)
    records = [usage(cycles=found) for found in history]
    records = [msgspec.structs.replace(r, estimate=estimate(r, TABLE)) for r in records]
    before = [msgspec.json.encode(record) for record in records]
    sums: dict[str, int] = {}
    for record in records:
        for name, amount in basis(record).items():
            sums[name] = sums.get(name, 0) + amount
    old, new = (
        work(sums, table=table, accelerator=table.by_key("H100 SXM"), device_name="",
             precision="bf16")
        for table in (TABLE, table_b)
    )  # fmt: skip
    float_tensor = sums.get("float_tensor", 0) + sums.get("coarse_tensor", 0)

    assert new.flop_tensor.central - old.flop_tensor.central == float_tensor * 4096
    assert new.flop_cores == old.flop_cores
    assert sums.get(f"first_flop@{FLOP_MODEL_VERSION}/{TABLE.version}", 0) == old.flop.central
    assert [msgspec.json.encode(record) for record in records] == before
    restated = [estimate(record, table_b) for record in records]
    assert sum(int(found.flop_central) for found in restated if found) == new.flop.central


@given(counts, counts)
def test_a_counter_never_goes_backwards(previous: int, current: int) -> None:
    """A restart gives what came after it, flagged; never a negative amount."""
    delta = counter_delta(previous, current)

    assert delta.restarted == (current < previous)
    assert delta.amount == (current if delta.restarted else current - previous)
