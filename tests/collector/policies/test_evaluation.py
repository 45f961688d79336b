"""Policy totals and the bridge between them: exact, order-free, never lowered by more work."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.policies.definitions import load_policies
from flopledger_collector.policies.evaluation import (
    PolicyView,
    Quantity,
    bridge,
    contribution,
    quantity_of,
    view,
    views,
)
from flopledger_core.activities import ACTIVITIES
from flopledger_core.bounds import ZERO, Bounds, exactly, total
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.flop import Work

POLICIES = load_policies()

amount_sizes = st.integers(min_value=0, max_value=10**30)


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    """Any amount a ledger can hold, open high ends included."""
    low, central, high = sorted(draw(st.tuples(amount_sizes, amount_sizes, amount_sizes)))
    return Bounds(low=low, central=central, high=high if draw(st.booleans()) else None)


ledgers = st.dictionaries(st.sampled_from(list(ACTIVITIES)), bounds(), max_size=len(ACTIVITIES))
policy_ids = st.sampled_from(list(POLICIES))


def _at_least(high: int | None, other: int | None) -> bool:
    return high is None or (other is not None and high >= other)


def test_counted_work_enters_as_it_is_and_excluded_work_not_at_all() -> None:
    """The two definite verdicts leave the amount alone or out."""
    amount = Bounds(low=3, central=4, high=9)
    assert contribution(POLICIES["casper-2025"], "ablation", amount) == amount
    assert contribution(POLICIES["ec-cumulative"], "ablation", amount) == ZERO


@pytest.mark.parametrize("activity", ["failed_run", "restart_loss"])
def test_conditional_and_silent_work_contributes_from_zero_to_all(activity: str) -> None:
    """The central figure is all of it, because an exemption needs a justification first."""
    amount = Bounds(low=3, central=4, high=9)
    expected = Bounds(low=0, central=4, high=9)
    assert contribution(POLICIES["ec-cumulative"], activity, amount) == expected


def test_open_ends_stay_open_unless_the_work_is_excluded() -> None:
    """What nothing limits is not limited by a policy either."""
    amount = Bounds(low=1, central=2, high=None)
    assert view(POLICIES["casper-2025"], {"ablation": amount}, "flop").total == amount
    assert view(POLICIES["ec-cumulative"], {"ablation": amount}, "flop").total == ZERO


def test_an_unknown_activity_is_refused() -> None:
    """Amounts under a name outside the closed list have no verdict."""
    with pytest.raises(UnknownName, match="activity is 'pretraining'"):
        view(POLICIES["casper-2025"], {"pretraining": ZERO}, "flop")


def test_each_line_shows_verdict_rule_and_citation() -> None:
    """A reader can check every line item without another document of ours."""
    shown = view(POLICIES["ec-cumulative"], {"eval_safety": exactly(7)}, "flop")
    (line,) = shown.lines
    assert (line.verdict, line.rule, line.amount) == ("excluded", "diagnostic", exactly(7))
    assert "red-teaming" in line.rule_text
    assert "para. 122" in line.citation
    assert shown.policy_digest == POLICIES["ec-cumulative"].digest


def test_the_declarations_that_would_narrow_a_total_are_listed() -> None:
    """Only those whose activity has an amount."""
    amounts = {"teacher_infer": exactly(5), "purchased_query": ZERO, "pretrain": exactly(1)}
    shown = view(POLICIES["ec-cumulative"], amounts, "flop")
    assert shown.undeclared() == ("teacher_output_not_public",)


def test_integer_work_counts_as_operations_and_never_as_flop() -> None:
    """The states count integer or floating-point operations, the Commission counts FLOP."""
    work = Work(
        flop=exactly(1),
        tensor_integer_operations=exactly(10),
        integer_operations=Bounds(low=0, central=100, high=200),
    )
    assert quantity_of(work, "flop") == exactly(1)
    assert quantity_of(work, "operations") == Bounds(low=11, central=111, high=211)
    with pytest.raises(UnknownName, match="quantity is 'tokens'"):
        quantity_of(work, cast("Quantity", "tokens"))


def test_several_policies_read_the_same_works() -> None:
    """The views come in the order of the policies."""
    works = {"pretrain": Work(flop=exactly(5)), "ablation": Work(flop=exactly(2))}
    chosen = [POLICIES["casper-2025"], POLICIES["final-run-only"]]
    shown = views(chosen, works, "flop")
    assert [(each.policy_id, each.total) for each in shown] == [
        ("casper-2025", exactly(7)),
        ("final-run-only", exactly(5)),
    ]


@given(
    policy_id=policy_ids, ledger=ledgers, activity=st.sampled_from(list(ACTIVITIES)), more=bounds()
)
def test_more_usage_never_lowers_any_policys_total(
    policy_id: str, ledger: dict[str, Bounds], activity: str, more: Bounds
) -> None:
    """Low, central and high each stay or rise."""
    policy = POLICIES[policy_id]
    before = view(policy, ledger, "flop").total
    grown = ledger | {activity: ledger.get(activity, ZERO) + more}
    after = view(policy, grown, "flop").total
    assert after.low >= before.low
    assert after.central >= before.central
    assert _at_least(after.high, before.high)


@given(policy_id=policy_ids, ledger=ledgers, data=st.data())
def test_a_view_does_not_depend_on_the_order_of_entries(
    policy_id: str, ledger: dict[str, Bounds], data: st.DataObject
) -> None:
    """Line items come in the order of the closed list, whatever order the amounts came in."""
    shuffled = dict(data.draw(st.permutations(list(ledger.items()))))
    policy = POLICIES[policy_id]
    assert view(policy, shuffled, "flop") == view(policy, ledger, "flop")


@given(policy_id=policy_ids, ledger=ledgers)
def test_line_items_add_up_to_the_total(policy_id: str, ledger: dict[str, Bounds]) -> None:
    """The total is the sum of its lines and nothing else."""
    shown = view(POLICIES[policy_id], ledger, "flop")
    assert shown.total == total(line.contribution for line in shown.lines)
    assert len(shown.lines) == len(ledger)


def _views(ledger: dict[str, Bounds], first: str, second: str) -> tuple[PolicyView, PolicyView]:
    return view(POLICIES[first], ledger, "flop"), view(POLICIES[second], ledger, "flop")


@given(first=policy_ids, second=policy_ids, ledger=ledgers)
def test_the_bridge_sums_exactly_to_the_difference_of_the_totals(
    first: str, second: str, ledger: dict[str, Bounds]
) -> None:
    """Low and central always; high too, unless an end is open, and then the bridge says so."""
    before, after = _views(ledger, first, second)
    crossing = bridge(before, after)
    assert sum(step.low for step in crossing.steps) == after.total.low - before.total.low
    central = after.total.central - before.total.central
    assert sum(step.central for step in crossing.steps) == central
    highs = [step.high for step in crossing.steps if step.high is not None]
    if before.total.high is not None and after.total.high is not None:
        assert sum(highs) == after.total.high - before.total.high
        assert len(highs) == len(crossing.steps)


@given(first=policy_ids, second=policy_ids, ledger=ledgers)
def test_the_bridge_back_is_the_bridge_reversed(
    first: str, second: str, ledger: dict[str, Bounds]
) -> None:
    """Each category explains the difference the same way in both directions."""
    before, after = _views(ledger, first, second)
    there, back = bridge(before, after), bridge(after, before)
    assert [step.activity for step in there.steps] == [step.activity for step in back.steps]
    assert [step.central for step in there.steps] == [-step.central for step in back.steps]


def test_the_bridge_names_each_category_that_makes_the_difference() -> None:
    """From the headline to what was spent: only what the policies read differently."""
    ledger = {
        "pretrain": exactly(100),
        "ablation": exactly(30),
        "eval_capability": exactly(5),
        "idle": exactly(1),
    }
    before, after = _views(ledger, "final-run-only", "casper-2025")
    crossing = bridge(before, after)
    assert [(step.activity, step.central) for step in crossing.steps] == [
        ("ablation", 30),
        ("eval_capability", 5),
    ]
    assert (crossing.from_total, crossing.to_total) == (exactly(100), exactly(135))


def test_views_of_different_amounts_or_quantities_have_no_bridge() -> None:
    """A bridge explains policies, never a difference in what was measured."""
    one = view(POLICIES["casper-2025"], {"sft": exactly(1)}, "flop")
    two = view(POLICIES["ec-cumulative"], {"sft": exactly(2)}, "flop")
    operations = view(POLICIES["ec-cumulative"], {"sft": exactly(1)}, "operations")
    with pytest.raises(InvalidInput, match="the same amounts"):
        bridge(one, two)
    with pytest.raises(InvalidInput, match="one quantity"):
        bridge(one, operations)
