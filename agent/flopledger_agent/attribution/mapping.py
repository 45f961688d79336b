"""Mapping rules: what a site knows of its accounts, partitions and job names, as data. Pure.

A rule says what work is, never who holds a device. It is asked only where neither the job nor its
processes named a project; the first rule in the file whose patterns all match decides, alone. A
rule proposes an activity, a person confirms it; an activity nobody named stays `unclassified`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.patterns import Matcher, compile_pattern
from flopledger_agent.attribution.tag_values import Tags, require_tags
from flopledger_core.errors import InvalidInput
from flopledger_core.identity import require_project
from flopledger_core.records import Precision

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RULES_MAX: Final = 256  # each is tried for each job once
FOUND_MAX: Final = 1024  # remembered answers; forgetting them costs time only
PLACEHOLDER_PROJECT: Final = "p"  # stands in where a rule without a project is checked
GIVEN: Final = ("project", "entity", "model", "run", "activity", "precision")


class RuleMatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[attribution.rules.match]`: patterns of what the scheduler says of a job; all must match.

    A pattern is a glob (`*`, `?`, `[abc]`) or, after `re:`, a regular expression; either speaks of
    the whole value, and case counts. What a job does not have matches no pattern.
    """

    account: str | None = None
    comment: str | None = None
    wckey: str | None = None
    job_name: str | None = None
    partition: str | None = None
    namespace: str | None = None
    image: str | None = None
    user: str | None = None


class MappingRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[[attribution.rules]]`: what work is whose scheduler says such things of it."""

    match: RuleMatch
    name: str | None = None  # for people, in evidence and `check`
    project: str | None = None
    entity: str | None = None
    model: str | None = None
    run: str | None = None
    activity: str | None = None
    precision: Precision | None = None


class AttributionSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[attribution]`: whose work is that nobody tagged."""

    rules: tuple[MappingRule, ...] = ()
    default_project: str | None = None


class RuleHit(msgspec.Struct, frozen=True, kw_only=True):
    """The rule that matched, and in words which one it is."""

    rule: MappingRule
    told: str


class RuleBook:
    """Rules in the order of the file, checked and compiled once."""

    def __init__(self, rules: Iterable[MappingRule] = ()) -> None:
        """Errors: InvalidInput names the rule's field, its value and the remedy."""
        listed = tuple(rules)
        if len(listed) > RULES_MAX:
            raise InvalidInput("attribution.rules", len(listed), f"use at most {RULES_MAX} rules")
        self._rules = tuple(_compiled(number, rule) for number, rule in enumerate(listed, 1))
        self._found: dict[tuple[tuple[tuple[str, str], ...], str | None], RuleHit | None] = {}

    def __len__(self) -> int:
        return len(self._rules)

    def first(self, names: Mapping[str, str], user: str | None) -> RuleHit | None:
        """The first rule that matches what is known of a job, or of a bare process's user."""
        key = (tuple(sorted(names.items())), user)
        if key not in self._found:
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            self._found[key] = self._search(names, user)
        return self._found[key]

    def _search(self, names: Mapping[str, str], user: str | None) -> RuleHit | None:
        for hit, tests in self._rules:
            if all(
                (value := user if name == "user" else names.get(name)) is not None and test(value)
                for name, test in tests
            ):
                return hit
        return None


def _compiled(number: int, rule: MappingRule) -> tuple[RuleHit, tuple[tuple[str, Matcher], ...]]:
    field = f"attribution.rules[{number}]"
    patterns = {
        name: text for name in RuleMatch.__struct_fields__ if (text := getattr(rule.match, name))
    }
    for name in RuleMatch.__struct_fields__:
        if getattr(rule.match, name) == "":
            compile_pattern(f"{field}.match.{name}", "")
    if not patterns:
        raise InvalidInput(
            f"{field}.match", "{}", "match something; attribution.default_project is for the rest"
        )
    tests = tuple(
        (name, compile_pattern(f"{field}.match.{name}", text)) for name, text in patterns.items()
    )
    _require_gift(field, rule)
    label = f" {rule.name}" if rule.name else ""
    matched = ", ".join(f"{name}={text}" for name, text in patterns.items())
    return RuleHit(rule=rule, told=f"mapping rule {number}{label} ({matched})"), tests


def _require_gift(field: str, rule: MappingRule) -> None:
    """What a rule gives must be as sound as what a tag says."""
    if all(getattr(rule, name) is None for name in GIVEN):
        raise InvalidInput(field, rule.name or "", f"give one of: {', '.join(GIVEN)}")
    for name in GIVEN:
        if getattr(rule, name) == "":
            raise InvalidInput(f"{field}.{name}", "", "name it, or leave the key out")
    if rule.project is not None:
        require_project(rule.project, f"{field}.project")
    try:
        require_tags(
            Tags(
                project=PLACEHOLDER_PROJECT,
                entity=rule.entity,
                model=rule.model,
                run=rule.run,
                activity=rule.activity,
                precision=rule.precision,
            )
        )
    except InvalidInput as error:
        raise InvalidInput(f"{field}.{error.field}", error.value, error.remedy) from error


def require_default_project(name: str | None) -> str | None:
    """`name` if work that nobody else named may be posted to it. Errors: InvalidInput."""
    return None if name is None else require_project(name, "attribution.default_project")
