"""Comparing an interval with a threshold: exact, and sound for every truth inside the bounds."""

from __future__ import annotations

from fractions import Fraction
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.instruments.comparison import (
    Comparator,
    compare,
    ratio,
    satisfies,
)
from flopledger_core.bounds import Bounds, exactly
from flopledger_core.errors import InvalidInput, UnknownName

sizes = st.integers(min_value=0, max_value=10**30)
small = st.integers(min_value=0, max_value=6)  # so that ends and threshold often coincide


@pytest.mark.parametrize("threshold", [10**25, 10**26])
def test_exactly_at_the_threshold_greater_than_is_below_and_at_least_exceeds(
    threshold: int,
) -> None:
    """`>` is not `>=`: at 1e25 and 1e26 the two answers differ."""
    assert compare(exactly(threshold), ">", threshold) == "below"
    assert compare(exactly(threshold), ">=", threshold) == "exceeds"


@pytest.mark.parametrize("threshold", [10**25, 10**26])
def test_one_operation_decides(threshold: int) -> None:
    """Nothing is rounded on the way to a verdict."""
    assert compare(exactly(threshold + 1), ">", threshold) == "exceeds"
    assert compare(exactly(threshold - 1), ">=", threshold) == "below"


def test_an_interval_across_the_threshold_may_exceed_whatever_its_central_figure() -> None:
    """The interval is compared, never the point."""
    assert compare(Bounds(low=9, central=10, high=11), ">", 10) == "may_exceed"
    assert compare(Bounds(low=0, central=0, high=11), ">", 10) == "may_exceed"


def test_an_open_high_end_is_never_below() -> None:
    """What nothing limits may exceed anything."""
    assert compare(Bounds(low=0, central=0, high=None), ">", 10**40) == "may_exceed"
    assert compare(Bounds(low=11, central=11, high=None), ">", 10) == "exceeds"


def test_an_unknown_comparator_is_refused() -> None:
    """No comparator is guessed."""
    with pytest.raises(UnknownName, match="comparator is '<': use one of: >, >="):
        satisfies(1, cast("Comparator", "<"), 2)


@given(
    ends=st.one_of(st.tuples(sizes, sizes, sizes), st.tuples(small, small, small)),
    is_open=st.booleans(),
    comparator=st.sampled_from([">", ">="]),
    threshold=st.one_of(sizes, small),
    data=st.data(),
)
def test_definite_verdicts_hold_for_every_truth_inside_the_bounds(
    ends: tuple[int, int, int],
    is_open: bool,
    comparator: Comparator,
    threshold: int,
    data: st.DataObject,
) -> None:
    """`exceeds` and `below` are certain; `may_exceed` has a truth on either side."""
    low, central, high = sorted(ends)
    value = Bounds(low=low, central=central, high=None if is_open else high)
    verdict = compare(value, comparator, threshold)
    top = max(high, threshold) + 1 if is_open else high
    truth = data.draw(st.integers(min_value=low, max_value=top))
    if verdict == "exceeds":
        assert satisfies(truth, comparator, threshold)
    elif verdict == "below":
        assert not satisfies(truth, comparator, threshold)
    else:
        assert not satisfies(low, comparator, threshold)
        assert satisfies(top, comparator, threshold)


def test_ratios_are_exact_fractions() -> None:
    """A share of a threshold is never rounded here."""
    shares = ratio(Bounds(low=0, central=1, high=10**25), 3 * 10**25)
    assert shares is not None
    assert (shares.low, shares.central, shares.high) == (
        Fraction(0),
        Fraction(1, 3 * 10**25),
        Fraction(1, 3),
    )


def test_a_ratio_to_zero_is_absent_and_an_open_end_stays_open() -> None:
    """Absent is not zero, and not infinity either."""
    assert ratio(exactly(1), 0) is None
    shares = ratio(Bounds(low=1, central=1, high=None), 2)
    assert shares is not None
    assert shares.high is None
    with pytest.raises(InvalidInput, match="not negative"):
        ratio(exactly(1), -1)
