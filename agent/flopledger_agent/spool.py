"""The spool: sealed batches on disk, in order, until the collector has durably answered.

One file per batch, named by stream and sequence number, so that a directory listing is the queue.
A batch leaves only when the collector said it is admitted or a duplicate. A file that is not a
batch, or not the one its name says, is moved aside to `quarantine/` and reported, never deleted and
never sent.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.errors import SpoolFull, StateError
from flopledger_agent.metering import WINDOW_MINUTES
from flopledger_core.batch import BatchHeader, decode
from flopledger_core.errors import FlopLedgerError
from flopledger_core.signing import verify
from flopledger_core.units import NS_PER_MS

if TYPE_CHECKING:
    from flopledger_agent.disk import Disk

DIRECTORY: Final = "spool"
QUARANTINE: Final = "quarantine"
WIDEN_PER_MILLE: Final = (500, 800)  # beyond these fills windows are 10, then 60 minutes wide
_NAME = re.compile(r"spool/(?P<stream>[0-9a-f]{32})-(?P<sequence>\d{12})\.batch")


class SpooledBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One queued batch: where it is, not what is in it."""

    stream_id: str
    sequence: int
    size_bytes: int

    @property
    def name(self) -> str:
        """The file's name on the disk port."""
        return file_name(self.stream_id, self.sequence)


def file_name(stream_id: str, sequence: int) -> str:
    """The name of a batch's file."""
    return f"{DIRECTORY}/{stream_id}-{sequence:012d}.batch"


class Spool:
    """The queue; it is opened once and then the only writer of its directory."""

    def __init__(self, disk: Disk, max_bytes: int) -> None:
        self._disk = disk
        self.max_bytes = max_bytes
        self._queue: dict[tuple[str, int], SpooledBatch] = {}
        self._oldest_sealed_ms: int | None = None  # None: to be read again
        self.quarantined = len(disk.names(QUARANTINE))
        for name in disk.names(DIRECTORY):
            match = _NAME.fullmatch(name)
            content = disk.read(name)
            if match is None or not content:
                self._quarantine(name)
                continue
            self._remember(match["stream"], int(match["sequence"]), len(content))

    def put(self, stream_id: str, sequence: int, content: bytes) -> None:
        """Make a sealed batch durable; raises `SpoolFull` and keeps nothing when it cannot."""
        if self.size_bytes + len(content) > self.max_bytes:
            raise SpoolFull(
                f"spool.max_bytes is {self.max_bytes}: {len(self._queue)} batches wait; restore "
                "the connection to the collector or raise the limit"
            )
        self._disk.write(file_name(stream_id, sequence), content, durable=True)
        self._remember(stream_id, sequence, len(content))

    def batches(self, current_stream: str | None = None) -> list[SpooledBatch]:
        """Every queued batch in the order to send: earlier streams first, then by sequence."""
        return sorted(
            self._queue.values(),
            key=lambda item: (item.stream_id == current_stream, item.stream_id, item.sequence),
        )

    def read(self, batch: SpooledBatch) -> bytes | None:
        """A batch's bytes; one that is no longer what was sealed is quarantined and gives None."""
        content = self._disk.read(batch.name)
        if content and _is_batch(content, batch):
            return content
        self._queue.pop((batch.stream_id, batch.sequence), None)
        self._oldest_sealed_ms = None
        if content is not None:
            self._quarantine(batch.name)
        return None

    def holds(self, stream_id: str, sequence: int) -> bool:
        """True while this batch waits."""
        return (stream_id, sequence) in self._queue

    def free(self, stream_id: str, sequence: int) -> None:
        """Let go of a batch that the collector holds durably."""
        batch = self._queue.get((stream_id, sequence))
        if batch is not None:
            self._disk.remove(batch.name)
            del self._queue[stream_id, sequence]
            self._oldest_sealed_ms = None

    @property
    def size_bytes(self) -> int:
        """Bytes waiting."""
        return sum(batch.size_bytes for batch in self._queue.values())

    def __len__(self) -> int:
        """Batches waiting."""
        return len(self._queue)

    def oldest_age_ns(self, now_unix_ns: int) -> int:
        """How long the oldest batch has waited, by the times sealed into the headers; 0 if none."""
        if not self._queue:
            return 0
        if self._oldest_sealed_ms is None:
            first: dict[str, SpooledBatch] = {}  # within a stream the first was sealed first
            for batch in self.batches():
                first.setdefault(batch.stream_id, batch)
            self._oldest_sealed_ms = min(map(self._sealed_ms, first.values()))
        return max(0, now_unix_ns - self._oldest_sealed_ms * NS_PER_MS)

    def window_minutes(self) -> int:
        """How wide measurement windows should be, so that space lasts before anything is lost."""
        fill_per_mille = self.size_bytes * 1000 // self.max_bytes
        return WINDOW_MINUTES[sum(fill_per_mille >= limit for limit in WIDEN_PER_MILLE)]

    def _remember(self, stream_id: str, sequence: int, size_bytes: int) -> None:
        self._queue[stream_id, sequence] = SpooledBatch(
            stream_id=stream_id, sequence=sequence, size_bytes=size_bytes
        )

    def _sealed_ms(self, batch: SpooledBatch) -> int:
        try:
            return sealed_unix_ms(self._disk.read(batch.name) or b"")
        except StateError:
            return 0  # not readable: as old as can be, so that somebody looks

    def _quarantine(self, name: str) -> None:
        self.quarantined += 1
        # Where the disk refuses even that, the file stays where it is; it is not queued any more.
        with contextlib.suppress(StateError):
            self._disk.rename(name, f"{QUARANTINE}/{name.rpartition('/')[2]}")


def sealed_unix_ms(content: bytes) -> int:
    """When the batch that begins with these bytes was sealed; 0 when they are no batch's."""
    try:
        header = msgspec.json.decode(content.partition(b"\n")[0], type=BatchHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    return header.sealed.unix_ms


def _is_batch(content: bytes, batch: SpooledBatch) -> bool:
    """Whether these bytes are the signed batch of this stream and sequence, whole."""
    try:
        found = decode(content)
        verify(found.header.public_key, found.signature, found.header_bytes)
    except FlopLedgerError:
        return False
    return (found.header.stream_id, found.header.sequence) == (batch.stream_id, batch.sequence)
