"""Units and their conversions: the only place where a factor of a thousand is written down.

Inside, amounts are integers: FLOP, SM-cycles, millijoules, milliseconds, nanoseconds. People see
SI prefixes and kWh, made here and nowhere else; a rendered figure is never read back.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final

NS_PER_MS: Final = 1_000_000
NS_PER_SECOND: Final = 1_000_000_000
US_PER_MS: Final = 1_000
MS_PER_SECOND: Final = 1_000
MS_PER_MINUTE: Final = 60_000
MS_PER_HOUR: Final = 3_600_000
MS_PER_DAY: Final = 86_400_000
MJ_PER_JOULE: Final = 1_000
MJ_PER_KWH: Final = 3_600_000_000
HZ_PER_MHZ: Final = 1_000_000
HZ_PER_KHZ: Final = 1_000

INT64_MAX: Final = 2**63 - 1
UNIX_MS_MAX: Final = (
    253_402_300_799_999  # 9999-12-31T23:59:59.999Z, the last instant ISO 8601 writes
)


def floor_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator` rounded down."""
    return numerator // denominator


def ceil_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator` rounded up."""
    return -(-numerator // denominator)


def round_half_even(value: Fraction) -> int:
    """The nearest integer; a tie goes to the even one. Rounding happens once, at the end."""
    return round(value)


def scientific(amount: int, digits: int = 3) -> str:
    """An exact integer as people read FLOP: `1.26e+25` becomes `1.26e25`; small ones stay plain.

    Computed on the decimal digits, so no amount is too large; ties round half to even.
    """
    if amount < 0:
        return "-" + scientific(-amount, digits)
    text = str(amount)
    exponent = len(text) - 1
    if exponent < 4:
        return text
    scaled = round(Fraction(amount, 10 ** (exponent - digits + 1)))
    if scaled >= 10**digits:
        scaled //= 10
        exponent += 1
    mantissa = str(scaled)
    fraction = mantissa[1:].rstrip("0")
    return f"{mantissa[0]}{'.' + fraction if fraction else ''}e{exponent}"


def kilowatt_hours(energy_mj: int, places: int = 3) -> str:
    """Millijoules as kWh with a fixed number of decimal places, rounded half to even."""
    scaled = round(Fraction(energy_mj * 10**places, MJ_PER_KWH))
    return _fixed(scaled, places)


def gpu_hours(time_ms: int, places: int = 2) -> str:
    """Milliseconds of GPU time as hours with a fixed number of decimal places."""
    scaled = round(Fraction(time_ms * 10**places, MS_PER_HOUR))
    return _fixed(scaled, places)


def decimal_text(numerator: int, denominator: int, places: int) -> str:
    """`numerator / denominator` as decimal text with `places` decimals, rounded half to even."""
    return _fixed(round(Fraction(numerator * 10**places, denominator)), places)


def _fixed(scaled: int, places: int) -> str:
    sign = "-" if scaled < 0 else ""
    digits = str(abs(scaled)).rjust(places + 1, "0")
    if places == 0:
        return sign + digits
    return f"{sign}{digits[:-places]}.{digits[-places:]}"
