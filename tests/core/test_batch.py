"""The wire has one byte form, and nothing on it can be changed unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_core.batch import decode, split_batches
from flopledger_core.errors import FlopLedgerError, InvalidInput, Truncated, WireError
from flopledger_core.identity import IDLE_OWNER
from flopledger_core.signing import SigningKey, fingerprint, verify
from tests.core.sealed import KEY, sealed, usage

GOLDEN = Path(__file__).parent.parent / "golden" / "wire" / "batch-v1.ndjson"
HONEST = sealed([usage(), usage(owner=IDLE_OWNER)], ["alice", None])


def changed(line: int, change: dict[str, Any]) -> bytes:
    """HONEST with fields of one JSON line replaced (compact form kept)."""
    lines = HONEST.split(b"\n")
    lines[line] = json.dumps(json.loads(lines[line]) | change, separators=(",", ":")).encode()
    return b"\n".join(lines)


def test_schema_version_1_has_not_moved() -> None:
    """The golden batch of the first release: these bytes must decode and encode for ever."""
    assert GOLDEN.read_bytes() == HONEST


def test_a_batch_comes_back_as_it_was_sealed() -> None:
    """Records, names and signature survive the wire."""
    batch = decode(HONEST)
    verify(batch.header.public_key, batch.signature, batch.header_bytes)

    assert [type(record).__name__ for record in batch.records] == ["UsageRecord", "UsageRecord"]
    assert batch.leaves[0].names is not None
    assert batch.leaves[0].names.user == "alice"
    assert batch.content == HONEST


def test_a_name_can_be_erased_without_breaking_a_hash() -> None:
    """Dropping the name beside the record leaves root, manifest and signature valid."""
    batch = decode(changed(2, {"names": None}))
    verify(batch.header.public_key, batch.signature, batch.header_bytes)

    assert batch.header_bytes == decode(HONEST).header_bytes
    assert b"alice" not in batch.content


def checked(content: bytes) -> None:
    """What a reader checks: the form, then the signature."""
    batch = decode(content)
    verify(KEY.public_key, batch.signature, batch.header_bytes)


@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    """Flip any one byte: decoding or the signature refuses, except nothing else changes."""
    position = data.draw(st.integers(0, len(HONEST) - 1))
    flip = data.draw(st.integers(1, 255))
    content = bytearray(HONEST)
    content[position] ^= flip

    with pytest.raises(FlopLedgerError):
        checked(bytes(content))


@given(st.integers(0, len(HONEST) - 1))
def test_any_truncation_is_found(length: int) -> None:
    """A torn batch is never a batch."""
    with pytest.raises(WireError):
        decode(HONEST[:length])


@pytest.mark.parametrize(
    ("line", "change", "named"),
    [
        (0, {"schema_version": 2}, "schema_version"),
        (0, {"sequence": -1}, "sequence"),
        (0, {"sequence": 1.5}, "sequence"),
        (0, {"sequence": 2**63}, "sequence"),
        (0, {"sequence": 1}, "previous_hash"),
        (0, {"window_start_unix_ms": 10**15}, "window_start_unix_ms"),
        (0, {"window_end_unix_ms": 0}, "window_end_unix_ms"),
        (0, {"node": ""}, "node"),
        (0, {"merkle_root": "0" * 64}, "merkle_root"),
        (0, {"manifest": []}, "manifest"),
        (0, {"record_count": 3}, "record_count"),
        (0, {"extra": 1}, "extra"),
        (1, {"signature": 5}, "signature"),
        (2, {"salt": "zz"}, "salt"),
        (2, {"salt": "0" * 32 + "\n"}, "salt"),
        (2, {"account_salt": "0" * 29 + "3e8\n"}, "account_salt"),
        (0, {"stream_id": "ab" * 16 + "\n"}, "stream_id"),
        (2, {"names": {"salt": "0" * 32, "user": "bob"}}, "names"),
    ],
)
def test_a_wrong_field_is_refused_by_name(line: int, change: dict[str, Any], named: str) -> None:
    """The sentence names the field."""
    with pytest.raises(WireError, match=named):
        decode(changed(line, change))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_time_ms", -1),
        ("gpu_time_ms", "NaN"),
        ("energy_mj", 1.0),
        ("start_unix_ms", 253_402_300_800_000),
        ("end_boot_ms", 0),
        ("tier", "guess"),
        ("flags", ["made_up"]),
        ("flags", ["shared", "recovered"]),
        ("flags", ["shared", "shared"]),
        ("absent", {"energy": "x", "cycles": "y"}),
        ("cycles_origin", "absent"),
        ("energy_origin", "absent"),
        ("attribution", {"source": "tag", "sharers": 1, "weight": 1, "weights": 2}),
        ("owner", {"kind": "attributed"}),
        ("kind", "gift"),
    ],
)
def test_a_wrong_record_is_refused_by_name(field: str, value: object) -> None:
    """Types, ranges and closed lists of records are checked before anything is hashed."""
    leaf = json.loads(HONEST.split(b"\n")[2])
    leaf["record"] |= {field: value}

    with pytest.raises(WireError, match=field if field != "kind" else "gift"):
        decode(changed(2, leaf))


def test_nan_is_no_json() -> None:
    """A NaN that a careless encoder would write is refused as what it is."""
    content = HONEST.replace(b'"energy_counter_mj":987654321', b'"energy_counter_mj":NaN')

    with pytest.raises(WireError, match="leaf 0"):
        decode(content)


@pytest.mark.parametrize("other", [b'{"sequence":0,', b" ", b"\xff"])
def test_there_is_one_byte_form(other: bytes) -> None:
    """Spaces, other orders and other encodings are refused, though they mean the same."""
    with pytest.raises(WireError):
        decode(HONEST[:1] + other + HONEST[1:])


def test_concatenated_batches_come_apart() -> None:
    """Record counts frame the batches; a torn last one is told apart from the whole ones."""
    other = sealed([])
    parts = split_batches(HONEST + other + HONEST[:-10])

    assert next(parts) == HONEST
    assert next(parts) == other
    with pytest.raises(Truncated):
        next(parts)


def test_an_endless_line_is_refused_early() -> None:
    """A line without an end is not searched for ever."""
    with pytest.raises(WireError, match="at most"):
        list(split_batches(b"{" * 3_000_000))


def test_a_foreign_key_does_not_verify() -> None:
    """Only the signing key's public half accepts the signature."""
    batch = decode(HONEST)
    stranger = SigningKey.from_seed(b"\x08" * 32)

    with pytest.raises(FlopLedgerError, match="signature"):
        verify(stranger.public_key, batch.signature, batch.header_bytes)
    assert len(fingerprint(stranger.public_key)) == 64


def test_keys_survive_their_file_and_never_print_their_secret() -> None:
    """PEM out and in again is the same key; repr shows the public half only."""
    again = SigningKey.from_pem(KEY.to_pem())

    assert again.public_key == KEY.public_key
    assert repr(KEY) == f"SigningKey(public_key={KEY.public_key!r})"
    with pytest.raises(InvalidInput, match="key file"):
        SigningKey.from_pem(b"no key")
