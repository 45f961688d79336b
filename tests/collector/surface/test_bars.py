"""The geometry of a bar."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.instruments.comparison import Ratio
from flopledger_collector.web.bars import WIDTH, bar

SHARES = st.fractions(min_value=0, max_value=10**12)


def reached(low: Fraction, central: Fraction, high: Fraction | None) -> Ratio:
    """A ratio."""
    return Ratio(low=low, central=central, high=high)


@given(st.tuples(SHARES, SHARES, SHARES), st.booleans())
def test_nothing_is_drawn_outside_or_out_of_order(
    shares: tuple[Fraction, Fraction, Fraction],
    is_open: bool,
) -> None:
    """Low, central and high stay in order between the ends; an open end reaches the edge."""
    low, central, high = sorted(shares)
    found = bar(reached(low, central, None if is_open else high))
    assert 0 <= found.low_position <= found.central_position <= found.high_position <= WIDTH
    assert 0 <= found.limit_position <= WIDTH
    if is_open:
        assert (found.high_position, found.is_cut) == (WIDTH, True)


def test_a_bar_is_true_to_scale() -> None:
    """Half of a limit is half as long as the limit."""
    half = Fraction(1, 2)
    found = bar(reached(half, half, half))
    assert (found.central_position, found.limit_position) == (400, 800)


def test_a_total_over_its_limit_shows_the_limit_inside() -> None:
    """Ten times a limit leaves the limit at a tenth of the total's length."""
    found = bar(reached(Fraction(10), Fraction(10), Fraction(10)))
    assert found.limit_position == WIDTH // 11
    assert found.central_position == 10 * WIDTH // 11
