"""How much each process used a device since its previous delivered sample. Pure.

The driver keeps recent samples of SM use by process, stamped with wall time; asked for those newer
than a stamp it answers with processes that used anything, or that there is nothing new. What was
not delivered is asked for again. Only the proportions are of use: they split a shared device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

# So many intervals in a row without anything new: nothing ran, or the stamps stepped back.
MISSES_MAX: Final = 3
PERCENT_MAX: Final = 100
RECENT: Final = 0  # asks for the driver's own last period


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of one process."""

    pid: int
    unix_us: int  # the driver's stamp
    sm_percent: int


class ProcessUses:
    """Sums over consecutive intervals that begin at delivered samples."""

    def __init__(self) -> None:
        self._after_unix_us = RECENT
        self._new_after_unix_us = RECENT
        self._misses = 0

    def settle(self, *, delivered: bool) -> None:
        """Learn what became of the previous sample."""
        if delivered:
            self._after_unix_us = self._new_after_unix_us
        self._new_after_unix_us = self._after_unix_us

    def skip(self) -> None:
        """Nobody asked this time: what is asked next is the driver's last period."""
        self._new_after_unix_us = RECENT

    def since(self, read: Callable[[int], tuple[ProcessUse, ...]]) -> dict[int, int]:
        """Percent of the SMs by pid, added up over samples; empty where there is nothing new.

        `read` gives samples newer than a stamp. Errors: whatever it raises.
        """
        after_us = self._after_unix_us
        found = [use for use in read(after_us) if use.unix_us > after_us and use.pid > 0]
        if not found:
            self._misses += 1
            self._new_after_unix_us = RECENT if self._misses >= MISSES_MAX else after_us
            return {}
        self._misses = 0
        self._new_after_unix_us = max(use.unix_us for use in found)
        used: dict[int, int] = {}
        for use in found:
            if 0 < use.sm_percent <= PERCENT_MAX:
                used[use.pid] = used.get(use.pid, 0) + use.sm_percent
        return used
