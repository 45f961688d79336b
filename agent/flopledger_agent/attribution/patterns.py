"""Patterns of mapping rules: globs, and regular expressions that cannot be made slow.

What a pattern is held against (a job's name, its comment) is chosen by whoever submits the job.
So a pattern always speaks of the whole value, and a regular expression repeats only single
characters and sets; the ways in which it can match a value, each of which a machine may have to
try, are multiplied beforehand and limited. No value makes it backtrack for long.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING, Final, TypeAlias

from flopledger_core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

REGEX_PREFIX: Final = "re:"
PATTERN_LENGTH_MAX: Final = 256
VALUE_LENGTH_MAX: Final = 512  # a longer value matches nothing
STARS_MAX: Final = 8  # of a glob
# Ways through a regular expression: a repeat without an end has as many as a value characters, a
# choice as many as alternatives. A million and a half take tens of milliseconds, once for a job.
WAYS_MAX: Final = 6 * VALUE_LENGTH_MAX**2

_COUNTED: Final = re.compile(r"\{([0-9]{1,3})?(,)?([0-9]{1,3})?\}")
_SET: Final = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]")
_ESCAPE: Final = re.compile(r"\\[^0-9A-Za-z]|\\[dDsSwW]")

Matcher: TypeAlias = "Callable[[str], bool]"


def compile_pattern(field: str, text: str) -> Matcher:
    """A test of whole values. Errors: InvalidInput names the field, the pattern and the remedy."""
    if not text or len(text) > PATTERN_LENGTH_MAX:
        raise InvalidInput(field, text, f"give a pattern of 1 to {PATTERN_LENGTH_MAX} characters")
    if not text.startswith(REGEX_PREFIX):
        if text.count("*") > STARS_MAX:
            raise InvalidInput(field, text, f"use at most {STARS_MAX} stars")
        return _matcher(re.compile(fnmatch.translate(text)))
    expression = text.removeprefix(REGEX_PREFIX)
    trouble = _trouble(expression)
    if trouble is not None:
        raise InvalidInput(field, text, trouble)
    try:
        return _matcher(re.compile(expression, re.ASCII))
    except re.error as error:
        raise InvalidInput(
            field, text, f"write a valid regular expression after {REGEX_PREFIX} ({error})"
        ) from error


def _matcher(compiled: re.Pattern[str]) -> Matcher:
    def matches(value: str) -> bool:
        return len(value) <= VALUE_LENGTH_MAX and compiled.fullmatch(value) is not None

    return matches


def _trouble(expression: str) -> str | None:
    """Why an expression is not taken; None when nothing can make it slow."""
    at, ways = 0, 1
    alternatives = [1]  # of the group that is open, below those around it
    single = False  # whether what was read last is one character or one set of them
    while at < len(expression):
        character = expression[at]
        if character in "*+?{":
            length, choices = _repeat(expression[at:])
            if length == 0:
                return r"write \{ for a brace, or {n}, {n,} or {n,m} for a repeat"
            if not single:
                return "repeat only single characters and sets, not groups or repeats"
            single = False
            ways *= choices
            at += length
            continue
        if expression.startswith("(?", at) and not expression.startswith("(?:", at):
            return "use no groups other than (...) and (?:...)"
        length, single = _piece(expression, at)
        if length == 0:
            return r"use no escapes but \d \D \s \S \w \W and those of punctuation"
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
        at += length
    if ways * alternatives[0] > WAYS_MAX:
        return "use fewer repeats and alternatives: at most two repeats without an end"
    return None


def _piece(expression: str, at: int) -> tuple[int, bool]:
    """Length of the next piece, 0 if it is not taken; and whether it may be repeated."""
    character = expression[at]
    if character == "\\":
        escape = _ESCAPE.match(expression, at)
        return (0, False) if escape is None else (2, True)
    if character == "[":
        found = _SET.match(expression, at)
        return (1, True) if found is None else (len(found.group()), True)  # unclosed: re refuses it
    if expression.startswith("(?:", at):
        return 3, False
    return 1, character not in "()|^$"


def _repeat(text: str) -> tuple[int, int]:
    """Length of a repeat with its mode, 0 if it is none; and in how many ways it can match."""
    if text[0] != "{":
        length, choices = 1, 2 if text[0] == "?" else VALUE_LENGTH_MAX
    else:
        found = _COUNTED.match(text)
        if found is None or not (found[1] or found[3]):
            return 0, 0
        low, high = int(found[1] or 0), found[3]
        if not found[2]:
            choices = 1
        else:
            choices = VALUE_LENGTH_MAX if not high else max(1, int(high) - low + 1)
        length = len(found.group())
    return length + (text[length : length + 1] in {"?", "+"}), choices
