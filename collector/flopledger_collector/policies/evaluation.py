"""One project's total under one policy, itemised, and the bridge between two such totals.

No single total satisfies every standard, so the same amounts are read under several policies and
the difference is explained activity by activity, exactly. What a policy leaves silent or hangs
on a declaration contributes from zero to all of it. Its central figure is all of it: work counts
until someone justifies otherwise, and a central that assumed exemptions would reward silence.

The order in which amounts come in never matters, and more work never lowers a total.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import msgspec

from flopledger_collector.policies.definitions import Policy, Verdict
from flopledger_core.activities import ACTIVITIES, require_activity
from flopledger_core.bounds import ZERO, Bounds, total
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.flop import Work

# FLOP alone (the EU's quantity), or integer and floating-point operations together (the states').
Quantity = Literal["flop", "operations"]


class PolicyLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line item: an activity's amount, what the policy makes of it, and why."""

    activity: str
    verdict: Verdict
    amount: Bounds  # as the ledger has it
    contribution: Bounds  # to the policy's total
    rule: str
    rule_text: str
    citation: str
    depends_on: str | None
    inferred: bool
    note: str | None


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    """A total under a policy; the lines' contributions add up to it exactly."""

    policy_id: str
    policy_version: str
    policy_title: str
    policy_digest: str
    quantity: str
    total: Bounds
    lines: tuple[PolicyLine, ...]

    def undeclared(self) -> tuple[str, ...]:
        """The declarations that would narrow this total, each once, in order of the lines."""
        names = (line.depends_on for line in self.lines if line.amount != ZERO)
        return tuple(dict.fromkeys(name for name in names if name is not None))


class BridgeStep(msgspec.Struct, frozen=True, kw_only=True):
    """What one activity adds on the way from the first total to the second; signed.

    `high` is None where a contribution's high end is open: open ends have no difference.
    """

    activity: str
    from_verdict: Verdict
    to_verdict: Verdict
    from_contribution: Bounds
    to_contribution: Bounds
    low: int
    central: int
    high: int | None


class Bridge(msgspec.Struct, frozen=True, kw_only=True):
    """Every category that makes two policies' totals differ; the steps add up exactly."""

    from_policy: str
    to_policy: str
    quantity: str
    from_total: Bounds
    to_total: Bounds
    steps: tuple[BridgeStep, ...]


def contribution(policy: Policy, activity: str, amount: Bounds) -> Bounds:
    """What `amount` of an activity adds to the policy's total."""
    verdict = policy.activities[require_activity(activity)].verdict
    if verdict == "counted":
        return amount
    if verdict == "excluded":
        return ZERO
    return amount.possibly_none()


def quantity_of(work: Work, quantity: Quantity) -> Bounds:
    """The one quantity of `work` that a policy view or an instrument speaks of."""
    if quantity == "flop":
        return work.flop
    if quantity == "operations":
        return work.operations
    raise UnknownName("quantity", quantity, f"use one of: {', '.join(get_args(Quantity))}")


def amounts_of(works: Mapping[str, Work], quantity: Quantity) -> dict[str, Bounds]:
    """Per activity, the one quantity of its work."""
    return {activity: quantity_of(work, quantity) for activity, work in works.items()}


def view(policy: Policy, amounts: Mapping[str, Bounds], quantity: Quantity) -> PolicyView:
    """The total of `amounts` by activity under `policy`, with a line for each activity given."""
    for activity in amounts:
        require_activity(activity)
    lines = tuple(
        _line(policy, activity, amounts[activity]) for activity in ACTIVITIES if activity in amounts
    )
    return PolicyView(
        policy_id=policy.id,
        policy_version=policy.version,
        policy_title=policy.title,
        policy_digest=policy.digest,
        quantity=quantity,
        total=total(line.contribution for line in lines),
        lines=lines,
    )


def views(
    policies: Iterable[Policy], works: Mapping[str, Work], quantity: Quantity
) -> tuple[PolicyView, ...]:
    """The same works under several policies, in the order of the policies."""
    amounts = amounts_of(works, quantity)
    return tuple(view(policy, amounts, quantity) for policy in policies)


def bridge(first: PolicyView, second: PolicyView) -> Bridge:
    """From the first view's total to the second's; both must be views of the same amounts."""
    if first.quantity != second.quantity:
        raise InvalidInput(
            "bridge", (first.quantity, second.quantity), "bridge views of one quantity"
        )
    before = [(line.activity, line.amount) for line in first.lines]
    after = [(line.activity, line.amount) for line in second.lines]
    if before != after:
        raise InvalidInput(
            "bridge",
            (first.policy_id, second.policy_id),
            "bridge two views of the same amounts, taken at the same checkpoint",
        )
    pairs = zip(first.lines, second.lines, strict=True)
    return Bridge(
        from_policy=first.policy_id,
        to_policy=second.policy_id,
        quantity=first.quantity,
        from_total=first.total,
        to_total=second.total,
        steps=tuple(_step(a, b) for a, b in pairs if a.contribution != b.contribution),
    )


def _line(policy: Policy, activity: str, amount: Bounds) -> PolicyLine:
    said = policy.activities[activity]
    rule = policy.rule_of(activity)
    return PolicyLine(
        activity=activity,
        verdict=said.verdict,
        amount=amount,
        contribution=contribution(policy, activity, amount),
        rule=said.rule,
        rule_text=rule.text,
        citation=rule.citation,
        depends_on=said.depends_on,
        inferred=said.inferred,
        note=said.note,
    )


def _step(first: PolicyLine, second: PolicyLine) -> BridgeStep:
    before, after = first.contribution, second.contribution
    is_open = before.high is None or after.high is None
    return BridgeStep(
        activity=first.activity,
        from_verdict=first.verdict,
        to_verdict=second.verdict,
        from_contribution=before,
        to_contribution=after,
        low=after.low - before.low,
        central=after.central - before.central,
        high=None if is_open else _difference(after.high, before.high),
    )


def _difference(after: int | None, before: int | None) -> int:
    assert after is not None
    assert before is not None
    return after - before
