"""What the agent and its driver worker say to each other: msgpack, each message after its length.

The worker believes the agent and the agent believes the worker: both are this program. Ratios
travel as exact text. A message that cannot be read means the other side is not sound any more, and
the connection ends.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from flopledger_agent.clocks import ScaledClockConfig
from flopledger_agent.gpus.gpm import Scale
from flopledger_agent.gpus.interface import NodeSample
from flopledger_agent.gpus.replay import fraction, fraction_text
from flopledger_agent.gpus.selection import Selection
from flopledger_core.records import Device

LENGTH: Final = struct.Struct(">I")
# A tick of 128 devices takes a tenth of it; more is no message.
MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024


class BrokenMessage(Exception):
    """What came through the pipe is no message."""


class SimulatedNode(msgspec.Struct, frozen=True, kw_only=True):
    """The scenario a worker stands on instead of a driver, and the agent's own time."""

    scenario: str  # path
    start_boottime_ns: int
    clock: ScaledClockConfig | None
    tie_ns: int  # of the agent's scaled clock, so that both have the same time to the nanosecond


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to a worker: what to read and how.

    `known` are expected from the first sample on; `scales` are those of cycle counters, found out
    by earlier workers, by GPU or part, so that counting goes on without finding them out again;
    they hold for a driver of the version `scales_of_driver`.
    """

    known: tuple[Device, ...]
    selection: Selection
    scales: dict[str, Scale]
    scales_of_driver: str | None = None
    deadline_seconds: float
    simulated: SimulatedNode | None


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sample once. `delivered`: the last answer came in time and was used."""

    number: int
    delivered: bool


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One tick of a worker, and what its successor will need to know."""

    number: int
    sample: NodeSample
    scales: dict[str, Scale]
    places: dict[str, int]  # index of each GPU in the driver's list, by UUID
    device_count: int | None
    stuck_index: int | None  # where the look for devices hangs now


_REQUEST: Final[msgspec.msgpack.Decoder[Hello | Ask]] = msgspec.msgpack.Decoder(Hello | Ask)
_ANSWER: Final = msgspec.msgpack.Decoder(Answer, dec_hook=fraction)
_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=fraction_text)


def framed(message: Hello | Ask | Answer) -> bytes:
    """A message with its length before it."""
    body = _ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body


def request_of(body: bytes) -> Hello | Ask:
    """A message to the worker. Errors: BrokenMessage."""
    try:
        return _REQUEST.decode(body)
    except msgspec.MsgspecError as error:
        raise BrokenMessage(str(error)) from error


def answer_of(body: bytes) -> Answer:
    """A message from the worker. Errors: BrokenMessage."""
    try:
        return _ANSWER.decode(body)
    except msgspec.MsgspecError as error:
        raise BrokenMessage(str(error)) from error


class Inbox:
    """Bytes as they come, whole messages as they are complete."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, content: bytes) -> None:
        """More bytes."""
        self._bytes += content

    def take(self) -> bytes | None:
        """The next whole message without its length; None: not complete. Errors: BrokenMessage."""
        if len(self._bytes) < LENGTH.size:
            return None
        size = int(LENGTH.unpack_from(self._bytes)[0])
        if size > MESSAGE_BYTES_MAX:
            raise BrokenMessage(f"a message of {size} bytes")
        end = LENGTH.size + size
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[LENGTH.size : end])
        del self._bytes[:end]
        return body
