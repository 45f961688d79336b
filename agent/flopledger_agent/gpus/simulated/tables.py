"""Reading TOML tables strictly: exists so that a scenario's mistake is named where it stands.

Every accessor checks type and range and says field, value and remedy; a key nobody asked for is an
error. Numbers become exact Fractions, never floats.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Final

from flopledger_core.errors import InvalidInput

NS_PER_SECOND: Final = 1_000_000_000


class ScenarioError(InvalidInput):
    """A scenario cannot be simulated as written."""


def parse_toml(text: str) -> dict[str, object]:
    """Read TOML with every decimal number kept exact (as a Fraction)."""
    try:
        return tomllib.loads(text, parse_float=_exact)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError("scenario", str(error), "write valid TOML") from error


def _exact(text: str) -> Fraction:
    try:
        return Fraction(text.replace("_", ""))
    except ValueError as error:
        raise ScenarioError("scenario", text, "write a finite decimal number") from error


def exact_number(field: str, value: object) -> Fraction:
    """`value` as an exact number: an integer, a Fraction, a Decimal, or a float as it prints."""
    if isinstance(value, bool) or not isinstance(value, int | Fraction | Decimal | float):
        raise ScenarioError(field, value, "give a number")
    try:
        return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
    except (ValueError, OverflowError) as error:
        raise ScenarioError(field, value, "give a finite number") from error


def whole_nanoseconds(field: str, seconds: Fraction) -> int:
    """`seconds` in nanoseconds; the simulated clock knows nothing finer."""
    nanoseconds = seconds * NS_PER_SECOND
    if nanoseconds < 0 or nanoseconds.denominator != 1:
        raise ScenarioError(field, str(seconds), "give seconds >= 0, at most nine decimals")
    return nanoseconds.numerator


class Table:
    """One TOML table being read: remembers where it stands and which keys were asked for."""

    def __init__(self, path: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise ScenarioError(path or "scenario", values, "write a table here")
        self.path = path
        self._values: Mapping[str, object] = values
        self._left = set(self._values)

    def field(self, key: str) -> str:
        """The full name of a key, for error messages."""
        return f"{self.path}.{key}" if self.path else key

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> Iterator[str]:
        """Every key in the order written."""
        return iter(self._values)

    def take(self, key: str) -> object | None:
        """The raw value, or None when absent; counts as asked for."""
        self._left.discard(key)
        return self._values.get(key)

    def finish(self) -> None:
        """Refuse keys that nothing asked for: a typing mistake must not be ignored."""
        for key in sorted(self._left):
            raise ScenarioError(self.field(key), self._values[key], "remove this unknown key")

    def text(self, key: str, default: str | None = None) -> str:
        """A non-empty string."""
        value = self.take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise ScenarioError(self.field(key), value, "give a non-empty string")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        """A string out of a closed list."""
        value = self.text(key, default)
        if value not in choices:
            raise ScenarioError(self.field(key), value, f"use one of {', '.join(choices)}")
        return value

    def integer(self, key: str, default: int | None = None, *, at_least: int = 0) -> int:
        """A whole number >= `at_least`; a decimal such as 1755.0 is accepted when it is whole."""
        value = self.take(key)
        if value is None and default is not None:
            return default
        number = exact_number(self.field(key), value)
        if number.denominator != 1 or number < at_least:
            raise ScenarioError(self.field(key), value, f"give a whole number >= {at_least}")
        return number.numerator

    def number(self, key: str, default: Fraction | int | None = None) -> Fraction:
        """An exact number >= 0."""
        value = self.take(key)
        if value is None and default is not None:
            return Fraction(default)
        number = exact_number(self.field(key), value)
        if number < 0:
            raise ScenarioError(self.field(key), value, "give a number >= 0")
        return number

    def ratio(self, key: str, default: Fraction | int | None = None) -> Fraction:
        """An exact number from 0 to 1."""
        number = self.number(key, default)
        if number > 1:
            raise ScenarioError(self.field(key), float(number), "give a ratio from 0 to 1")
        return number

    def nanoseconds(self, key: str) -> int:
        """A duration or instant written in seconds, as whole nanoseconds."""
        return whole_nanoseconds(self.field(key), self.number(key))

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ScenarioError(self.field(key), value, "write true or false")
        return value

    def table(self, key: str) -> Table:
        """A table, empty when absent."""
        return Table(self.field(key), self.take(key) or {})

    def tables(self, key: str) -> list[Table]:
        """An array of tables, empty when absent."""
        return [Table(f"{self.field(key)}[{i}]", row) for i, row in enumerate(self._list(key))]

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings, empty when absent."""
        items = self._list(key)
        if not all(isinstance(item, str) for item in items):
            raise ScenarioError(self.field(key), items, "give a list of strings")
        return tuple(str(item) for item in items)

    def integers(self, key: str) -> tuple[int, ...]:
        """An array of whole numbers, empty when absent."""
        items = self._list(key)
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise ScenarioError(self.field(key), items, "give a list of whole numbers")
        return tuple(int(str(item)) for item in items)

    def _list(self, key: str) -> list[object]:
        value = self.take(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ScenarioError(self.field(key), value, "give a list")
        return list(value)
