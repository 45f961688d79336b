"""A page of dcgm-exporter becomes exact ratios and counters, or reasons; never a guess."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.dcgm import (
    FP64_BLANK,
    INT32_BLANK,
    INT64_BLANK,
    KNOWN,
    RATIO_FIELDS,
    TOTAL_FIELDS,
    parse_page,
    ratio_of,
    total_of,
)
from flopledger_agent.gpus.nvml_errors import remedy_for
from flopledger_core.records import CYCLE_FIELDS
from flopledger_core.units import INT64_MAX
from tests.agent.gpus.exporter import TENSOR, UTIL, golden, render

A = "GPU-34319582-d595-d1c7-d1d2-179bcfa61660"
B = "GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e52"
H100 = "GPU-5f8d3c2a-7c39-4b0e-9a57-0d3f5b1c6e21"


def test_the_default_fields_tell_the_tensor_pipe() -> None:
    """Ratios are the printed decimals, clocks kilohertz, use a share; SM_ACTIVE is not exported."""
    page = parse_page(golden("a100-default-fields"), "gpu-node-17")
    busy, idle = page.readings[A, None], page.readings[B, None]

    assert set(page.readings) == {(A, None), (B, None)}
    assert busy.ratios == {"any_tensor": Fraction(0.929260)}
    assert busy.witnesses == {"engine": Fraction(0.995630), "dram": Fraction(0.690789)}
    assert (busy.sm_clock_khz, busy.gpu_util_ratio) == (1_215_000, Fraction(1))
    assert (idle.ratios, idle.gpu_util_ratio) == ({"any_tensor": Fraction(0)}, Fraction(0))
    assert not busy.totals
    assert not busy.absent
    assert page.unreadable_lines == 0


def test_every_old_name_is_read() -> None:
    """All nine ratios of the old names."""
    reading = parse_page(golden("a100-all-pipes"), "gpu-node-17").readings[A, None]

    assert set(reading.ratios) == set(RATIO_FIELDS.values())
    assert reading.ratios["fp32"] == Fraction(0.031240)
    assert reading.ratios["integer"] == Fraction(0.051)


def test_new_names_mean_the_same_as_old_ones() -> None:
    """Names of DCGM 4.5, the label `hostname`, and totals that no double holds."""
    reading = parse_page(golden("h100-new-names-and-totals"), "gpu-node-17").readings[H100, None]

    assert set(reading.ratios) == set(RATIO_FIELDS.values())
    assert reading.ratios["any_tensor"] == Fraction(0.554321)
    assert set(reading.totals) == set(CYCLE_FIELDS)
    assert reading.totals["elapsed"] == 2**53 + 1
    assert reading.gpu_util_ratio == Fraction(0.97)


def test_peers_row_1_a_sentinel_is_never_a_value() -> None:
    """Each way of saying that there is no value becomes its reason."""
    page = parse_page(golden("sentinels"), "gpu-node-17")
    first, second = page.readings[A, None], page.readings[B, None]

    assert (first.ratios, first.sm_clock_khz, first.gpu_util_ratio) == ({}, None, None)
    assert first.absent == {
        "sm_active": "not_available",
        "any_tensor": "not_found",
        "fp64": "not_supported",
        "fp32": "no_permission",
        "fp16": "out_of_range",
    }
    assert second.ratios == {"any_tensor": Fraction(0.07), "fp16": 1}
    assert second.absent == {
        "sm_active": "not_a_number",
        "fp64": "out_of_range",
        "fp32": "out_of_range",  # a percentage where a ratio belongs
    }
    # Counters of cycles may pass 2^47 for good; only the sentinels of their own type count.
    assert first.totals == {"elapsed": 2**47}
    assert second.totals == {}


@pytest.mark.parametrize("base", [FP64_BLANK, INT64_BLANK, INT32_BLANK])
@pytest.mark.parametrize("above", range(16))
def test_all_sixteen_values_above_a_base_are_sentinels(base: int, above: int) -> None:
    """As integers and as the doubles they are printed from."""
    for value in (base + above, float(base + above)):
        reason = ratio_of(value)
        assert isinstance(reason, str)
        assert remedy_for(reason) is not None
    assert isinstance(total_of(INT64_BLANK + above), str)
    assert isinstance(total_of(float(INT64_BLANK + above)), str)


def test_peers_row_4_an_instance_is_not_its_gpu() -> None:
    """Instances are told apart by id; an impossible ratio is absent, its neighbours are not."""
    page = parse_page(golden("a100-instances"), "gpu-node-17")

    assert set(page.readings) == {(A, None), (A, 13), (A, 2)}
    assert page.readings[A, None].ratios == {"any_tensor": Fraction(0.929260)}
    assert page.readings[A, 13].ratios["any_tensor"] == Fraction(0.930433)
    assert page.readings[A, 2].ratios == {"any_tensor": Fraction(0.120044)}
    assert page.readings[A, 2].absent == {"sm_active": "out_of_range"}


@pytest.mark.parametrize("host", ["gpu-node-18.example.org", "gpu-node-18"])
def test_of_several_hosts_only_ours_counts(host: str) -> None:
    """With or without its domain; what is elsewhere is known to be elsewhere."""
    page = parse_page(golden("two-hosts"), host)

    assert set(page.readings) == {(B, None)}
    assert page.elsewhere == {A}


def test_one_host_is_ours_whatever_it_is_called() -> None:
    """In a container the exporter tells the pod's name: UUIDs are enough."""
    assert set(parse_page(golden("a100-default-fields"), "elsewhere").readings) == {
        (A, None),
        (B, None),
    }


def test_peers_row_3_a_value_repeated_per_job_is_one_value() -> None:
    """Equal ones are one, others are nobody's."""
    reading = parse_page(golden("two-jobs"), "gpu-node-17").readings[A, None]

    assert reading.ratios == {"any_tensor": Fraction(1, 2)}
    assert reading.absent == {"sm_active": "dcgm_series_disagree"}
    assert reading.gpu_util_ratio == 1


def test_peers_row_6_a_bad_line_costs_only_itself() -> None:
    """The other lines of the device and of its neighbours stay."""
    page = parse_page(golden("damaged-lines"), "gpu-node-17")

    assert page.unreadable_lines == 2
    assert page.readings[A, None].ratios == {"any_tensor": Fraction(0.929260)}
    assert page.readings[B, None].gpu_util_ratio is None
    assert page.readings[B, None].ratios == {"any_tensor": 0}


@pytest.mark.parametrize(
    ("metric", "value", "ratio"),
    [
        (UTIL, 37, Fraction(37, 100)),
        ("DCGM_FI_DEV_GPU_UTIL_RATIO", 1, Fraction(1, 100)),  # DCGM 4.5 and 4.6: a percentage
        ("DCGM_FI_DEV_GPU_UTIL_RATIO", 1.0, Fraction(1)),  # DCGM 4.7: a ratio
        (UTIL, 101, None),
        (UTIL, -1, None),
    ],
)
def test_use_is_a_percentage_or_a_ratio(metric: str, value: object, ratio: Fraction | None) -> None:
    """The number's form tells which: integers are percentages, six digits a ratio."""
    assert parse_page(render({metric: {"GPU-1": value}}), "n").readings[
        "GPU-1", None
    ].gpu_util_ratio == (ratio)


def test_every_new_look_has_another_signature() -> None:
    """Profiling that stands still is seen although power goes on; an idle device shows by power."""
    power = "DCGM_FI_DEV_POWER_USAGE"

    def signature(tensor: float, watts: float) -> object:
        text = render({TENSOR: {"GPU-1": tensor}, power: {"GPU-1": watts}})
        return parse_page(text, "n").readings["GPU-1", None].signature

    assert signature(0.5, 400.0) == signature(0.5, 401.0)
    assert signature(0.5, 400.0) != signature(0.6, 400.0)
    assert signature(0.0, 60.0) != signature(0.0, 61.0)


@given(st.floats() | st.integers())
def test_whatever_the_number_it_is_a_share_or_a_reason(value: float) -> None:
    """Never negative, never above 1, never an error; the same for counters."""
    ratio, total = ratio_of(value), total_of(value)

    assert remedy_for(ratio) if isinstance(ratio, str) else 0 <= ratio <= 1
    assert remedy_for(total) if isinstance(total, str) else 0 <= total <= INT64_MAX


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(KNOWN)), st.text(max_size=40)).map("".join)
        | st.builds(
            '{}{{UUID="{}",GPU_I_ID="{}"}} {}'.format,
            st.sampled_from(sorted(KNOWN)),
            st.sampled_from(["GPU-1", "", '\\"', "\\n"]),
            st.text(max_size=3),
            st.text(max_size=6) | st.integers().map(str) | st.floats().map(repr),
        )
    )
)
def test_no_text_is_an_error(lines: list[str]) -> None:
    """Rubbish makes an empty page; what is read of it is in range."""
    page = parse_page("\n".join(lines), "n")

    for reading in page.readings.values():
        assert all(0 <= ratio <= 1 for ratio in reading.ratios.values())
        assert all(0 <= total <= INT64_MAX for total in reading.totals.values())


def test_the_names_cover_every_pipe_once() -> None:
    """Two names for each ratio, one for each total, all of them fields of `Cycles`."""
    assert set(TOTAL_FIELDS.values()) == set(CYCLE_FIELDS)
    assert set(RATIO_FIELDS.values()) < set(CYCLE_FIELDS)
    assert len(RATIO_FIELDS) == 2 * len(set(RATIO_FIELDS.values()))
