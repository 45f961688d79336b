"""What a counting policy is: a verdict for every activity, each resting on a cited rule.

A policy is data and decides nothing by code. It must speak of every activity in the closed list,
so that no kind of work can fall between two verdicts; saying that the text is silent is a
verdict too. Which readings are the project's own inference is marked and explained in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from flopledger_collector.policies.rulefiles import (
    Name,
    RuleId,
    RuleText,
    Sentence,
    Source,
    convert,
    directory_texts,
    packaged_texts,
    require_new_id,
    value_at,
)
from flopledger_core.activities import ACTIVITIES
from flopledger_core.errors import InvalidInput, UnknownName

# The three that every statement shows; the others give instruments the scope their text names.
HEADLINE_POLICIES: Final = ("casper-2025", "ec-cumulative", "final-run-only")

Verdict = Literal["counted", "excluded", "conditional", "silent"]
VERDICTS: Final[tuple[str, ...]] = get_args(Verdict)


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sentence of the source, in our words, and the place where it stands."""

    text: Sentence
    citation: Sentence


class ActivityRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a policy says of one activity."""

    verdict: Verdict
    rule: Sentence  # key into the policy's rules
    depends_on: Name | None = None  # the declaration that decides a conditional verdict
    inferred: bool = False  # the text does not name this work; the verdict is our reading
    note: Sentence | None = None


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A counting policy, complete: every activity has its verdict."""

    id: str
    version: str
    title: str
    status: str
    valid_from: date
    review_date: date
    source: Source
    rules: Mapping[str, Rule]
    activities: Mapping[str, ActivityRule]
    digest: str  # SHA-256 of the file's bytes
    file: str

    def rule_of(self, activity: str) -> Rule:
        """The cited sentence that the verdict on `activity` rests on."""
        return self.rules[self.activities[activity].rule]

    def warnings(self, as_of: date) -> tuple[str, ...]:
        """What a reader should know before relying on this policy at a date."""
        if as_of <= self.review_date:
            return ()
        return (f"policy {self.id} was due for review on {self.review_date.isoformat()}",)


class _PolicyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: RuleId
    version: Sentence
    title: Sentence
    status: Literal["in_force", "guidance", "published", "convention", "draft", "superseded"]
    valid_from: date
    review_date: date
    source: Source
    rules: dict[str, Any]
    activities: dict[str, Any]


def load_policies(directory: Path | None = None) -> dict[str, Policy]:
    """The packaged policies and those of one's own in `directory`, by id."""
    texts = packaged_texts("flopledger_collector.policies")
    if directory is not None:
        texts += directory_texts(directory)
    policies: dict[str, Policy] = {}
    for text in texts:
        policy = parse_policy(text)
        require_new_id(text.file, policy.id, policies)
        policies[policy.id] = policy
    return policies


def parse_policy(text: RuleText) -> Policy:
    """One policy from its file; InvalidInput names the file, the key, the value and the remedy."""
    outer = convert(text.file, "", text.content, _PolicyFile)
    rules = {
        name: convert(text.file, f"rules.{name}", rule, Rule) for name, rule in outer.rules.items()
    }
    for activity in outer.activities:
        if activity not in ACTIVITIES:
            raise UnknownName(
                f"{text.file}: activities", activity, f"use only: {', '.join(ACTIVITIES)}"
            )
    activities: dict[str, ActivityRule] = {}
    for activity in ACTIVITIES:
        if activity not in outer.activities:
            raise InvalidInput(
                f"{text.file}: activities.{activity}",
                None,
                "give every activity a verdict; write silent where the text says nothing",
            )
        activities[activity] = _activity_rule(
            text.file, activity, outer.activities[activity], rules
        )
    return Policy(
        id=outer.id,
        version=outer.version,
        title=outer.title,
        status=outer.status,
        valid_from=outer.valid_from,
        review_date=outer.review_date,
        source=outer.source,
        rules=rules,
        activities=activities,
        digest=text.digest,
        file=text.file,
    )


def _activity_rule(
    file: str, activity: str, content: object, rules: Mapping[str, Rule]
) -> ActivityRule:
    key = f"activities.{activity}"
    verdict = value_at(content, ".verdict")
    if isinstance(verdict, str) and verdict not in VERDICTS:
        raise UnknownName(f"{file}: {key}.verdict", verdict, f"use one of: {', '.join(VERDICTS)}")
    rule = convert(file, key, content, ActivityRule)
    if rule.rule not in rules:
        raise UnknownName(
            f"{file}: {key}.rule", rule.rule, "name a rule of this file; it holds the citation"
        )
    if (rule.verdict == "conditional") != (rule.depends_on is not None):
        raise InvalidInput(
            f"{file}: {key}.depends_on",
            rule.depends_on,
            "a conditional verdict, and only it, names the declaration it depends on",
        )
    if rule.inferred and rule.note is None:
        raise InvalidInput(f"{file}: {key}.note", None, "say why, where a verdict is inferred")
    return rule
