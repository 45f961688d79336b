"""How amounts are written for people: once, for terminal, pages and Markdown alike.

Everything is rendered from exact integers and fractions; a rendered figure is never read back.
An open high end is written as such and never as a number.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from flopledger_core.units import (
    MJ_PER_KWH,
    MS_PER_HOUR,
    MS_PER_SECOND,
    decimal_text,
    scientific,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_collector.instruments.comparison import Ratio
    from flopledger_core.bounds import Bounds

OPEN: Final = "open"
ABSENT: Final = "-"
SMALLEST_THREE_DIGITS: Final = Fraction(1, 1000)  # per cent; below it two digits say enough
PLAIN_PLACES_MAX: Final = 6  # decimal places; beyond them a power of ten reads better
LARGEST_PER_CENT: Final = Fraction(1000)  # from ten times on, "times" reads better
CENTS_PER_UNIT: Final = 100
HUNDRED: Final = 100  # the least number of three digits
# Control characters and those that turn the direction of text: they could forge a line.
_CONTROL: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"
)

UNITS: Final[dict[str, str]] = {
    "flop": "FLOP",
    "operations": "operations",
    "energy_mj": "kWh",
    "gpu_time_ms": "GPU-hours",
    "cost_cents": "",
}
VERDICT_WORDS: Final[dict[str, str]] = {
    "below": "below",
    "may_exceed": "may exceed",
    "exceeds": "EXCEEDED",
    "undetermined": "undetermined",
    "not_in_force": "not in force",
}


def one_line(text: str | None) -> str:
    """Text from outside as one harmless line; a dash for none."""
    return _CONTROL.sub(" ", text) if text else ABSENT


def amount(quantity: str, value: int) -> str:
    """An amount of a budget's or an instrument's quantity, without its unit."""
    if quantity == "energy_mj":
        return kilowatt_hours(value)
    if quantity == "gpu_time_ms":
        return gpu_hours(value)
    if quantity == "cost_cents":
        return decimal_text(value, CENTS_PER_UNIT, 2)
    return scientific(value)


def unit(quantity: str, currency: str | None = None) -> str:
    """The unit that people see for a quantity."""
    return currency if currency is not None else UNITS[quantity]


def span(bounds: Bounds, write: Callable[[int], str]) -> str:
    """`central [low, high]`; only the figure where nothing is left open."""
    central = write(bounds.central)
    if bounds.is_exact:
        return central
    high = OPEN if bounds.high is None else write(bounds.high)
    return f"{central} [{write(bounds.low)}, {high}]"


def flop(bounds: Bounds | None) -> str:
    """Bounds in FLOP, or in operations; a dash where nothing speaks of them."""
    return ABSENT if bounds is None else span(bounds, scientific)


def energy(bounds: Bounds | None) -> str:
    """Bounds in mJ as kWh, without the unit; a dash where nothing speaks of energy."""
    return ABSENT if bounds is None else span(bounds, kilowatt_hours)


def hours(bounds: Bounds | None) -> str:
    """Bounds in ms of GPU time as GPU-hours, without the unit; a dash where nothing does."""
    return ABSENT if bounds is None else span(bounds, gpu_hours)


def seconds(bounds: Bounds | None) -> str:
    """Bounds in ms of CPU time as CPU-seconds, without the unit; a dash where nothing does."""
    return ABSENT if bounds is None else span(bounds, cpu_seconds)


def cpu_seconds(time_ms: int) -> str:
    """Milliseconds as seconds: whole from a thousand on, with all digits below."""
    if abs(time_ms) >= MS_PER_SECOND * MS_PER_SECOND:
        return decimal_text(time_ms, MS_PER_SECOND, 0)
    return decimal_text(time_ms, MS_PER_SECOND, 3).rstrip("0").rstrip(".")


def kilowatt_hours(energy_mj: int) -> str:
    """Millijoules as kWh, three digits at least: only nothing is written as nothing."""
    return _at_every_size(Fraction(energy_mj, MJ_PER_KWH), 3)


def gpu_hours(time_ms: int) -> str:
    """Milliseconds of GPU time as hours; a job of seconds is no zero."""
    return _at_every_size(Fraction(time_ms, MS_PER_HOUR), 2)


def _at_every_size(value: Fraction, places: int) -> str:
    """Decimal text with so many places, and with three digits where those would be fewer."""
    if value == 0:
        return "0"
    if abs(value) >= 1:
        return decimal_text(value.numerator, value.denominator, places)
    shown = 3
    while shown < PLAIN_PLACES_MAX and abs(value) * 10**shown < HUNDRED:
        shown += 1
    text = decimal_text(value.numerator, value.denominator, shown)
    return text.rstrip("0") if abs(value) * 10**shown >= 1 else _small(value)


def counted(count: int, name: str) -> str:
    """A count with its noun, in the plural where it is not one."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def signed(value: int | None) -> str:
    """A difference in FLOP with its sign; open where one end is."""
    if value is None:
        return OPEN
    return f"+{scientific(value)}" if value > 0 else scientific(value)


def quantity_span(quantity: str, bounds: Bounds) -> str:
    """Bounds of any quantity, without the unit."""
    return span(bounds, lambda value: amount(quantity, value))


def per_cent(share: Fraction) -> str:
    """A share as per cent with three significant digits; tiny ones as a power of ten."""
    value = share * 100
    if value == 0:
        return "0 %"
    if value >= LARGEST_PER_CENT:
        return f"{scientific(int(share))} times"
    if value < SMALLEST_THREE_DIGITS:
        return f"{_small(value)} %"
    places = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4
    text = decimal_text(value.numerator, value.denominator, places)
    return f"{text.rstrip('0').rstrip('.') if places else text} %"


def _small(value: Fraction) -> str:
    exponent, mantissa = 0, value
    while mantissa < 1:
        mantissa *= 10
        exponent -= 1
    if 1 - exponent <= PLAIN_PLACES_MAX:
        return decimal_text(value.numerator, value.denominator, 1 - exponent)
    digits = decimal_text(mantissa.numerator, mantissa.denominator, 1)
    return f"{digits.removesuffix('.0')}e{exponent}"


def ratio(reached: Ratio | None) -> str:
    """The central share of a limit, with its bounds where they differ."""
    if reached is None:
        return "no share of a limit of zero"
    central = per_cent(reached.central)
    if reached.low == reached.high:
        return central
    high = OPEN if reached.high is None else per_cent(reached.high)
    return f"{central} [{per_cent(reached.low)}, {high}]"


def instant(unix_ms: int | None) -> str:
    """An instant in UTC to the second; a dash for none."""
    if unix_ms is None:
        return ABSENT
    moment = datetime.fromtimestamp(unix_ms // MS_PER_SECOND, tz=UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")
