"""Counters that arrive late and in steps are handed out evenly, once each, and never too fast."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.dcgm_totals import CycleTotals, Silicon, TotalsPage
from flopledger_agent.gpus.limits import limits_of
from flopledger_core.accelerators import load_table

SECOND_NS = 1_000_000_000
H100 = load_table().by_key("H100 SXM")
MAX_KHZ = H100.max_sm_clock_mhz * 1000
SILICON = Silicon(sm_count=132, limits=limits_of(H100), fastest_khz=MAX_KHZ)
A_SECOND = 132 * 1_755_000_000  # SM-cycles at 1755 MHz


def page(at_seconds: float, elapsed: int, tensor: int, **extra: int) -> TotalsPage:
    """Counters of a GPU on which something always runs."""
    return TotalsPage(
        totals={"elapsed": elapsed, "any_tensor": tensor, **extra},
        boot_ns=int(at_seconds * SECOND_NS),
        sm_clock_khz=1_755_000,
        engine_ratio=Fraction(1),
    )


def learned(*pages: TotalsPage) -> CycleTotals:
    """After these pages."""
    totals = CycleTotals()
    for one in pages:
        totals.learn(one, SILICON, late_ns=30 * SECOND_NS)
    return totals


def steady(count: int, scale: int = 1, every: int = 30) -> list[TotalsPage]:
    """Pages of a GPU that works evenly, half of it on tensors."""
    per = every * A_SECOND // scale
    return [page(every * n, 1000 + n * per, 500 + n * per // 2) for n in range(count)]


def test_nothing_is_handed_out_before_the_scale_is_proven() -> None:
    """Ratios come with the second page, cycles with the third."""
    assert learned(*steady(1)).ratios() == {}
    assert learned(*steady(2)).ratios() == {"any_tensor": Fraction(1, 2)}
    assert learned(*steady(2)).cycles(40 * SECOND_NS) is None
    assert learned(*steady(3)).cycles(70 * SECOND_NS) is not None


def test_counters_of_the_mean_sm_are_summed_over_sms() -> None:
    """What is handed out counts every SM, whatever the page counts."""
    for scale in (1, 132):
        totals = learned(*steady(4, scale))
        begin, end = totals.cycles(90 * SECOND_NS), totals.cycles(120 * SECOND_NS)
        assert begin is not None
        assert end is not None
        assert begin.elapsed is not None
        assert end.elapsed is not None
        # A third more time than the interval: three quarters of it are handed out by now.
        assert abs(end.elapsed - begin.elapsed - 30 * A_SECOND) < 30 * A_SECOND // 2
        assert end.elapsed <= scale * (1000 + 90 * A_SECOND // scale)


@given(st.lists(st.tuples(st.integers(20, 40), st.integers(400, 1980), st.integers(0, 100)),
                min_size=5, max_size=10))  # fmt: skip
def test_every_counted_cycle_is_handed_out_once_and_never_too_fast(
    steps: list[tuple[int, int, int]],
) -> None:
    """Whatever the pages' rhythm: never back, below the clock, behind the truth by its bound."""
    at, elapsed, tensor = 0, 0, 0
    totals = CycleTotals()
    before: tuple[int, int] | None = None
    for seconds, mhz, percent in steps:
        rate = 132 * mhz * 1_000_000
        at, elapsed = at + seconds, elapsed + seconds * rate
        tensor += seconds * rate * percent // 100
        totals.learn(page(at, elapsed, tensor), SILICON, late_ns=0)
        for later in range(0, 20, 4):
            found = totals.cycles((at + later) * SECOND_NS)
            if found is None:
                before = None
                continue
            assert found.elapsed is not None
            assert found.any_tensor is not None
            uncertain = totals.uncertain_cycles((at + later) * SECOND_NS)
            # The truth is what the last page said and at most what the clock allows since.
            assert found.elapsed <= elapsed <= found.elapsed + uncertain
            assert found.any_tensor <= tensor <= found.any_tensor + uncertain
            if before is not None:
                span = at + later - before[0]
                rounding = 1
                most = span * 132 * MAX_KHZ * 1000 + rounding
                assert 0 <= found.elapsed - before[1] <= most
            before = (at + later, found.elapsed)


def test_in_the_end_everything_counted_is_handed_out() -> None:
    """When no page comes any more the counters stop at what the last one said."""
    pages = steady(5)
    found = learned(*pages).cycles(10_000 * SECOND_NS)

    assert found is not None
    assert found.elapsed == pages[-1].totals["elapsed"]
    assert found.any_tensor == pages[-1].totals["any_tensor"]


def test_peers_row_20_counters_that_restart_are_never_negative() -> None:
    """Nothing is told of the interval of a restart; the next one counts again."""
    first = steady(4)
    again = [page(120 + 30 * n, 7 + n * 30 * A_SECOND, n * 15 * A_SECOND) for n in range(3)]
    totals = learned(*first)
    totals.learn(again[0], SILICON, late_ns=0)
    assert (totals.cycles(121 * SECOND_NS), totals.ratios()) == (None, {})
    totals.learn(again[1], SILICON, late_ns=0)
    found = totals.cycles(151 * SECOND_NS)
    assert found is not None
    assert 7 <= (found.elapsed or 0) <= again[1].totals["elapsed"]


def test_a_field_that_comes_or_goes_begins_anew() -> None:
    """Counters are handed out together or not at all."""
    totals = learned(*steady(3), page(90, 1000 + 90 * A_SECOND, 500, fp64=1))
    assert totals.cycles(91 * SECOND_NS) is None


def test_what_was_told_otherwise_is_not_handed_out() -> None:
    """After another source nothing of before is left, but the scale stays known."""
    totals = learned(*steady(4))
    totals.forget()
    assert totals.cycles(91 * SECOND_NS) is None
    for one in steady(6)[4:]:
        totals.learn(one, SILICON, late_ns=0)
    assert totals.cycles(151 * SECOND_NS) is not None
