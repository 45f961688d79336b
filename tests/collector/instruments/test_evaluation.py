"""Verdicts of instruments: three-valued over intervals and facts, as of a date."""

from __future__ import annotations

from datetime import date
from fractions import Fraction
from importlib import resources
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.instruments.comparison import satisfies
from flopledger_collector.instruments.definitions import (
    AllOf,
    AnyOf,
    Compare,
    Fact,
    Instrument,
    Node,
    Threshold,
    load_instruments,
    parse_instrument,
)
from flopledger_collector.instruments.evaluation import assess, evaluate, state_at
from flopledger_collector.policies.definitions import load_policies
from flopledger_collector.policies.evaluation import Quantity
from flopledger_collector.policies.rulefiles import read_rule_text
from flopledger_core.bounds import Bounds, exactly
from flopledger_core.errors import UnknownName
from flopledger_core.flop import Work

POLICIES = load_policies()
INSTRUMENTS = load_instruments(POLICIES)
TODAY = date(2026, 11, 23)


def _flop(low: int, high: int | None) -> dict[Quantity, Bounds]:
    return {"flop": Bounds(low=low, central=low, high=high)}


def _own(instrument_id: str, old: str, new: str) -> Instrument:
    folder = resources.files("flopledger_collector.instruments")
    text = (folder / f"{instrument_id}.toml").read_text(encoding="utf-8")
    assert old in text
    return parse_instrument(read_rule_text("own.toml", text.replace(old, new, 1)))


def test_at_exactly_1e25_flop_the_presumption_does_not_apply_and_one_more_makes_it() -> None:
    """Article 51(2) says greater than."""
    instrument = INSTRUMENTS["eu-aia-51-2"]
    at = evaluate(instrument, {"flop": exactly(10**25)}, {}, TODAY)
    assert at.verdict == "below"
    assert at.threshold.ratio is not None
    assert at.threshold.ratio.central == Fraction(1)
    assert evaluate(instrument, {"flop": exactly(10**25 + 1)}, {}, TODAY).verdict == "exceeds"


def test_at_exactly_1e26_operations_california_does_not_apply_and_at_least_would() -> None:
    """The same total under `>=`, as the Korean and export texts have it, exceeds."""
    values: dict[Quantity, Bounds] = {"operations": exactly(10**26)}
    assert evaluate(INSTRUMENTS["us-ca-sb53"], values, {}, TODAY).verdict == "below"
    at_least = _own("us-ca-sb53", 'comparator = ">"', 'comparator = ">="')
    assert evaluate(at_least, values, {}, TODAY).verdict == "exceeds"


def test_an_interval_across_the_threshold_may_exceed() -> None:
    """Neither the low end nor the central figure decides alone."""
    evaluation = evaluate(INSTRUMENTS["eu-aia-51-2"], _flop(1, 2 * 10**25), {}, TODAY)
    assert evaluation.verdict == "may_exceed"
    open_ended = evaluate(INSTRUMENTS["eu-aia-51-2"], _flop(1, None), {}, TODAY)
    assert open_ended.verdict == "may_exceed"


@pytest.mark.parametrize(
    ("low", "high", "facts", "expected"),
    [
        (1, 10**23, {}, "below"),
        (1, 10**24, {}, "undetermined"),
        (10**24, 10**24, {}, "undetermined"),
        (10**24, 10**24, {"generates_language": True}, "exceeds"),
        (10**24, 10**24, {"generates_text_to_video": True}, "exceeds"),
        (1, 10**24, {"generates_language": True}, "may_exceed"),
        (10**24, 10**24, {"generates_language": False}, "undetermined"),
        (
            10**24,
            10**24,
            {
                "generates_language": False,
                "generates_text_to_image": False,
                "generates_text_to_video": False,
            },
            "below",
        ),
    ],
)
def test_undeclared_facts_make_a_verdict_undetermined_and_never_below(
    low: int, high: int, facts: dict[str, bool], expected: str
) -> None:
    """Below needs a part that is definitely false; an undeclared modality is not one."""
    evaluation = evaluate(INSTRUMENTS["eu-gpai-1e23"], _flop(low, high), facts, TODAY)
    assert evaluation.verdict == expected


def test_what_nobody_declared_is_listed() -> None:
    """An undetermined verdict says which input would settle it."""
    facts = {"generates_language": False}
    evaluation = evaluate(INSTRUMENTS["eu-gpai-1e23"], {}, facts, TODAY)
    assert evaluation.verdict == "undetermined"
    assert evaluation.undeclared == ("flop", "generates_text_to_image", "generates_text_to_video")
    assert evaluation.threshold.result is None


@pytest.mark.parametrize(
    ("as_of", "state", "verdict"),
    [
        (date(2025, 8, 1), "not_yet_valid", "not_in_force"),
        (date(2025, 8, 2), "in_force", "exceeds"),
    ],
)
def test_before_its_first_day_an_instrument_is_not_in_force_but_shows_its_answer(
    as_of: date, state: str, verdict: str
) -> None:
    """Validity is a state that is shown, not a reason to hide the comparison."""
    evaluation = evaluate(INSTRUMENTS["eu-aia-51-2"], {"flop": exactly(10**26)}, {}, as_of)
    assert (evaluation.state, evaluation.verdict) == (state, verdict)
    assert evaluation.would_be == "exceeds"


def test_a_revoked_instrument_held_until_its_last_day() -> None:
    """`valid_to` is the first day on which it no longer holds."""
    revoked = _own(
        "eu-aia-51-2", 'status = "in_force"', 'status = "revoked"\nvalid_to = 2026-02-01'
    )
    assert state_at(revoked, date(2026, 1, 31)) == "in_force"
    assert state_at(revoked, date(2026, 2, 1)) == "no_longer_valid"


def test_a_proposal_is_not_in_force_and_an_unenforced_text_is() -> None:
    """In force but unenforced is a real state, and it is said."""
    proposed = _own("eu-aia-51-2", 'status = "in_force"', 'status = "proposed"')
    assert evaluate(proposed, _flop(1, 1), {}, TODAY).verdict == "not_in_force"
    unenforced = _own("eu-aia-51-2", 'status = "in_force"', 'status = "unenforced"')
    evaluation = evaluate(unenforced, _flop(1, 1), {}, TODAY)
    assert (evaluation.state, evaluation.verdict) == ("unenforced", "below")
    assert "does not enforce" in evaluation.warnings[0]


def test_an_instrument_past_its_review_date_warns() -> None:
    """On the review date itself it does not."""
    instrument = INSTRUMENTS["us-ca-sb53"]
    values: dict[Quantity, Bounds] = {"operations": exactly(1)}
    assert evaluate(instrument, values, {}, instrument.review_date).warnings == ()
    warnings = evaluate(instrument, values, {}, date(2027, 1, 2)).warnings
    assert "us-ca-sb53 was due for review on 2027-01-01" in warnings[0]


def test_an_assessment_totals_in_the_instruments_own_scope_and_quantity() -> None:
    """Integer work counts in California and evaluations do not count in Brussels."""
    works = {
        "pretrain": Work(flop=exactly(6 * 10**25), integer_operations=exactly(6 * 10**25)),
        "eval_capability": Work(flop=exactly(10**26)),
    }
    california = assess(INSTRUMENTS["us-ca-sb53"], POLICIES, works, {}, TODAY)
    assert california.view.total == Bounds(low=12 * 10**25, central=22 * 10**25, high=22 * 10**25)
    assert california.evaluation.verdict == "exceeds"
    brussels = assess(INSTRUMENTS["eu-aia-51-2"], POLICIES, works, {}, TODAY)
    assert brussels.view.total == exactly(6 * 10**25)
    assert [line.verdict for line in brussels.view.lines] == ["counted", "excluded"]


def test_an_assessment_carries_the_warning_of_its_policy_too() -> None:
    """A stale scope is as bad as a stale threshold."""
    late = assess(INSTRUMENTS["eu-aia-51-2"], POLICIES, {}, {}, date(2030, 1, 1))
    assert [warning.split()[0] for warning in late.evaluation.warnings] == ["instrument", "policy"]


def test_an_assessment_without_its_scope_policy_is_refused() -> None:
    """No other scope stands in for it."""
    with pytest.raises(UnknownName, match="scope_policy is 'ec-cumulative'"):
        assess(INSTRUMENTS["eu-aia-51-2"], {}, {}, {}, TODAY)


def test_a_further_comparison_of_the_text_is_totalled_in_its_own_quantity() -> None:
    """A text may join two quantities; each is compared exactly."""
    logic = AnyOf(of=(Threshold(), Compare(quantity="operations", comparator=">=", threshold="5")))
    instrument = msgspec.structs.replace(INSTRUMENTS["eu-aia-51-2"], logic=logic)
    works = {"sft": Work(flop=exactly(1), integer_operations=exactly(4))}
    evaluation = assess(instrument, POLICIES, works, {}, TODAY).evaluation
    assert evaluation.verdict == "exceeds"
    assert [each.result for each in (evaluation.threshold, *evaluation.further)] == [
        "below",
        "exceeds",
    ]


_LEAVES: list[Node] = [
    Threshold(),
    Compare(quantity="operations", comparator=">=", threshold="4"),
    Fact(name="first", question="?"),
    Fact(name="second", question="?"),
]
_trees = st.recursive(
    st.sampled_from(_LEAVES),
    lambda parts: st.builds(
        lambda of, is_all: AllOf(of=tuple(of)) if is_all else AnyOf(of=tuple(of)),
        st.lists(parts, min_size=1, max_size=3),
        st.booleans(),
    ),
    max_leaves=6,
)


@st.composite
def _small_bounds(draw: st.DrawFn) -> Bounds:
    low, central, high = sorted(draw(st.tuples(*[st.integers(min_value=0, max_value=8)] * 3)))
    return Bounds(low=low, central=central, high=high)


def _holds(node: Node, flop: int, operations: int, facts: dict[str, bool]) -> bool:
    if isinstance(node, Threshold):
        return flop > 4
    if isinstance(node, Compare):
        return satisfies(operations, node.comparator, int(node.threshold))
    if isinstance(node, Fact):
        return facts[node.name]
    parts = [_holds(part, flop, operations, facts) for part in node.of]
    return all(parts) if isinstance(node, AllOf) else any(parts)


@given(
    logic=_trees,
    flop=_small_bounds(),
    operations=_small_bounds(),
    declared=st.dictionaries(st.sampled_from(["first", "second"]), st.booleans()),
)
def test_definite_verdicts_agree_with_every_truth_that_the_inputs_allow(
    logic: Node, flop: Bounds, operations: Bounds, declared: dict[str, bool]
) -> None:
    """Whatever the amounts inside their bounds and the undeclared facts turn out to be."""
    instrument = msgspec.structs.replace(INSTRUMENTS["eu-aia-51-2"], threshold=4, logic=logic)
    values: dict[Quantity, Bounds] = {"flop": flop, "operations": operations}
    evaluation = evaluate(instrument, values, declared, TODAY)
    truths: set[bool] = set()
    for amount, count in product((flop.low, flop.high), (operations.low, operations.high)):
        for first, second in product((False, True), repeat=2):
            facts = {"first": first, "second": second} | declared
            assert amount is not None
            assert count is not None
            truths.add(_holds(logic, amount, count, facts))
    if evaluation.verdict == "exceeds":
        assert truths == {True}
    if evaluation.verdict == "below":
        assert truths == {False}
    if evaluation.verdict == "may_exceed":
        assert evaluation.undeclared == () or len(truths) == 2
