"""The geometry of a bar: where band, mark and limit lie, in whole thousandths of its width.

Scales are linear and begin at zero, so that a bar's length is true: a total that is a millionth of
a threshold looks like nothing, and the text beside it says how little. Nothing is drawn outside.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from flopledger_collector.instruments.comparison import Ratio

WIDTH: Final = 1000
LIMIT_AT: Final = Fraction(4, 5)  # where the limit lies while nothing is beyond it
ROOM_BEYOND: Final = Fraction(11, 10)  # a bar that is over its limit ends a tenth further on


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """Positions from 0 to `WIDTH`."""

    low_position: int
    central_position: int
    high_position: int
    limit_position: int
    is_cut: bool  # the high end lies beyond the bar, or is open


def bar(reached: Ratio) -> Bar:
    """The bar of a share of a limit."""
    full = max(1 / LIMIT_AT, reached.central * ROOM_BEYOND)
    is_cut = reached.high is None or reached.high > full
    return Bar(
        low_position=_position(reached.low, full),
        central_position=_position(reached.central, full),
        high_position=WIDTH if is_cut else _position(reached.high or Fraction(0), full),
        limit_position=_position(Fraction(1), full),
        is_cut=is_cut,
    )


def _position(share: Fraction, full: Fraction) -> int:
    return min(WIDTH, int(share * WIDTH / full))
