"""Clocks: the only place of the agent where time is read; everything else is handed a clock.

Boot time counts through suspend and never steps, so windows and durations come from it; wall time
only places them in the calendar. A scaled clock runs many times faster than real time from a
common origin, so that a whole demonstration shares one time without talking.
"""

from __future__ import annotations

import time
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from flopledger_core.units import NS_PER_SECOND

SCALED_BOOT_OFFSET_NS = NS_PER_SECOND  # a scaled node "booted" one second before its clock's origin


class Clock(Protocol):
    """What the agent needs to know about time."""

    def boottime_ns(self) -> int:
        """Nanoseconds since the node booted, suspend included; never steps."""
        ...

    def wall_unix_ns(self) -> int:
        """Nanoseconds since 1970-01-01 UTC by the node's calendar; may step."""
        ...

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """How long a thread really sleeps to wait `virtual_seconds` of this clock."""
        ...


class SystemClock:
    """The node's own clocks."""

    def boottime_ns(self) -> int:
        """CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_unix_ns(self) -> int:
        """CLOCK_REALTIME."""
        return time.time_ns()

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """Real time is this clock's time."""
        return virtual_seconds


class ScaledClockConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[clock]` table: present only in demonstrations and tests."""

    speed: Annotated[int, Meta(ge=1)]
    real_origin_unix_ns: int
    origin_unix_ns: int


class ScaledClock:
    """A clock that left `origin_unix_ns` at a real instant and runs `speed` times as fast."""

    def __init__(self, config: ScaledClockConfig, *, tie_ns: int | None = None) -> None:
        self._config = config
        # Real elapsed time comes from the monotonic clock; the wall clock only ties the origin.
        # A process that must agree to the nanosecond takes over another one's tie.
        if tie_ns is None:
            tie_ns = time.time_ns() - config.real_origin_unix_ns - time.monotonic_ns()
        self.tie_ns = tie_ns

    def _elapsed_ns(self) -> int:
        return (time.monotonic_ns() + self.tie_ns) * self._config.speed

    def boottime_ns(self) -> int:
        """Scaled time since just before the origin."""
        return self._elapsed_ns() + SCALED_BOOT_OFFSET_NS

    def wall_unix_ns(self) -> int:
        """Scaled calendar time."""
        return self._config.origin_unix_ns + self._elapsed_ns()

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """Scaled time passes `speed` times as fast as a real sleep."""
        return virtual_seconds / self._config.speed
