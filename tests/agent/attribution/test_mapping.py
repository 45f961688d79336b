"""Mapping rules are data: checked when read, first match wins, and no value makes them slow."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.mapping import (
    RULES_MAX,
    MappingRule,
    RuleBook,
    require_default_project,
)
from flopledger_agent.attribution.patterns import (
    PATTERN_LENGTH_MAX,
    VALUE_LENGTH_MAX,
    compile_pattern,
)
from flopledger_agent.cli import main
from flopledger_agent.config import parse_config
from flopledger_agent.errors import ConfigError
from flopledger_core.errors import InvalidInput
from tests.agent.gpus.nodes import scenario as node_scenario

if TYPE_CHECKING:
    from pathlib import Path

NAMES = {
    "account": "proj-atlas", "comment": "x", "wckey": "w", "job_name": "sft-llama-3",
    "partition": "h100", "namespace": "team-a", "image": "reg.example/train:1",
}  # fmt: skip


def hit(*rules: MappingRule, user: str | None = "alice") -> str | None:
    """What the first matching rule is called, among rules held against the same job."""
    found = RuleBook(rules).first(NAMES, user)
    return None if found is None else found.told


def rule(match: dict[str, str], **gives: str) -> MappingRule:
    """A rule as the configuration would hold it."""
    return msgspec.convert({"match": match, **gives}, MappingRule)


@pytest.mark.parametrize(
    ("match", "matches"),
    [
        ({"account": "proj-atlas"}, True),
        ({"account": "proj-*"}, True),
        ({"account": "atlas"}, False),
        ({"account": "PROJ-*"}, False),
        ({"account": "proj-?tlas", "partition": "[hv]100"}, True),
        ({"account": "proj-*", "partition": "a100"}, False),
        ({"comment": "?", "wckey": "*"}, True),
        ({"job_name": "re:(?:sft|rl)-[a-z]+-\\d{1,2}"}, True),
        ({"job_name": "re:sft"}, False),
        ({"job_name": "re:sft|sft-llama-3"}, True),
        ({"namespace": "team-*", "image": "*/train:*"}, True),
        ({"user": "alice"}, True),
        ({"user": "re:bob"}, False),
    ],
)
def test_patterns_speak_of_the_whole_value(match: dict[str, str], matches: bool) -> None:
    """Globs and regular expressions alike; every pattern of a rule must match."""
    assert (hit(rule(match, project="p")) is not None) == matches


def test_the_first_rule_that_matches_decides() -> None:
    """In the order of the file, alone, and evidence names it."""
    first = rule({"account": "proj-*"}, project="one", name="atlas people")
    second = rule({"account": "proj-atlas"}, project="two")
    assert hit(first, second) == "mapping rule 1 atlas people (account=proj-*)"
    assert hit(rule({"account": "x"}, project="no"), second, first) == (
        "mapping rule 2 (account=proj-atlas)"
    )


def test_what_a_job_does_not_have_matches_nothing() -> None:
    """Not even a star."""
    assert RuleBook([rule({"wckey": "*"}, project="p")]).first({}, None) is None
    assert hit(rule({"user": "*"}, project="p"), user=None) is None


@pytest.mark.parametrize(
    ("bad", "field", "remedy"),
    [
        (rule({}, project="p"), "attribution.rules[1].match", "match something"),
        (rule({"account": ""}, project="p"), "attribution.rules[1].match.account", "pattern"),
        (rule({"account": "a"}), "attribution.rules[1]", "give one of"),
        (rule({"account": "a"}, project=""), "attribution.rules[1].project", "leave the key out"),
        (rule({"account": "a"}, project="a b"), "attribution.rules[1].project", "letters"),
        (rule({"account": "a"}, project="idle"), "attribution.rules[1].project", "account of the"),
        (rule({"account": "a"}, activity="magic"), "attribution.rules[1].activity", "use one of"),
        (rule({"account": "a"}, run="\n"), "attribution.rules[1].run", "letters"),
        (rule({"account": "a" * 257}, project="p"), "attribution.rules[1].match.account", "1 to"),
        (rule({"account": "*" * 9}, project="p"), "attribution.rules[1].match.account", "stars"),
    ],
)
def test_a_bad_rule_is_refused_with_field_value_and_remedy(
    bad: MappingRule, field: str, remedy: str
) -> None:
    """When the configuration is read, never when a job comes."""
    with pytest.raises(InvalidInput, match=remedy) as caught:
        RuleBook([bad])
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["idle", "a b", ""])
def test_a_default_project_is_checked_like_a_tag(name: str) -> None:
    """It is a project's name or nothing."""
    with pytest.raises(InvalidInput, match=r"attribution\.default_project is"):
        require_default_project(name)
    assert require_default_project("atlas") == "atlas"
    assert require_default_project(None) is None


def test_there_is_an_end_to_rules() -> None:
    """More than anybody reads would cost every job."""
    one = rule({"account": "a"}, project="p")
    assert len(RuleBook([one] * RULES_MAX)) == RULES_MAX
    with pytest.raises(InvalidInput, match="at most"):
        RuleBook([one] * (RULES_MAX + 1))


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+", "(a|a)*", "(?:a){2}", "(?P<n>a)", "(?=a)", "(?i)a", r"(a)\1", r"a\b", "a**",
        "*a", "a{", "a{,}", "[a", "(a", "a)", "a*b*c*", "a+.*b{2,}", "x?" * 21, r"a\pb",
        "(a|a)" * 21, "(?:a|a|(a|a))" * 9, "a{0,99}" * 4,
    ],
)  # fmt: skip
def test_an_expression_that_could_be_slow_or_is_none_is_refused(expression: str) -> None:
    """Only single characters and sets repeat, at most twice without an end."""
    with pytest.raises(InvalidInput, match="f is"):
        compile_pattern("f", f"re:{expression}")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (r"a\{2\}", "a{2}"), (r"[]x]+", "]x"), (r"[^]]", "x"), (r"[\]a]*", "]a"),
        ("a{2,3}?b", "aab"),
        ("a*?b++", "aabb"), (r"^\w+$", "run_1"), (r"(a|b)c", "bc"), (r"\.\-\/", ".-/"), ("", ""),
        (".*-(sft|rl|dpo)-.*", "x-rl-y"), ("|".join(map(str, range(60))), "59"),
    ],
)  # fmt: skip
def test_ordinary_expressions_are_taken(expression: str, value: str) -> None:
    """What sites write."""
    assert compile_pattern("f", f"re:{expression}")(value)


CONFIG = """
[attribution]
default_project = "rest"
[[attribution.rules]]
name = "all of alice"
match = { user = "al*" }
project = "atlas"
precision = "bf16"
"""


def test_rules_come_from_the_configuration_and_bad_ones_are_refused_there() -> None:
    """With the file's name; unknown keys are errors as everywhere."""
    config = parse_config(CONFIG, "agent.toml")
    assert config.attribution.rules[0].project == "atlas"
    for old, new, named in (
        ('"al*"', '"re:(a+)+"', r"agent.toml: attribution.rules\[1\].match.user is 're:\(a"),
        ('"rest"', '"a b"', r"agent.toml: attribution.default_project is 'a b'"),
        ("user =", "uzer =", "uzer"),
        ('"bf16"', '"fp7"', "fp7"),
    ):
        with pytest.raises(ConfigError, match=named):
            parse_config(CONFIG.replace(old, new), "agent.toml")


def test_check_tells_which_rule_matched(tmp_path: Path) -> None:
    """For each GPU, beside whose it is now."""
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(node_scenario())
    path = tmp_path / "agent.toml"
    path.write_text(
        f'{CONFIG}[gpus]\ndriver = "simulated"\nscenario = "{scenario}"\n'
        f'[state]\ndirectory = "{tmp_path}/state"\n[tags]\nsocket = "{tmp_path}/tags.sock"\n'
        '[collector]\nurl = "http://127.0.0.1:9"\n'
    )
    told = CliRunner().invoke(main, ("check", "--config", str(path))).output
    assert "atlas, unclassified, bf16, user alice: mapping rule 1 all of alice (user=al*)" in told


@given(st.text(alphabet="ab|()[]*+?{}1,.\\d^$:-", min_size=1, max_size=40), st.sampled_from("ab1"))
def test_no_taken_expression_can_be_made_slow(expression: str, filling: str) -> None:
    """Against the longest values, nearly matching: a second is far more than any needs."""
    try:
        matches = compile_pattern("f", f"re:{expression}")
    except InvalidInput:
        return
    began = time.perf_counter()
    matches(filling * (VALUE_LENGTH_MAX - 1) + "!")
    assert time.perf_counter() - began < 1


@given(st.text(max_size=PATTERN_LENGTH_MAX), st.text(max_size=VALUE_LENGTH_MAX))
def test_any_text_is_a_pattern_or_is_refused(text: str, value: str) -> None:
    """Nothing else is ever raised, whatever stands in the file or in a job."""
    with contextlib.suppress(InvalidInput):
        compile_pattern("f", text)(value)


def test_a_value_that_is_too_long_matches_nothing() -> None:
    """A comment of megabytes costs nothing."""
    assert compile_pattern("f", "*")("x" * VALUE_LENGTH_MAX)
    assert not compile_pattern("f", "*")("x" * (VALUE_LENGTH_MAX + 1))
