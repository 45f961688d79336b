"""Instrument files: each says what its text says, and a faulty file is refused."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from flopledger_collector.instruments.definitions import (
    LOGIC_DEPTH_MAX,
    load_instruments,
    parse_instrument,
)
from flopledger_collector.policies.definitions import load_policies
from flopledger_collector.policies.rulefiles import read_rule_text
from flopledger_core.errors import InvalidInput, UnknownName


def _packaged(instrument_id: str) -> str:
    folder = resources.files("flopledger_collector.instruments")
    return (folder / f"{instrument_id}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("instrument_id", "quantity", "threshold", "scope"),
    [
        ("eu-aia-51-2", "flop", 10**25, "ec-cumulative"),
        ("eu-gpai-1e23", "flop", 10**23, "ec-training"),
        ("us-ca-sb53", "operations", 10**26, "us-state-1e26"),
    ],
)
def test_each_packaged_instrument_compares_what_its_text_says(
    instrument_id: str, quantity: str, threshold: int, scope: str
) -> None:
    """All three texts say `greater than`; each counts its own quantity in its own scope."""
    instrument = load_instruments(load_policies())[instrument_id]
    assert (instrument.quantity, instrument.comparator) == (quantity, ">")
    assert (instrument.threshold, instrument.scope_policy) == (threshold, scope)
    assert instrument.file == f"{instrument_id}.toml"
    assert all(trigger.citation for trigger in instrument.triggers)


def test_three_instruments_are_packaged() -> None:
    """The EU's two thresholds and California's."""
    assert list(load_instruments(load_policies())) == ["eu-aia-51-2", "eu-gpai-1e23", "us-ca-sb53"]


def test_two_weeks_run_from_meeting_the_condition_and_from_knowing_that_it_will_be_met() -> None:
    """Article 52(1) starts a clock at knowledge, not only at the crossing."""
    instrument = load_instruments(load_policies())["eu-aia-51-2"]
    assert [trigger.deadline for trigger in instrument.triggers] == ["P14D", "P14D"]
    assert "becomes known" in instrument.triggers[1].event


def test_an_instrument_lists_the_facts_it_asks_for() -> None:
    """Name and question, so that a person can be asked."""
    instruments = load_instruments(load_policies())
    assert list(instruments["eu-gpai-1e23"].facts()) == [
        "generates_language",
        "generates_text_to_image",
        "generates_text_to_video",
    ]
    assert instruments["us-ca-sb53"].facts() == {}


_FACT = "{ kind = 'fact', name = 'x', question = '?' }"
_TWICE = f"kind = 'all'\nof = [{{ kind = 'threshold' }}, {_FACT}, {_FACT}]"
_NESTED = "{ kind = 'all', of = [" * 20 + "{ kind = 'threshold' }" + "]}" * 20
_DEEP = f"kind = 'all'\nof = [{_NESTED}]"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('comparator = ">"', 'comparator = "=>"', "own.toml: comparator is '=>': "),
        ('threshold = "1', 'threshold = "1e', "own.toml: threshold is '1e0"),
        (
            'threshold = "10000000000000000000000000"',
            "threshold = 1e25",
            "own.toml: threshold is 1e+25: expected `str`, got `float`",
        ),
        (
            'threshold = "10000000000000000000000000"',
            'threshold = "0"',
            "own.toml: threshold is '0': give a positive threshold",
        ),
        ('quantity = "flop"', 'quantity = "tokens"', "own.toml: quantity is 'tokens': "),
        ('kind = "threshold"', 'kind = "treshold"', "own.toml: logic.kind is 'treshold': "),
        (
            'kind = "threshold"',
            'kind = "any"\nof = []',
            "own.toml: logic.of is []: ",
        ),
        (
            'kind = "threshold"',
            'kind = "fact"\nname = "x"\nquestion = "Is it so?"',
            "own.toml: logic is 0: use the instrument's own threshold exactly once",
        ),
        (
            'kind = "threshold"',
            _TWICE,
            "own.toml: logic is 'x': ask for each fact once",
        ),
        ('kind = "threshold"', _DEEP, f"own.toml: logic is 22: nest at most {LOGIC_DEPTH_MAX}"),
        ('deadline = "P14D"', 'deadline = "two weeks"', "own.toml: triggers[0].deadline is 'two"),
        ('deadline = "P14D"', 'deadline = "P"', "own.toml: triggers[0].deadline is 'P': "),
        (
            "valid_from = 2025-08-02",
            "valid_from = 2025-08-02\nvalid_to = 2025-08-02",
            "own.toml: valid_to is '2025-08-02': end validity after its start",
        ),
        (
            'status = "in_force"',
            'status = "revoked"',
            "own.toml: valid_to is None: a revoked instrument says since when",
        ),
    ],
)
def test_a_faulty_instrument_file_is_refused_with_file_key_value_and_remedy(
    old: str, new: str, expected: str
) -> None:
    """A threshold that is silently misread would make every statement a lie."""
    text = _packaged("eu-aia-51-2")
    assert old in text
    with pytest.raises(InvalidInput) as caught:
        parse_instrument(read_rule_text("own.toml", text.replace(old, new, 1)))
    assert str(caught.value).startswith(expected), str(caught.value)


def test_an_instrument_whose_scope_is_no_loaded_policy_is_refused(tmp_path: Path) -> None:
    """A total in the wrong scope would be compared with the wrong law."""
    text = _packaged("eu-aia-51-2").replace('id = "eu-aia-51-2"', 'id = "own"')
    text = text.replace('scope_policy = "ec-cumulative"', 'scope_policy = "elsewhere"')
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UnknownName, match="scope_policy is 'elsewhere': name one of the policies"):
        load_instruments(load_policies(), tmp_path)


def test_an_instrument_of_ones_own_is_loaded_beside_the_packaged_ones(tmp_path: Path) -> None:
    """It takes an id of its own; it never replaces a law."""
    policies = load_policies()
    text = _packaged("eu-aia-51-2")
    path = tmp_path / "own.toml"
    path.write_text(text.replace('id = "eu-aia-51-2"', 'id = "own"'), encoding="utf-8")
    assert set(load_instruments(policies, tmp_path)) == {*load_instruments(policies), "own"}
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match="choose an id that no packaged or other rule file has"):
        load_instruments(policies, tmp_path)
