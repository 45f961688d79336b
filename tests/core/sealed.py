"""Sealed batches for tests: one honest H100 minute, and a way to change any part of it."""

from __future__ import annotations

from typing import Any

import msgspec

from flopledger_core.batch import (
    BatchHeader,
    ClockState,
    Salts,
    account_of,
    make_leaves,
    make_manifest,
    merkle_root,
    seal,
)
from flopledger_core.identity import Owner
from flopledger_core.records import Attribution, Cycles, Device, Record, UsageRecord
from flopledger_core.signing import SigningKey

KEY = SigningKey.from_seed(b"\x07" * 32)
H100 = Device(uuid="GPU-7a0e", name="NVIDIA H100 80GB HBM3", pci_device_id="2330", sm_count=132)
MINUTE_MS = 60_000
ELAPSED = 132 * 1_755_000_000 * 60


def usage(**changes: Any) -> UsageRecord:
    """One minute of an H100 at 1,755 MHz, half its tensor pipe busy with BF16."""
    fields: dict[str, Any] = {
        "device": H100,
        "start_unix_ms": 1_764_000_000_000,
        "start_boot_ms": 5_000,
        "end_boot_ms": 5_000 + MINUTE_MS,
        "owner": Owner(kind="attributed", project="atlas", activity="pretrain"),
        "attribution": Attribution(source="environment", evidence="pid 4242"),
        "gpu_time_ms": MINUTE_MS,
        "allocated_time_ms": None,
        "wall_time_ms": MINUTE_MS,
        "tier": "gpm_cycles",
        "precision": "bf16",
        "precision_origin": "declared",
        "cycles": Cycles(
            elapsed=ELAPSED, sm_active=ELAPSED, any_tensor=ELAPSED // 2, hmma=ELAPSED // 2,
            imma=0, dmma=0, dfma=0, fp64=0, fp32=0, fp16=0, integer=0,
        ),
        "cycles_origin": "measured",
        "energy_mj": 600 * MINUTE_MS,
        "energy_origin": "counter",
        "energy_counter_mj": 987_654_321,
        "sm_clock_khz": 1_755_000,
        "absent": {},
        "flags": (),
        "user_commitment": None,
    }  # fmt: skip
    return UsageRecord(**(fields | changes))


def sealed(  # any header field may be changed
    records: list[Record],
    users: list[str | None] | None = None,
    **changes: Any,
) -> bytes:
    """A batch over `records`, signed by KEY; `changes` replace header fields before signing."""
    salts = Salts(
        leaf=tuple(f"{index:032x}" for index in range(len(records))),
        account={
            account: f"{1000 + index:032x}"
            for index, account in enumerate(dict.fromkeys(map(account_of, records)))
        },
        name=tuple(f"{2000 + index:032x}" for index in range(len(records))),
    )
    leaves = make_leaves(records, users or [None] * len(records), salts)
    header = BatchHeader(
        schema_version=1,
        ledger_id=None,
        stream_id="ab" * 16,
        sequence=0,
        previous_hash=None,
        predecessor=None,
        author="agent",
        public_key=KEY.public_key,
        node="node-1",
        cluster="west",
        program="flopledger-agent 0.1.0",
        boot_id="4f6b",
        window_start_unix_ms=1_764_000_000_000,
        window_end_unix_ms=1_764_000_060_000,
        sealed=ClockState(boot_ms=65_000, unix_ms=1_764_000_060_000, synchronised=True),
        simulated=False,
        record_count=len(records),
        merkle_root=merkle_root(leaves),
        manifest=make_manifest(records, salts.account),
    )
    return seal(msgspec.structs.replace(header, **changes), leaves, KEY)
