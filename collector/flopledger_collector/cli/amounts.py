"""Amounts as people type them, read exactly: `1e20`, `3.5e24`, `12.34`, `2025-11-24`.

Nothing passes through floating point. What is not a whole number of the ledger's unit (a fraction
of a FLOP, of a millijoule, of a cent) is refused and never rounded.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from fractions import Fraction
from typing import Final

import click

from flopledger_core.units import MJ_PER_KWH, MS_PER_HOUR, MS_PER_SECOND

CHARACTERS_MAX: Final = 80  # more than the longest amount a record can hold
AMOUNT_MAX: Final = 10**29  # in the ledger's unit; sums of many such still fit its two limbs
AMOUNT_MAX_TEXT: Final = "1e29"
EXPONENT_MAX: Final = 60  # what is beyond is never computed
CENTS_PER_UNIT: Final = 100
_DECIMAL: Final = re.compile(r"[0-9]+(\.[0-9]+)?([eE]\+?(?P<exponent>[0-9]{1,3}))?")
_SIGNED: Final = re.compile(r"-[0-9.]")


class ExactAmount(click.ParamType[int]):
    """A non-negative decimal, times a factor, as a whole number."""

    def __init__(self, name: str, factor: int, what: str, example: str) -> None:
        self.name = name
        self._factor = factor
        self._what = what
        self._example = example

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The amount in the ledger's unit."""
        if isinstance(value, int):
            return value
        text = str(value).strip()
        found = _DECIMAL.fullmatch(text) if len(text) <= CHARACTERS_MAX else None
        if found is None:
            why = "negative" if _SIGNED.match(text) else "not a plain decimal"
            self.fail(f"{text[:CHARACTERS_MAX]!r} is {why}: give {self._example}", param, ctx)
        too_large = f"{text!r} is too large: give at most {AMOUNT_MAX_TEXT} {self._what}"
        if int(found["exponent"] or 0) > EXPONENT_MAX:
            self.fail(too_large, param, ctx)
        exact = Fraction(text) * self._factor
        if exact.denominator != 1:
            self.fail(f"{text!r} is not a whole number of {self._what}: round it", param, ctx)
        if exact > AMOUNT_MAX:
            self.fail(too_large, param, ctx)
        return exact.numerator


OPERATIONS: Final = ExactAmount(
    "operations", 1, "operations", "an amount such as 0, 1e20 or 125000"
)
FLOP: Final = ExactAmount("flop", 1, "FLOP", "an amount such as 1e20, 3.5e24 or 125000")
KILOWATT_HOURS: Final = ExactAmount(
    "kwh", MJ_PER_KWH, "millijoules", "kilowatt-hours such as 1250 or 0.75"
)
GPU_HOURS: Final = ExactAmount(
    "hours", MS_PER_HOUR, "milliseconds", "GPU-hours such as 370000 or 12.5"
)
MONEY: Final = ExactAmount("amount", CENTS_PER_UNIT, "hundredths", "an amount such as 1234.56")


class Currency(click.ParamType[str]):
    """An ISO 4217 code."""

    name = "code"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """Three capital letters."""
        text = str(value).upper()
        if re.fullmatch("[A-Z]{3}", text) is None:
            self.fail(f"{value!r} is no currency: give three letters such as USD", param, ctx)
        return text


class Day(click.ParamType[int]):
    """A UTC day, as the Unix milliseconds it begins at."""

    name = "YYYY-MM-DD"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Midnight UTC."""
        if isinstance(value, int):
            return value
        try:
            day = datetime.strptime(str(value), "%Y-%m-%d").replace(tzinfo=UTC)
        except ValueError:
            self.fail(f"{value!r} is no day: write it as YYYY-MM-DD", param, ctx)
        if day.year < 1970:
            self.fail(f"{value!r} is too early: name a day from 1970 on", param, ctx)
        return int(day.timestamp()) * MS_PER_SECOND


CURRENCY: Final = Currency()
DAY: Final = Day()
