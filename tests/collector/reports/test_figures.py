"""How amounts are written for people."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.instruments.comparison import Ratio
from flopledger_collector.reports import figures
from flopledger_core.bounds import Bounds


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (Fraction(0), "0 %"),
        (Fraction(94, 100), "94 %"),
        (Fraction(1, 3), "33.3 %"),
        (Fraction(104, 100), "104 %"),
        (Fraction(1, 10**7), "0.000010 %"),
        (Fraction(35, 10**8), "0.000035 %"),
        (Fraction(1, 10**12), "1e-10 %"),
        (Fraction(57, 10**10), "5.7e-7 %"),
        (Fraction(94), "94 times"),
        (Fraction(10**30), "1e30 times"),
    ],
)
def test_shares_read_well_at_every_size(share: Fraction, text: str) -> None:
    """A tiny share is written as what it is, and a large one as times."""
    assert figures.per_cent(share) == text


@given(st.fractions(min_value=0, max_value=10**40))
def test_every_share_can_be_written(share: Fraction) -> None:
    """No share is too small or too large, and none but zero is written as zero."""
    text = figures.per_cent(share)
    assert len(text) < 24
    assert (text == "0 %") == (share == 0)


def test_bounds_show_what_is_open() -> None:
    """Exact figures stand alone, bounded ones with their limits, absent ones as a dash."""
    assert figures.flop(Bounds(low=5, central=5, high=5)) == "5"
    assert figures.flop(Bounds(low=0, central=10**20, high=None)) == "1e20 [0, open]"
    assert figures.energy(Bounds(low=0, central=3_600_000_000, high=7_200_000_000)) == (
        "1.000 [0, 2.000]"
    )
    assert figures.hours(None) == "-"


def test_each_quantity_has_its_unit() -> None:
    """A budget's limit is written in the unit people think in."""
    assert figures.amount("flop", 10**20) == "1e20"
    assert figures.amount("energy_mj", 36_000_000_000) == "10.000"
    assert figures.amount("gpu_time_ms", 3_600_000) == "1.00"
    assert figures.amount("cost_cents", 123_456) == "1234.56"
    assert figures.unit("cost_cents", "USD") == "USD"


@pytest.mark.parametrize(
    ("quantity", "amount", "text"),
    [
        ("energy_mj", 0, "0"),
        ("energy_mj", 1, "2.8e-10"),
        ("energy_mj", 1_000_000, "0.000278"),
        ("energy_mj", 36_000_000, "0.01"),
        ("energy_mj", 3_600_000_000_000, "1000.000"),
        ("gpu_time_ms", 10_000, "0.00278"),
        ("gpu_time_ms", 60_000, "0.0167"),
        ("gpu_time_ms", 5_400_000, "1.50"),
    ],
)
def test_only_nothing_is_written_as_nothing(quantity: str, amount: int, text: str) -> None:
    """A job of seconds and a budget of a watt-hour keep their digits."""
    assert figures.amount(quantity, amount) == text


def test_cpu_seconds_have_no_decimals_that_read_as_thousands() -> None:
    """All digits while they are few; whole seconds from a thousand on."""
    written = [figures.cpu_seconds(time_ms) for time_ms in (0, 480_000, 1_250, 12_345_678)]
    assert written == ["0", "480", "1.25", "12346"]


def test_a_ratio_shows_its_bounds() -> None:
    """Central first, limits where they differ."""
    half = Fraction(1, 2)
    assert figures.ratio(Ratio(low=half, central=half, high=half)) == "50 %"
    assert figures.ratio(Ratio(low=Fraction(0), central=half, high=None)) == "50 % [0 %, open]"
    assert figures.ratio(None) == "no share of a limit of zero"


@given(st.text())
def test_text_from_outside_is_one_harmless_line(text: str) -> None:
    """No control character and no line break survives, whatever was typed."""
    line = figures.one_line(text)
    assert line
    assert not [character for character in line if ord(character) < 32 or character == "\u202e"]
