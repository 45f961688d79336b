"""The agent's stream: which batch comes next, and what must be remembered to seal it once.

The whole memory of the agent is one value. At every tick it is written without a sync, which
survives the death of the process. When a batch is sealed, the memory *after* it is first made
durable under a name of its own, then the batch, then that name becomes the sealed memory:
whichever instant the process or the node dies, the batch is either not sealed and its windows are
still open, or sealed exactly once.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.host.metering import EMPTY_HOST, HostState
from flopledger_agent.metering import MeterState, empty_state
from flopledger_agent.spool import file_name
from flopledger_agent.windows import Closed
from flopledger_core.batch import (
    RECORDS_PER_BATCH_MAX,
    BatchHeader,
    ClockState,
    Predecessor,
    Salts,
    account_of,
    batch_hash,
    make_leaves,
    make_manifest,
    merkle_root,
    seal,
)
from flopledger_core.errors import InvalidInput
from flopledger_core.records import AgentRecord, HostRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flopledger_agent.disk import Disk
    from flopledger_core.signing import SigningKey

MEMORY: Final = "memory.json"
NEXT_MEMORY: Final = "memory.next.json"
SEALED_MEMORY: Final = "memory.sealed.json"
SALT_BYTES: Final = 16


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the agent must not forget."""

    stream_id: str
    next_sequence: int
    head_hash: str | None
    predecessor: Predecessor | None
    ledger_id: str | None
    key_fingerprint: str | None  # whose signatures the stream carries
    meter: MeterState
    host: HostState = EMPTY_HOST


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """What sealing needs to know about the node."""

    node: str
    cluster: str | None
    program: str
    simulated: bool
    boot_ms: int
    unix_ms: int
    synchronised: bool | None


_decoder = msgspec.json.Decoder(Memory)
_record_decoder: msgspec.json.Decoder[AgentRecord] = msgspec.json.Decoder(AgentRecord)


def new_memory(stream_id: str, boot_id: str, predecessor: Predecessor | None) -> Memory:
    """The memory of a stream that begins without a known past."""
    return Memory(
        stream_id=stream_id,
        next_sequence=0,
        head_hash=None,
        predecessor=predecessor,
        ledger_id=None,
        key_fingerprint=None,
        meter=empty_state(boot_id),
    )


def succeed(memory: Memory, stream_id: str, *, ledger_id: str | None, fingerprint: str) -> Memory:
    """The memory of a new stream that continues another: its key or its ledger has changed.

    What was metered and not yet sealed goes on; the old stream's sealed batches stay as they are.
    """
    predecessor = memory.predecessor
    if memory.next_sequence:
        predecessor = Predecessor(
            stream_id=memory.stream_id,
            sequence=memory.next_sequence - 1,
            batch_hash=memory.head_hash,
        )
    return Memory(
        stream_id=stream_id,
        next_sequence=0,
        head_hash=None,
        predecessor=predecessor,
        ledger_id=ledger_id,
        key_fingerprint=fingerprint,
        meter=memory.meter,
        host=memory.host,
    )


def recall(disk: Disk) -> Memory | None:
    """The memory as the last agent left it; None where there is none, or none that can be read.

    A prepared memory counts only if its batch became durable: that write is the moment of
    sealing. Of the others the one furthest along the stream wins, the tick's before the seal's.
    """
    prepared = _read(disk, NEXT_MEMORY)
    if prepared is not None and not _is_sealed(disk, prepared):
        disk.remove(NEXT_MEMORY)
        prepared = None
    found = [
        memory
        for memory in (_read(disk, MEMORY), _read(disk, SEALED_MEMORY), prepared)
        if memory is not None
    ]
    best = max(found, key=lambda memory: memory.next_sequence, default=None)
    if prepared is not None and best is prepared:
        adopt(disk)
    return best


def begin(disk: Disk, memory: Memory) -> None:
    """Make the first memory of a stream durable and forget any other stream's."""
    disk.remove(NEXT_MEMORY)
    disk.write(SEALED_MEMORY, msgspec.json.encode(memory), durable=True)
    disk.write(MEMORY, msgspec.json.encode(memory), durable=True)


def _is_sealed(disk: Disk, prepared: Memory) -> bool:
    content = disk.read(file_name(prepared.stream_id, prepared.next_sequence - 1))
    if content is None:
        return False
    return batch_hash(content.partition(b"\n")[0]) == prepared.head_hash


def remember(disk: Disk, memory: Memory) -> None:
    """Replace the memory: survives the process, not the power."""
    disk.write(MEMORY, msgspec.json.encode(memory), durable=False)


def seal_next(
    memory: Memory,
    closed: Sequence[Closed],
    facts: Seal,
    key: SigningKey,
    random_bytes: Callable[[int], bytes],
) -> tuple[bytes, Memory]:
    """The next batch over `closed`, and the memory that follows it. Nothing is written."""
    records = [item.record for item in closed]
    salts = Salts(
        leaf=tuple(random_bytes(SALT_BYTES).hex() for _ in records),
        account={
            account: random_bytes(SALT_BYTES).hex()
            for account in dict.fromkeys(map(account_of, records))
        },
        name=tuple(random_bytes(SALT_BYTES).hex() for _ in records),
    )
    leaves = make_leaves(records, [item.user for item in closed], salts)
    starts = [record.start_unix_ms for record in records]
    header = BatchHeader(
        schema_version=1,
        ledger_id=memory.ledger_id,
        stream_id=memory.stream_id,
        sequence=memory.next_sequence,
        previous_hash=memory.head_hash,
        predecessor=memory.predecessor if memory.next_sequence == 0 else None,
        author="agent",
        public_key=key.public_key,
        node=facts.node,
        cluster=facts.cluster,
        program=facts.program,
        boot_id=memory.meter.boot_id,
        window_start_unix_ms=min(starts, default=facts.unix_ms),
        window_end_unix_ms=max((_end(item) for item in closed), default=facts.unix_ms),
        sealed=ClockState(
            boot_ms=facts.boot_ms, unix_ms=facts.unix_ms, synchronised=facts.synchronised
        ),
        simulated=facts.simulated,
        record_count=len(records),
        merkle_root=merkle_root(leaves),
        manifest=make_manifest(records, salts.account),
    )
    content = seal(header, leaves, key)
    after = msgspec.structs.replace(
        memory,
        next_sequence=memory.next_sequence + 1,
        head_hash=hashlib.sha256(content.partition(b"\n")[0]).hexdigest(),
        meter=msgspec.structs.replace(memory.meter, closed=memory.meter.closed[len(closed) :]),
    )
    return content, after


def next_closed(memory: Memory) -> tuple[Closed, ...]:
    """As many closed records as one batch holds, never half of a window's owners."""
    closed = memory.meter.closed
    if len(closed) <= RECORDS_PER_BATCH_MAX:
        return closed
    cut = RECORDS_PER_BATCH_MAX
    while cut > 1 and _window_of(closed[cut - 1]) == _window_of(closed[cut]):
        cut -= 1
    return closed[:cut]


def sift(closed: Sequence[Closed]) -> tuple[tuple[Closed, ...], tuple[Closed, ...]]:
    """Records that the wire can carry, and those that it cannot (an absurd reading, a name).

    Values are checked when they are decoded, not when they are made: a batch with one bad record
    would be refused for ever, and every later one with it.
    """
    sound: list[Closed] = []
    unsound: list[Closed] = []
    for item in closed:
        try:
            _record_decoder.decode(msgspec.json.encode(item.record))
        except (msgspec.DecodeError, InvalidInput):
            unsound.append(item)
        else:
            sound.append(item)
    return tuple(sound), tuple(unsound)


def _window_of(item: Closed) -> tuple[str, int | None, int]:
    record = item.record
    key = "host" if isinstance(record, HostRecord) else record.device.key
    return key, record.start_boot_ms, record.end_unix_ms


def prepare(disk: Disk, after: Memory) -> None:
    """Make the memory that follows a batch durable, before the batch."""
    disk.write(NEXT_MEMORY, msgspec.json.encode(after), durable=True)


def adopt(disk: Disk) -> None:
    """The batch is durable: its memory becomes the sealed one."""
    disk.rename(NEXT_MEMORY, SEALED_MEMORY)


def _end(item: Closed) -> int:
    record = item.record
    return record.end_unix_ms


def _read(disk: Disk, name: str) -> Memory | None:
    content = disk.read(name)
    if not content:
        return None
    try:
        return _decoder.decode(content)
    except (msgspec.DecodeError, ValueError):
        disk.write(f"quarantine/{name}", content, durable=False)
        return None
