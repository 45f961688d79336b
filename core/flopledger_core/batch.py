"""The batch: one node-minute of records, sealed. Its wire schema and its one byte form.

A batch is text, one JSON object a line, so that an auditor needs only common tools: line 1 the
header, line 2 the signature over line 1's bytes, then one line per record. The header commits to
the records through a Merkle root over salted leaves, so a project's export can carry every header
and only its own records; names of people sit beside the record behind a commitment of their own,
so a name can be erased without breaking a hash. There is exactly one byte form: decoding and
encoding again gives the same bytes, or the bytes are refused.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from flopledger_core import merkle
from flopledger_core.errors import InvalidInput, Truncated, WireError
from flopledger_core.records import (
    Count,
    GapRecord,
    Hex32,
    Hex64,
    HostRecord,
    ImportedHours,
    Record,
    UnixMs,
    UsageRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flopledger_core.signing import SigningKey

SCHEMA_VERSION: Final = 1
MEDIA_TYPE: Final = "application/vnd.flopledger.batches+ndjson"
RECORDS_PER_BATCH_MAX: Final = 4096  # 16 GPUs x 7 MIG instances x 36 owners in one minute
LINE_BYTES_MAX: Final = 2 * 1024 * 1024  # a header with a manifest of 4096 accounts fits twice

T = TypeVar("T")
ShortText = Annotated[str, Meta(min_length=1, max_length=255)]


class ManifestLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one account has in a batch, under a commitment that hides its name from the others."""

    commitment: Hex64
    records: Annotated[int, Meta(ge=1, le=RECORDS_PER_BATCH_MAX)]
    gpu_time_ms: Count
    energy_mj: Count


class Predecessor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stream that this one continues for the same node, as far as is known."""

    stream_id: Hex32
    sequence: Count | None  # None: its head is unknown
    batch_hash: Hex64 | None


class ClockState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node's clocks when the batch was sealed."""

    boot_ms: Count
    unix_ms: UnixMs
    synchronised: bool | None  # None: the node could not tell


class BatchHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the signature covers."""

    schema_version: Literal[1]
    ledger_id: Hex32 | None  # None: sealed before the node first reached its collector
    stream_id: Hex32
    sequence: Count
    previous_hash: Hex64 | None  # None only at sequence 0
    predecessor: Predecessor | None  # only at sequence 0
    author: Literal["agent", "collector"]
    public_key: Annotated[str, Meta(min_length=44, max_length=44)]
    node: ShortText
    cluster: ShortText | None
    program: ShortText
    boot_id: ShortText
    window_start_unix_ms: UnixMs
    window_end_unix_ms: UnixMs
    sealed: ClockState
    simulated: bool
    record_count: Annotated[int, Meta(ge=0, le=RECORDS_PER_BATCH_MAX)]
    merkle_root: Hex64
    manifest: tuple[ManifestLine, ...]


class SignatureLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Line 2 of a batch."""

    signature: Annotated[str, Meta(min_length=88, max_length=88)]


class Names(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Personal names of a record, beside it and not under its hash: they can be erased."""

    salt: Hex32
    user: Annotated[str, Meta(min_length=1, max_length=256)]


class Leaf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One record line. `record` keeps its exact bytes: they are what the leaf hash covers."""

    salt: Hex32
    account_salt: Hex32
    record: msgspec.Raw
    names: Names | None

    @property
    def hash(self) -> bytes:
        """SHA-256(0x00 || salt || record bytes)."""
        return merkle.leaf_hash(bytes.fromhex(self.salt) + bytes(self.record))


class SealedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch in memory: parsed parts beside the exact bytes they came from."""

    content: bytes
    header_bytes: bytes
    header: BatchHeader
    signature: str
    leaves: tuple[Leaf, ...]
    records: tuple[Record, ...]

    @property
    def hash(self) -> str:
        """The hex SHA-256 of the header's exact bytes: the id the next batch links to."""
        return batch_hash(self.header_bytes)


class Salts(msgspec.Struct, frozen=True, kw_only=True):
    """Randomness for sealing, passed in so that sealing is a pure function: 32 hex digits each."""

    leaf: tuple[str, ...]  # one a record
    account: Mapping[str, str]  # one an account
    name: tuple[str, ...]  # one a record


def batch_hash(header_bytes: bytes) -> str:
    """The hex SHA-256 of a header's exact bytes."""
    return hashlib.sha256(header_bytes).hexdigest()


def account_of(record: Record) -> str:
    """The account a record is posted to: its owner's account, or the project it speaks of."""
    if isinstance(record, (UsageRecord, GapRecord, HostRecord, ImportedHours)):
        return record.owner.account
    return record.project


def account_commitment(account_salt: str, account: str) -> str:
    """The hex commitment that stands for an account in a manifest."""
    content = merkle.ACCOUNT_PREFIX + bytes.fromhex(account_salt) + account.encode()
    return hashlib.sha256(content).hexdigest()


def name_commitment(salt: str, field: str, name: str) -> str:
    """The hex commitment that stands for a personal name in a record."""
    content = merkle.NAME_PREFIX + bytes.fromhex(salt) + field.encode() + b"\x00" + name.encode()
    return hashlib.sha256(content).hexdigest()


def make_leaves(
    records: Sequence[Record], users: Sequence[str | None], salts: Salts
) -> tuple[Leaf, ...]:
    """Leaves for records; a user's name becomes a commitment in the record, itself beside it."""
    leaves: list[Leaf] = []
    for index, (record, user) in enumerate(zip(records, users, strict=True)):
        names: Names | None = None
        sealed = record
        if user is not None and isinstance(record, (UsageRecord, GapRecord, HostRecord)):
            names = Names(salt=salts.name[index], user=user)
            commitment = name_commitment(names.salt, "user", user)
            sealed = msgspec.structs.replace(record, user_commitment=commitment)
        leaves.append(
            Leaf(
                salt=salts.leaf[index],
                account_salt=salts.account[account_of(record)],
                record=msgspec.Raw(msgspec.json.encode(sealed)),
                names=names,
            )
        )
    return tuple(leaves)


def make_manifest(
    records: Sequence[Record], account_salts: Mapping[str, str]
) -> tuple[ManifestLine, ...]:
    """One line per account, sorted by commitment so that the order says nothing."""
    lines: dict[str, list[int]] = {}
    for record in records:
        line = lines.setdefault(account_of(record), [0, 0, 0])
        line[0] += 1
        if isinstance(record, UsageRecord):
            line[1] += record.gpu_time_ms
            line[2] += record.energy_mj or 0
    manifest = [
        ManifestLine(
            commitment=account_commitment(account_salts[account], account),
            records=records_,
            gpu_time_ms=time,
            energy_mj=energy,
        )
        for account, (records_, time, energy) in lines.items()
    ]
    return tuple(sorted(manifest, key=lambda line: line.commitment))


def seal(header: BatchHeader, leaves: Sequence[Leaf], key: SigningKey) -> bytes:
    """The batch's bytes: header, signature, leaves; the header already commits to the leaves."""
    if header.public_key != key.public_key:
        raise InvalidInput("public_key", header.public_key, "seal with the key the header names")
    header_bytes = msgspec.json.encode(header)
    lines = [
        header_bytes,
        msgspec.json.encode(SignatureLine(signature=key.sign(header_bytes))),
        *(msgspec.json.encode(leaf) for leaf in leaves),
    ]
    return b"".join(line + b"\n" for line in lines)


def merkle_root(leaves: Sequence[Leaf]) -> str:
    """The hex root over the leaves' hashes."""
    return merkle.root([leaf.hash for leaf in leaves]).hex()


_header_decoder = msgspec.json.Decoder(BatchHeader)
_signature_decoder = msgspec.json.Decoder(SignatureLine)
_leaf_decoder = msgspec.json.Decoder(Leaf)
_record_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def split_batches(content: bytes) -> Iterator[bytes]:
    """Cut concatenated batches apart, by the record count in each header; nothing else is read.

    Raises `WireError` naming the place when a header cannot be read, or `Truncated` at the end.
    """
    position = 0
    while position < len(content):
        end = _line_end(content, position, "header")
        header = _decode_header(content[position:end])
        stop = end + 1
        for line in range(header.record_count + 1):
            stop = _line_end(content, stop, "signature" if line == 0 else f"leaf {line - 1}") + 1
        yield content[position:stop]
        position = stop


def decode(content: bytes) -> SealedBatch:
    """Parse exactly one batch and check what can be checked without a key or a ledger.

    Checked: one byte form, counts, Merkle root, manifest, name commitments. Not checked here:
    the signature (`signing.verify` over `header_bytes`) and the stream's order.
    """
    if not content.endswith(b"\n"):
        raise Truncated("batch", content[-40:], "end the last line with a newline")
    lines = content[:-1].split(b"\n")
    header = _decode_header(lines[0])
    if len(lines) != header.record_count + 2:
        raise Truncated(
            "record_count",
            header.record_count,
            f"the batch has {len(lines) - 2} record lines; send it whole",
        )
    signature: SignatureLine = _one_form(_signature_decoder, lines[1], "signature")
    leaves: list[Leaf] = []
    records: list[Record] = []
    for index, line in enumerate(lines[2:]):
        leaf: Leaf = _one_form(_leaf_decoder, line, f"leaf {index}")
        record: Record = _one_form(_record_decoder, bytes(leaf.record), f"record {index}")
        _require_name_commitment(leaf, record, index)
        leaves.append(leaf)
        records.append(record)
    batch = SealedBatch(
        content=content,
        header_bytes=lines[0],
        header=header,
        signature=signature.signature,
        leaves=tuple(leaves),
        records=tuple(records),
    )
    _require_commitments(batch)
    return batch


def _line_end(content: bytes, start: int, what: str) -> int:
    end = content.find(b"\n", start, start + LINE_BYTES_MAX)
    if end < 0:
        if len(content) - start >= LINE_BYTES_MAX:
            raise WireError(
                what, f"{len(content) - start} bytes", f"a line has at most {LINE_BYTES_MAX} bytes"
            )
        raise Truncated(what, content[start : start + 40], "the bytes end inside it; send it whole")
    return end


def _decode_header(line: bytes) -> BatchHeader:
    header: BatchHeader = _one_form(_header_decoder, line, "header")
    first = header.sequence == 0
    if first != (header.previous_hash is None):
        raise WireError("header.previous_hash", header.previous_hash, "only sequence 0 has none")
    if header.predecessor is not None and not first:
        raise WireError("header.predecessor", header.predecessor, "only sequence 0 has one")
    if header.window_end_unix_ms < header.window_start_unix_ms:
        raise WireError(
            "header.window_end_unix_ms", header.window_end_unix_ms, "it ends at or after its start"
        )
    return header


def _one_form(decoder: msgspec.json.Decoder[T], line: bytes, what: str) -> T:
    try:
        value = decoder.decode(line)
    except InvalidInput as error:
        raise WireError(f"{what}.{error.field}", error.value, error.remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(what, line, f"{error}; send schema version {SCHEMA_VERSION}") from error
    if msgspec.json.encode(value) != line:
        raise WireError(what, line, "write it in its one byte form: declared order, no spaces")
    return value


def _require_name_commitment(leaf: Leaf, record: Record, index: int) -> None:
    commitment = getattr(record, "user_commitment", None)
    if leaf.names is None:
        return  # erased, or nobody's
    if commitment != name_commitment(leaf.names.salt, "user", leaf.names.user):
        raise WireError(
            f"leaf {index}.names", leaf.names.user, "it is not the name the record commits to"
        )


def _require_commitments(batch: SealedBatch) -> None:
    if merkle_root(batch.leaves) != batch.header.merkle_root:
        raise WireError(
            "header.merkle_root", batch.header.merkle_root, "the records are not the ones sealed"
        )
    salts: dict[str, str] = {}
    for index, (leaf, record) in enumerate(zip(batch.leaves, batch.records, strict=True)):
        if salts.setdefault(account_of(record), leaf.account_salt) != leaf.account_salt:
            raise WireError(
                f"leaf {index}.account_salt", leaf.account_salt, "use one salt per account"
            )
    if make_manifest(batch.records, salts) != batch.header.manifest:
        raise WireError(
            "header.manifest", len(batch.header.manifest), "it does not sum up the records"
        )
