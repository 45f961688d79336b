"""Recorded samples through the same port: how any node's readings become a test or a demonstration.

One line of JSON per tick, everything exact (ratios are written as fractions). What is replayed is
what was recorded, times included; at the end every device seen is reported as no longer sampled,
never as idle.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import msgspec

from flopledger_agent.gpus.interface import DeviceFailure, NodeSample
from flopledger_core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flopledger_agent.gpus.interface import GpuSource
    from flopledger_core.records import Device

LINE_BYTES_MAX: Final = (
    4 * 1024 * 1024
)  # a tick of 128 devices with every field takes a tenth of it
ENDED: Final = "replay_ended"


def encode_sample(sample: NodeSample) -> bytes:
    """One tick as a line, newline included."""
    return msgspec.json.encode(sample, enc_hook=fraction_text) + b"\n"


def decode_sample(line: bytes, where: str = "recorded sample") -> NodeSample:
    """The tick in a line; `where` names it in errors. Errors: InvalidInput."""
    if len(line) > LINE_BYTES_MAX:
        raise InvalidInput(where, f"{len(line)} bytes", f"a line has at most {LINE_BYTES_MAX}")
    try:
        return msgspec.json.decode(line, type=NodeSample, dec_hook=fraction)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(where, str(error), "record it again; it is not one sample") from error


class ReplaySource:
    """Hands out recorded ticks one by one."""

    def __init__(self, ticks: Iterable[NodeSample]) -> None:
        self._ticks = iter(ticks)
        self._seen: dict[str, Device] = {}
        self._last: NodeSample | None = None
        self._closed = False
        self._paused = False

    @classmethod
    def from_lines(cls, lines: Iterable[bytes]) -> ReplaySource:
        """From an open JSONL file, read as it is needed. Errors, when read: InvalidInput."""
        return cls(
            decode_sample(line, f"recorded sample, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )

    def sample(self) -> NodeSample:
        """The next recorded tick; after the last one, failures."""
        tick = None if self._closed else next(self._ticks, None)
        if tick is None:
            return self._after_the_end("closed" if self._closed else ENDED)
        self._last = tick
        if self._paused:
            return self._after_the_end("paused")
        devices = [sample.device for sample in tick.samples]
        devices += [failure.device for failure in tick.failures]
        self._seen |= {device.key: device for device in devices}
        return tick

    def pause(self) -> None:
        """Ticks go by unseen until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Hand out the recorded ticks again, from the one whose turn it then is."""
        self._paused = False

    def close(self) -> None:
        """Hand out nothing more."""
        self._closed = True

    def _after_the_end(self, reason: str) -> NodeSample:
        failures = [DeviceFailure(device=device, reason=reason) for device in self._seen.values()]
        return NodeSample(
            boot_ns=0 if self._last is None else self._last.boot_ns,
            unix_ns=0 if self._last is None else self._last.unix_ns,
            samples=(),
            failures=tuple(failures),
            driver=None,
            failure=reason,
        )


class RecordingSource:
    """Another source, every tick of which is also written down."""

    def __init__(self, source: GpuSource, write: Callable[[bytes], object]) -> None:
        self._source = source
        self._write = write

    def sample(self) -> NodeSample:
        """The other source's tick."""
        tick = self._source.sample()
        self._write(encode_sample(tick))
        return tick

    def pause(self) -> None:
        """Pause the other source."""
        self._source.pause()

    def resume(self) -> None:
        """Resume the other source."""
        self._source.resume()

    def close(self) -> None:
        """Close the other source."""
        self._source.close()


def fraction_text(value: object) -> str:
    """An exact ratio as text, like 1/2: msgspec's hook for encoding."""
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    raise NotImplementedError(f"{type(value).__name__} has no form in a recording")


def fraction(kind: type, value: object) -> Any:  # noqa: ANN401  (msgspec's signature)
    """An exact ratio from its text: msgspec's hook for decoding. Errors: ValueError."""
    if kind is not Fraction or not isinstance(value, str):
        raise ValueError("a ratio is written as text, like 1/2")
    numerator, slash, denominator = value.partition("/")
    if not (numerator.isdecimal() and denominator.isdecimal() and int(denominator)):
        raise ValueError("a ratio is written like 1/2")
    assert slash, "a text with a denominator has a slash"
    return Fraction(int(numerator), int(denominator))
