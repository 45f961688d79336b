"""Bounds add as limits and never lose a unit."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_core.bounds import ZERO, Bounds, exactly, total
from flopledger_core.errors import InvalidInput
from flopledger_core.exact import LIMB, join, split
from flopledger_core.units import decimal_text, gpu_hours, kilowatt_hours, scientific

amounts = st.integers(min_value=0, max_value=10**40)


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    """Any bounds, open ones included."""
    low, central, high = sorted([draw(amounts), draw(amounts), draw(amounts)])
    return Bounds(low=low, central=central, high=None if draw(st.booleans()) else high)


@given(st.lists(bounds()))
def test_sums_of_bounds_are_sums_of_their_ends(parts: list[Bounds]) -> None:
    """Low adds to low, high to high; one open end opens the sum."""
    result = total(parts)

    assert result.low == sum(part.low for part in parts)
    assert result.central == sum(part.central for part in parts)
    highs = [part.high for part in parts if part.high is not None]
    assert result.high == (sum(highs) if len(highs) == len(parts) else None)


@given(bounds(), st.integers(0, 10**6), st.integers(1, 10**6))
def test_scaling_rounds_outwards(value: Bounds, numerator: int, denominator: int) -> None:
    """The exact product always lies within the scaled bounds."""
    scaled = value.scaled(numerator, denominator)
    factor = Fraction(numerator, denominator)

    assert scaled.low <= value.low * factor
    if value.high is not None and scaled.high is not None:
        assert scaled.high >= value.high * factor


def test_bounds_out_of_order_are_refused() -> None:
    """A low end above the central value is a mistake, not a value."""
    with pytest.raises(InvalidInput, match="low <= central <= high"):
        Bounds(low=2, central=1, high=3)


def test_a_silent_rule_contributes_from_zero_to_all() -> None:
    """Silence of a text: [0, all]."""
    assert exactly(7).possibly_none() == Bounds(low=0, central=7, high=7)
    assert ZERO.possibly_none() == ZERO


@given(st.lists(st.integers(-(10**33), 10**33), max_size=50))
def test_limbs_sum_exactly(values: list[int]) -> None:
    """Summing the two limb columns and joining gives the exact sum."""
    limbs = [split(value) for value in values]
    high, low = sum(h for h, _ in limbs), sum(low for _, low in limbs)

    assert join(high, low) == sum(values)
    assert all(0 <= low_ < LIMB for _, low_ in limbs)


@given(st.integers(0, 10**40))
def test_scientific_keeps_three_significant_digits(amount: int) -> None:
    """What people read is within half a unit of the third digit."""
    text = scientific(amount)
    shown = Fraction(text.replace("e", "E"))

    assert abs(shown - amount) * 200 <= amount


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (999, "999"), (9999, "9999"), (10**25, "1e25"), (9_996 * 10**20, "1e24"),
     (123_456, "1.23e5"), (-(10**6), "-1e6")],
)  # fmt: skip
def test_scientific_examples(amount: int, text: str) -> None:
    """Carries and signs come out as people write them."""
    assert scientific(amount) == text


def test_units_for_people() -> None:
    """kWh, GPU-hours and plain decimals round half to even, once."""
    assert kilowatt_hours(3_600_000_000) == "1.000"
    assert gpu_hours(5_400_000) == "1.50"
    assert decimal_text(1, 8, 2) == "0.12"
    assert decimal_text(-1, 3, 0) == "0"
