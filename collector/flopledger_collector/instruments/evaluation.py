"""Evaluates an instrument over intervals and declared facts, as of a date.

The logic has more than two values. A comparison may be undecided because the total is known
only within bounds; a fact may be undecided because nobody declared it. Neither is ever read as
"below": only a part that is definitely false makes an `all` false. An undeclared input that
could change the answer makes the verdict `undetermined`, and says which input.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from enum import IntEnum
from typing import Literal, assert_never

import msgspec

from flopledger_collector.instruments.comparison import (
    Comparator,
    Comparison,
    Ratio,
    compare,
    ratio,
)
from flopledger_collector.instruments.definitions import (
    AllOf,
    AnyOf,
    Compare,
    Fact,
    Instrument,
    Node,
    Threshold,
    nodes,
)
from flopledger_collector.policies.definitions import Policy
from flopledger_collector.policies.evaluation import PolicyView, Quantity, amounts_of, view
from flopledger_core.bounds import Bounds
from flopledger_core.errors import UnknownName
from flopledger_core.flop import Work

Verdict = Literal["below", "may_exceed", "exceeds", "undetermined", "not_in_force"]
State = Literal["in_force", "unenforced", "proposed", "not_yet_valid", "no_longer_valid"]


class _Truth(IntEnum):
    """Four values; the order is what makes `all` a minimum. `any` swaps the middle two."""

    FALSE = 0
    UNDECLARED = 1
    UNDECIDED = 2
    TRUE = 3


_FROM_COMPARISON: dict[Comparison, _Truth] = {
    "below": _Truth.FALSE,
    "may_exceed": _Truth.UNDECIDED,
    "exceeds": _Truth.TRUE,
}


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison of the logic tree; without a value it has no result."""

    quantity: Quantity
    comparator: Comparator
    threshold: int
    value: Bounds | None
    result: Comparison | None
    ratio: Ratio | None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What an instrument says of a subject as of a date.

    `verdict` is `not_in_force` outside the dates of validity; `would_be` is the answer of the
    logic alone. `threshold` is the comparison with the instrument's own threshold.
    """

    instrument_id: str
    instrument_version: str
    instrument_digest: str
    as_of: date
    state: State
    verdict: Verdict
    would_be: Verdict
    threshold: Compared
    further: tuple[Compared, ...]
    undeclared: tuple[str, ...]  # facts and quantities that nobody gave
    warnings: tuple[str, ...]


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """An instrument's evaluation together with the itemised total that it rests on."""

    instrument: Instrument
    view: PolicyView
    evaluation: Evaluation


def assess(
    instrument: Instrument,
    policies: Mapping[str, Policy],
    works: Mapping[str, Work],
    facts: Mapping[str, bool],
    as_of: date,
) -> Assessment:
    """Total the works by activity in the instrument's own scope and quantity, and evaluate it."""
    if instrument.scope_policy not in policies:
        raise UnknownName(
            "scope_policy", instrument.scope_policy, f"load it; known: {', '.join(policies)}"
        )
    policy = policies[instrument.scope_policy]
    itemised = view(policy, amounts_of(works, instrument.quantity), instrument.quantity)
    values: dict[Quantity, Bounds] = {instrument.quantity: itemised.total}
    for node in nodes(instrument.logic):
        if isinstance(node, Compare) and node.quantity not in values:
            scoped = view(policy, amounts_of(works, node.quantity), node.quantity)
            values[node.quantity] = scoped.total
    evaluation = evaluate(instrument, values, facts, as_of)
    overdue = policy.warnings(as_of)
    if overdue:
        evaluation = msgspec.structs.replace(evaluation, warnings=(*evaluation.warnings, *overdue))
    return Assessment(instrument=instrument, view=itemised, evaluation=evaluation)


def evaluate(
    instrument: Instrument,
    values: Mapping[Quantity, Bounds],
    facts: Mapping[str, bool],
    as_of: date,
) -> Evaluation:
    """The verdict on totals by quantity and declared facts by name; absent ones stay unknown."""
    own = _compared(instrument, Threshold(), values)
    comparisons = [
        _compared(instrument, node, values)
        for node in nodes(instrument.logic)
        if isinstance(node, Compare)
    ]
    would_be = _verdict(_truth(instrument, instrument.logic, values, facts))
    state = state_at(instrument, as_of)
    applies = state in {"in_force", "unenforced"}
    return Evaluation(
        instrument_id=instrument.id,
        instrument_version=instrument.version,
        instrument_digest=instrument.digest,
        as_of=as_of,
        state=state,
        verdict=would_be if applies else "not_in_force",
        would_be=would_be,
        threshold=own,
        further=tuple(comparisons),
        undeclared=_undeclared(instrument, values, facts),
        warnings=_warnings(instrument, state, as_of),
    )


def state_at(instrument: Instrument, as_of: date) -> State:
    """Whether the instrument holds on a day, and if not, why not."""
    if instrument.status == "proposed":
        return "proposed"
    if as_of < instrument.valid_from:
        return "not_yet_valid"
    if instrument.valid_to is not None and as_of >= instrument.valid_to:
        return "no_longer_valid"
    return "unenforced" if instrument.status == "unenforced" else "in_force"


def _compared(
    instrument: Instrument, node: Threshold | Compare, values: Mapping[Quantity, Bounds]
) -> Compared:
    if isinstance(node, Threshold):
        quantity, comparator = instrument.quantity, instrument.comparator
        threshold = instrument.threshold
    else:
        quantity, comparator, threshold = node.quantity, node.comparator, int(node.threshold)
    value = values.get(quantity)
    return Compared(
        quantity=quantity,
        comparator=comparator,
        threshold=threshold,
        value=value,
        result=None if value is None else compare(value, comparator, threshold),
        ratio=None if value is None else ratio(value, threshold),
    )


def _truth(
    instrument: Instrument,
    node: Node,
    values: Mapping[Quantity, Bounds],
    facts: Mapping[str, bool],
) -> _Truth:
    match node:
        case Threshold() | Compare():
            result = _compared(instrument, node, values).result
            return _Truth.UNDECLARED if result is None else _FROM_COMPARISON[result]
        case Fact():
            if node.name not in facts:
                return _Truth.UNDECLARED
            return _Truth.TRUE if facts[node.name] else _Truth.FALSE
        case AllOf():
            return min(_truth(instrument, part, values, facts) for part in node.of)
        case AnyOf():
            parts = {_truth(instrument, part, values, facts) for part in node.of}
            for truth in (_Truth.TRUE, _Truth.UNDECLARED, _Truth.UNDECIDED):
                if truth in parts:
                    return truth
            return _Truth.FALSE
        case _:
            assert_never(node)


def _verdict(truth: _Truth) -> Verdict:
    match truth:
        case _Truth.TRUE:
            return "exceeds"
        case _Truth.FALSE:
            return "below"
        case _Truth.UNDECIDED:
            return "may_exceed"
        case _Truth.UNDECLARED:
            return "undetermined"
        case _:
            assert_never(truth)


def _undeclared(
    instrument: Instrument, values: Mapping[Quantity, Bounds], facts: Mapping[str, bool]
) -> tuple[str, ...]:
    missing: list[str] = []
    for node in nodes(instrument.logic):
        if isinstance(node, Fact) and node.name not in facts:
            missing.append(node.name)
        elif isinstance(node, Threshold | Compare):
            quantity = instrument.quantity if isinstance(node, Threshold) else node.quantity
            if quantity not in values:
                missing.append(quantity)
    return tuple(dict.fromkeys(missing))


def _warnings(instrument: Instrument, state: State, as_of: date) -> tuple[str, ...]:
    warnings: list[str] = []
    if as_of > instrument.review_date:
        warnings.append(
            f"instrument {instrument.id} was due for review on "
            f"{instrument.review_date.isoformat()}; check its source before relying on it"
        )
    if state == "unenforced":
        warnings.append(
            f"instrument {instrument.id} is in force but its authority does not enforce it"
        )
    return tuple(warnings)
