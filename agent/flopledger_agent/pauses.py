"""Pauses: somebody needs the GPUs' counters for a profiler, so metering stops for a while.

A pause is asked for with a duration, belongs to whoever asked, and is remembered on disk, so that
neither a restart nor a reboot ends it early. Boot time measures it; after a reboot, wall time.
What it costs is stated: the time becomes gaps with the reason `paused`.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from flopledger_core.errors import InvalidInput
from flopledger_core.units import MS_PER_HOUR, MS_PER_MINUTE, MS_PER_SECOND, NS_PER_MS

if TYPE_CHECKING:
    from flopledger_agent.clocks import Clock
    from flopledger_agent.disk import Disk

PAUSE_FILE: Final = "pause.json"
# A profiling session takes minutes; a pause that somebody forgot ends with the working day. Longer
# ones are asked for again, so that a person stands behind every gap.
PAUSE_MAX_MS: Final = 8 * MS_PER_HOUR
UNKNOWN_BOOT: Final = "unknown"  # what the node says where the kernel has no boot id

_DURATION: Final = re.compile(r"\A([1-9][0-9]{0,6})(s|m|h)\Z")
_UNITS_MS: Final = {"s": MS_PER_SECOND, "m": MS_PER_MINUTE, "h": MS_PER_HOUR}
_Ms = Annotated[int, Meta(ge=0)]


class Pause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pause: who asked for it, and its ends in both times."""

    by: str
    boot_id: str
    since_boot_ms: _Ms
    since_unix_ms: _Ms
    until_boot_ms: _Ms
    until_unix_ms: _Ms


def parse_duration(text: str) -> int:
    """Milliseconds of `30s`, `10m` or `2h`. Errors: InvalidInput names the remedy."""
    match = _DURATION.match(text)
    if match is None:
        raise InvalidInput("duration", text, "write it like 30s, 10m or 2h")
    return require_duration(int(match[1]) * _UNITS_MS[match[2]])


def require_duration(duration_ms: int) -> int:
    """`duration_ms` if a pause may last so long. Errors: InvalidInput."""
    if not 0 < duration_ms <= PAUSE_MAX_MS:
        raise InvalidInput(
            "duration", f"{duration_ms} ms", "pause for at most 8h, and ask again when it is over"
        )
    return duration_ms


class PauseDesk:
    """Takes requests from any thread; the loop asks at every tick what is in force."""

    def __init__(self, disk: Disk, clock: Clock, boot_id: str) -> None:
        self._disk = disk
        self._clock = clock
        self._boot_id = boot_id
        self._changed = threading.Condition()
        self._in_effect = False
        self._pause = self._recall()

    def begin(self, duration_ms: int, by: str) -> Pause:
        """Pause from now on; a pause in force is replaced.

        Errors: InvalidInput for the duration, SpoolFull when it cannot be remembered.
        """
        require_duration(duration_ms)
        boot_ms, unix_ms = self._now_ms()
        pause = Pause(
            by=by,
            boot_id=self._boot_id,
            since_boot_ms=boot_ms,
            since_unix_ms=unix_ms,
            until_boot_ms=boot_ms + duration_ms,
            until_unix_ms=unix_ms + duration_ms,
        )
        with self._changed:
            self._disk.write(PAUSE_FILE, msgspec.json.encode(pause), durable=True)
            self._pause = pause
        return pause

    def end(self) -> Pause | None:
        """End the pause now; what it was, None where there was none. Errors: SpoolFull."""
        with self._changed:
            pause, self._pause = self._current(), None
            self._disk.remove(PAUSE_FILE)
        return pause

    def current(self) -> Pause | None:
        """The pause in force."""
        with self._changed:
            return self._current()

    def left_ms(self, pause: Pause) -> int:
        """How long a pause goes on, never negative."""
        return max(0, pause.until_boot_ms - self._now_ms()[0])

    def settle(self, *, paused: bool) -> None:
        """The loop says what it has carried out; expired pauses are forgotten here."""
        with self._changed:
            if not paused and self._pause is not None and self._current() is None:
                self._pause = None
                self._disk.remove(PAUSE_FILE)
            self._in_effect = paused
            self._changed.notify_all()

    def await_effect(self, *, paused: bool, seconds: float) -> bool:
        """Wait until the loop has carried out what was asked for; False when it has not."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_effect == paused, seconds)

    def _current(self) -> Pause | None:
        pause = self._pause
        return pause if pause is not None and self.left_ms(pause) > 0 else None

    def _now_ms(self) -> tuple[int, int]:
        return self._clock.boottime_ns() // NS_PER_MS, self._clock.wall_unix_ns() // NS_PER_MS

    def _recall(self) -> Pause | None:
        """The pause of before a restart; of another boot, what wall time leaves of it."""
        content = self._disk.read(PAUSE_FILE)
        if not content:
            return None
        try:
            pause = msgspec.json.decode(content, type=Pause)
        except (msgspec.DecodeError, ValueError):
            return None  # not a pause: metering goes on
        boot_ms, unix_ms = self._now_ms()
        if pause.boot_id == self._boot_id != UNKNOWN_BOOT and boot_ms >= pause.since_boot_ms:
            return pause
        # A calendar that went back must not make a pause longer than it was asked for.
        asked_ms = min(pause.until_unix_ms - pause.since_unix_ms, PAUSE_MAX_MS)
        left_ms = min(max(0, pause.until_unix_ms - unix_ms), max(0, asked_ms))
        return msgspec.structs.replace(
            pause,
            boot_id=self._boot_id,
            since_boot_ms=boot_ms,
            until_boot_ms=boot_ms + left_ms,
        )
