"""The mean SM clock of one device since its previous delivered sample.

Pure. Two sources, the better first: the driver's own buffered clock samples (several a second,
each counted once), else the mean of the readings at both ends of the interval. Never the boost or
the maximum clock. A value that was not delivered is taken again with the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

# So many intervals in a row without a new sample: the stamps stepped back with the wall clock, or
# the buffer was emptied. The driver is then asked anew where it stands.
MISSES_MAX: Final = 3
BUFFER_START_US: Final = 0  # asks for everything the buffer holds


class ClockSamples(msgspec.Struct, frozen=True, kw_only=True):
    """Buffered readings of the SM clock, oldest first."""

    newest_unix_us: int  # the driver's stamp of the last one
    sm_clocks_khz: tuple[int, ...]


class ClockMean:
    """Means over consecutive intervals that begin at delivered samples."""

    def __init__(self) -> None:
        self._reading_khz: int | None = None  # at the last delivered sample
        self._new_reading_khz: int | None = None
        # Up to which stamp samples are counted; None: not known, the buffer was not asked then.
        self._after_unix_us: int | None = None
        self._new_after_unix_us: int | None = None
        self._misses = 0

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous sample."""
        if delivered:
            self._reading_khz = self._new_reading_khz
            self._after_unix_us = self._new_after_unix_us
        self._new_after_unix_us = None

    def of_ends(self, reading_khz: int | None) -> int | None:
        """The mean of the readings at both ends; the one there is where there is only one."""
        self._new_reading_khz = reading_khz
        if reading_khz is None or self._reading_khz is None:
            return reading_khz
        return (self._reading_khz + reading_khz) // 2

    def of_samples(
        self, read: Callable[[int], ClockSamples | None], highest_khz: int
    ) -> int | None:
        """The mean of the samples since the interval began; None where they do not tell.

        `read` gives those newer than a stamp, None where there are none. Samples above
        `highest_khz` are no readings. Errors: whatever `read` raises.
        """
        after_us = self._after_unix_us
        found = read(BUFFER_START_US if after_us is None else after_us)
        if found is None:
            self._misses += 1
            lost = after_us is not None and self._misses >= MISSES_MAX
            self._new_after_unix_us = None if lost else after_us or BUFFER_START_US
            return None
        self._misses = 0
        self._new_after_unix_us = found.newest_unix_us
        clocks_khz = [khz for khz in found.sm_clocks_khz if 0 < khz <= highest_khz]
        if after_us is None or not clocks_khz:
            return None  # the buffer reaches back beyond the interval: it begins to count here
        return sum(clocks_khz) // len(clocks_khz)
