"""Sealed batches for tests of what happens to them afterwards: signed, whole, without records."""

from __future__ import annotations

from flopledger_core.batch import BatchHeader, ClockState, merkle_root, seal
from flopledger_core.signing import SigningKey

KEY = SigningKey.from_seed(bytes(32))
SEALED_UNIX_MS = 1_764_000_000_000


def sealed(stream_id: str, sequence: int) -> bytes:
    """A batch of a stream, sealed a minute after the one before."""
    sealed_ms = SEALED_UNIX_MS + sequence * 60_000
    header = BatchHeader(
        schema_version=1,
        ledger_id=None,
        stream_id=stream_id,
        sequence=sequence,
        previous_hash="00" * 32 if sequence else None,
        predecessor=None,
        author="agent",
        public_key=KEY.public_key,
        node="n1",
        cluster=None,
        program="test",
        boot_id="boot",
        window_start_unix_ms=sealed_ms,
        window_end_unix_ms=sealed_ms,
        sealed=ClockState(boot_ms=0, unix_ms=sealed_ms, synchronised=None),
        simulated=True,
        record_count=0,
        merkle_root=merkle_root(()),
        manifest=(),
    )
    return seal(header, (), KEY)
