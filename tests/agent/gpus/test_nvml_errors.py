"""Every error of the binding has a meaning, and every meaning can be acted on."""

from __future__ import annotations

import re

import pynvml

from flopledger_agent.gpus.nvml_errors import (
    ERRORS,
    OWN_REASONS,
    UNLISTED,
    DriverError,
    meaning_of,
    remedy_for,
)


def test_every_error_of_the_binding_is_in_the_table() -> None:
    """A new pynvml with a new code fails here, not on a node."""
    codes = {name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_ERROR_")}
    assert len(codes) >= 31
    assert {name for name, code in codes.items() if code not in ERRORS} == set()


def test_reasons_are_stable_words_with_a_remedy() -> None:
    """Reasons become metric labels and record texts, remedies become advice."""
    reasons = [meaning.reason for meaning in (*ERRORS.values(), UNLISTED)]
    assert len(set(reasons)) == len(reasons)
    for reason in (*reasons, *OWN_REASONS):
        assert re.fullmatch(r"[a-z][a-z_0-9]*", reason), reason
        assert remedy_for(reason), reason
    assert not set(reasons) & set(OWN_REASONS)
    assert remedy_for("no such reason") is None


def test_an_unknown_code_is_a_fields_own_trouble() -> None:
    """A driver newer than the table loses one reading, not the node."""
    assert meaning_of(424242) is UNLISTED
    assert UNLISTED.scope == "field"
    assert "424242" in str(DriverError(424242))


def test_scopes_tell_how_far_an_error_reaches() -> None:
    """A lost GPU is the device's, a missing driver the node's, anything unclear a field's."""
    scopes = {code: ERRORS[code].scope for code in (3, 9, 15, 16, 18, 999)}
    assert scopes == {3: "field", 9: "node", 15: "device", 16: "device", 18: "node", 999: "field"}
