"""Estimates: the Commission's worked examples, the peaks' basis, and inputs that are refused.

The examples are those of C(2025) 5045 final, Annex A.3, paragraphs 135 to 144.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.estimates import (
    Amount,
    estimate_architecture,
    estimate_document,
    estimate_hardware,
    precisions_of,
)
from flopledger_core.accelerators import Accelerator, load_table
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.units import scientific

TABLE = load_table()


def test_worked_example_b_is_exact_with_its_stated_peak() -> None:
    """200,000 A100-hours at 300 TFLOP/s and half of it: 1.08e23, printed as about 1e23."""
    estimate = estimate_hardware(
        TABLE, "A100 SXM", "200000", "bf16", "0.5", peak_flop_per_second="300e12"
    )
    assert estimate.flop.central == 108 * 10**21
    assert scientific(estimate.flop.central, digits=1) == "1e23"
    assert estimate.peak_basis is not None
    assert estimate.peak_basis.pipe == "stated"
    assert estimate.peak_basis.flop_per_second == 3 * 10**14


def test_worked_example_h_is_exact_with_its_stated_peak() -> None:
    """370,000 H100-hours at 989 TFLOP/s and half of it: 6.59e23, printed cut off as 6.5e23."""
    estimate = estimate_hardware(
        TABLE, "H100 SXM", "370000", "bf16", "0.5", peak_flop_per_second="989e12"
    )
    assert estimate.flop.central == 658_674 * 10**18


def test_worked_example_h_from_the_hardware_table_agrees_to_three_digits() -> None:
    """132 SMs x 4,096 FLOP x 1,830 MHz stands for the datasheet's 989.4 TFLOP/s."""
    estimate = estimate_hardware(TABLE, "H100 SXM", "370000", "bf16", "0.5")
    assert scientific(estimate.flop.central) == "6.59e23"
    assert estimate.peak_basis is not None
    assert estimate.peak_basis.flop_per_second == 132 * 4096 * 1830 * 10**6
    assert estimate.peak_basis.datasheet_teraflop_per_second == "989.4"
    assert (estimate.peak_basis.sparsity, estimate.peak_basis.clock_mhz) == ("dense", 1830)


@pytest.mark.parametrize(
    ("parameters", "tokens", "exact", "printed"),
    [
        ("3.8e9", "3.3e12", 7524 * 10**19, "7.5e22"),  # A
        ("0.6e9", "36e12", 1296 * 10**20, "1.3e23"),  # C
        ("1.54e9", "18e12", 16632 * 10**19, "1.7e23"),  # D, printed as 1.663e23
        ("1.7e9", "36e12", 3672 * 10**20, "3.7e23"),  # E
        ("2.5e9", "12e12", 18 * 10**22, "1.8e23"),  # F
        ("2.6e9", "10e12", 156 * 10**21, "1.6e23"),  # G, printed cut off as 1.5e23
    ],
)
def test_worked_examples_of_the_architecture_method_are_exact(
    parameters: str, tokens: str, exact: int, printed: str
) -> None:
    """6 x parameters x tokens, to the last digit."""
    estimate = estimate_architecture(parameters, tokens)
    assert estimate.flop.central == exact
    assert scientific(exact, digits=2) == printed
    assert estimate.basis == "model"
    assert (estimate.flop.low * 10, (estimate.flop.high or 0) * 10) == (exact * 7, exact * 13)


def test_a_mixture_of_experts_takes_its_active_parameters() -> None:
    """37e9 active of 671e9: total parameters would give eighteen times the amount."""
    assert estimate_architecture("37e9", "14.8e12").flop.central == 32856 * 10**20
    assert "active parameters" in estimate_architecture(1, 1).assumptions[0]


def test_forward_passes_alone_take_a_third_of_training() -> None:
    """Two operations per parameter and token forward, four backward."""
    assert estimate_architecture(10, 100, "forward").flop.central == 2000
    with pytest.raises(UnknownName, match="passes is 'both': use one of: training, forward"):
        estimate_architecture(10, 100, "both")


@pytest.mark.parametrize("device", TABLE.accelerators, ids=lambda device: device.key)
def test_peaks_stand_within_two_per_cent_of_the_datasheets(device: Accelerator) -> None:
    """The basis of a utilisation is the datasheet's own, at the clock it is quoted at."""
    for precision in precisions_of(TABLE, device):
        peak = estimate_hardware(TABLE, device.key, 1, precision, 1).peak_basis
        assert peak is not None
        rate = f"tensor_{precision}" if peak.pipe == "tensor" else precision
        if peak.datasheet_teraflop_per_second and rate not in device.datasheet_deviations:
            sheet = Fraction(peak.datasheet_teraflop_per_second) * 10**12
            assert abs(peak.flop_per_second / sheet - 1) < Fraction(2, 100), precision


def test_the_limits_are_nothing_and_every_cycle_at_maximum_clock() -> None:
    """A stated utilisation is a claim, so it moves the central figure only."""
    flop = estimate_hardware(TABLE, "H100 SXM", "1", "bf16", "0.4").flop
    assert flop.low == 0
    assert flop.high == 132 * 4096 * 1980 * 10**6 * 3600
    unused = estimate_hardware(TABLE, "H100 SXM", "1", "bf16", "0").flop
    assert (unused.low, unused.central, unused.high) == (0, 0, flop.high)


def test_a_stated_peak_above_the_hardwares_own_raises_the_limit_with_it() -> None:
    """Bounds always hold the central figure."""
    flop = estimate_hardware(TABLE, "A100 SXM", "1", "bf16", "1", peak_flop_per_second="1e15").flop
    assert flop.central == flop.high == 3600 * 10**15


@given(
    hours=st.fractions(min_value=0, max_value=10**9),
    share=st.fractions(min_value=0, max_value=1),
    device=st.sampled_from([row.key for row in TABLE.accelerators]),
)
def test_hardware_estimates_are_exact_and_within_their_bounds(
    hours: Fraction, share: Fraction, device: str
) -> None:
    """One rounding, down for the central figure, and low <= central <= high."""
    estimate = estimate_hardware(TABLE, device, hours, "fp16", share)
    assert estimate.peak_basis is not None
    exact = hours * 3600 * estimate.peak_basis.flop_per_second * share
    assert 0 <= exact - estimate.flop.central < 1
    assert estimate.flop.high is not None
    assert estimate.flop.low <= estimate.flop.central <= estimate.flop.high


def test_the_document_holds_amounts_as_decimal_strings_and_survives_json() -> None:
    """No figure passes through a float on its way to a reader."""
    estimate = estimate_hardware(TABLE, "H100 SXM", "370000", "bf16", "0.5")
    document: Any = msgspec.json.decode(msgspec.json.encode(estimate_document(estimate)))
    assert document["flop"]["low"] == "0"
    assert int(document["flop"]["central"]) == estimate.flop.central
    assert int(document["flop"]["high"]) == estimate.flop.high
    assert document["peak_basis"]["flop_per_second"] == "989429760000000"
    assert document["inputs"]["utilization"] == "0.5"
    assert document["model_version"]
    assert len(document["assumptions"]) == 4
    assert estimate_document(estimate_architecture(1, 1))["peak_basis"] is None


@pytest.mark.parametrize("share", ["1.01", "50", "-0.1", "NaN", "inf", "50%", "", "0,5"])
def test_a_utilisation_outside_zero_to_one_is_refused(share: str) -> None:
    """Fifty is not fifty per cent."""
    with pytest.raises(InvalidInput, match=r"^utilization is"):
        estimate_hardware(TABLE, "H100 SXM", "1", "bf16", share)


@pytest.mark.parametrize(
    "hours",
    ["-1", "NaN", "Infinity", "1e999", "1_000", "370,000", " 1", "1/3", "0x10", "9" * 65, "٣"],
)
def test_hours_that_are_no_plain_decimal_are_refused(hours: str) -> None:
    """The sentence names the field, the value and what to give."""
    with pytest.raises(InvalidInput, match=r"^gpu_hours is .*: give a plain non-negative decimal"):
        estimate_hardware(TABLE, "H100 SXM", hours, "bf16", "0.5")


@pytest.mark.parametrize("hours", [-1, Fraction(-1, 3), 0.5, True, None])
def test_negative_inexact_and_absent_amounts_are_refused(hours: object) -> None:
    """A float would bring its own error into an exact sum."""
    with pytest.raises(InvalidInput, match=r"^gpu_hours is"):
        estimate_hardware(TABLE, "H100 SXM", cast("Amount", hours), "bf16", "0.5")


def test_an_unknown_accelerator_is_refused_with_the_list() -> None:
    """A guess at the hardware would be a guess at the law."""
    with pytest.raises(UnknownName, match="accelerator is 'H900': use one of: V100 SXM2, "):
        estimate_hardware(TABLE, "H900", "1", "bf16", "0.5")


def test_a_precision_the_hardware_lacks_is_refused_with_the_list() -> None:
    """Integer work has no FLOP at all."""
    with pytest.raises(UnknownName, match="precision is 'fp8': A100 SXM has FLOP at: tf32, fp16"):
        estimate_hardware(TABLE, "A100 SXM", "1", "fp8", "0.5")
    with pytest.raises(UnknownName, match="int8 work is integer operations, not FLOP"):
        estimate_hardware(TABLE, "A100 SXM", "1", "int8", "0.5")
