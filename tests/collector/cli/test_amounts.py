"""Amounts as people type them."""

from __future__ import annotations

from decimal import Decimal

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.cli.amounts import (
    CURRENCY,
    DAY,
    FLOP,
    GPU_HOURS,
    KILOWATT_HOURS,
    MONEY,
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("0", 0),
        ("125000", 125_000),
        ("1e20", 10**20),
        ("3.5e24", 35 * 10**23),
        ("3.5E+24", 35 * 10**23),
        ("1.5e1", 15),
        ("10.0", 10),
        ("1e29", 10**29),
    ],
)
def test_flop_are_read_exactly(text: str, amount: int) -> None:
    """Decimal text in, every digit kept."""
    assert FLOP.convert(text, None, None) == amount


@pytest.mark.parametrize(
    "text",
    [
        "", "nan", "NaN", "inf", "-1", "-1e20", "1.5", "1e-3", "1e30", "1e61", "1e99999", "0x10",
        "1_000", "1,000", "1e", "e20", "1/2", "٣", "1" * 100, "1e20 FLOP",
    ],
)  # fmt: skip
def test_what_is_no_amount_is_refused(text: str) -> None:
    """Fractions of a FLOP, negatives, not-a-number and over-long text are refused."""
    with pytest.raises(click.BadParameter):
        FLOP.convert(text, None, None)


@given(st.integers(0, 10**29))
def test_every_whole_amount_can_be_typed(amount: int) -> None:
    """Plain digits and an exponent give the same integer."""
    assert FLOP.convert(str(amount), None, None) == amount
    scientific = f"{Decimal(amount):e}".replace("e+", "e")
    if len(scientific) <= 80:
        assert FLOP.convert(scientific, None, None) == amount


def test_other_units_are_exact_too() -> None:
    """Kilowatt-hours, hours and money keep the ledger's unit, or are refused."""
    assert KILOWATT_HOURS.convert("12.5", None, None) == 45_000_000_000
    assert GPU_HOURS.convert("0.25", None, None) == 900_000
    assert MONEY.convert("12.34", None, None) == 1234
    assert CURRENCY.convert("usd", None, None) == "USD"
    assert DAY.convert("2025-11-24", None, None) == 1_763_942_400_000
    for kind, text in (
        (KILOWATT_HOURS, "0.0000000001"),
        (GPU_HOURS, "0.0000001"),
        (MONEY, "12.345"),
        (CURRENCY, "dollars"),
        (DAY, "24.11.2025"),
        (DAY, "1969-12-31"),
    ):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)
