"""Sealed batches for the collector's tests and benchmarks: honest streams, and ways to spoil them.

A `StreamSealer` continues one stream batch after batch, as an agent would: it links, signs with a
key made from a seed, and draws salts from a counter, so the same calls give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from flopledger_core.batch import (
    BatchHeader,
    ClockState,
    Salts,
    account_of,
    batch_hash,
    make_leaves,
    make_manifest,
    merkle_root,
    seal,
)
from flopledger_core.identity import IDLE_OWNER, UNATTRIBUTED_OWNER, Owner
from flopledger_core.records import (
    Attribution,
    BudgetSet,
    Cycles,
    Device,
    Estimate,
    GapRecord,
    HostRecord,
    ImportedHours,
    ProjectOpened,
    UsageRecord,
)
from flopledger_core.signing import SigningKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flopledger_core.records import Record

START_UNIX_MS: Final = 1_763_942_400_000  # a UTC midnight
MINUTE_MS: Final = 60_000
H100: Final = "NVIDIA H100 80GB HBM3"
ELAPSED_PER_MINUTE: Final = 132 * 1_755_000_000 * 60 // 1  # SM-cycles at 1,755 MHz


class TestClock:
    """A clock that stands until a test moves it."""

    __test__ = False

    def __init__(self, unix_ms: int = START_UNIX_MS) -> None:
        self.unix_ms = unix_ms

    def boottime_ns(self) -> int:
        """A second after boot at the origin."""
        return (self.unix_ms - START_UNIX_MS + 1_000) * 1_000_000

    def wall_unix_ns(self) -> int:
        """Where the test put it."""
        return self.unix_ms * 1_000_000

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """Real time."""
        return virtual_seconds


def project_owner(project: str = "atlas", **fields: Any) -> Owner:
    """The owner of a project's training."""
    defaults: dict[str, Any] = {
        "kind": "attributed",
        "project": project,
        "activity": "pretrain",
    }
    return Owner(**(defaults | fields))


def usage(
    minute: int = 0,
    gpu: int = 0,
    *,
    owner: Owner | None = None,
    node: str = "node-1",
    busy_per_mille: int = 500,
    **changes: Any,
) -> UsageRecord:
    """One honest minute of one H100; `minute` counts from START_UNIX_MS."""
    owner = project_owner() if owner is None else owner
    source = {"attributed": "environment", "idle": "idle", "unattributed": "none"}[owner.kind]
    tensor = ELAPSED_PER_MINUTE * busy_per_mille // 1000
    boot_ms = 1_000 + minute * MINUTE_MS
    record = UsageRecord(
        device=Device(
            uuid=f"GPU-{node}-{gpu}", name=H100, pci_device_id="2330", sm_count=132
        ),
        start_unix_ms=START_UNIX_MS + minute * MINUTE_MS,
        start_boot_ms=boot_ms,
        end_boot_ms=boot_ms + MINUTE_MS,
        owner=owner,
        attribution=Attribution(source=source),  # type: ignore[arg-type]
        gpu_time_ms=MINUTE_MS,
        allocated_time_ms=MINUTE_MS,
        wall_time_ms=MINUTE_MS,
        tier="gpm_cycles",
        precision="bf16",
        precision_origin="declared",
        cycles=Cycles(
            elapsed=ELAPSED_PER_MINUTE, sm_active=ELAPSED_PER_MINUTE, any_tensor=tensor,
            hmma=tensor, imma=0, dmma=0, dfma=0, fp64=0, fp32=tensor // 20, fp16=0,
            integer=tensor // 30,
        ),
        cycles_origin="measured",
        energy_mj=600 * MINUTE_MS,
        energy_origin="counter",
        energy_counter_mj=600 * MINUTE_MS * (minute + 1),
        sm_clock_khz=1_755_000,
        absent={},
        flags=(),
        user_commitment=None,
    )  # fmt: skip
    if "energy_mj" in changes and changes["energy_mj"] is None:
        changes = {"energy_origin": "absent"} | changes
    return msgspec.structs.replace(record, **changes)


def gap(
    minute: int = 0, *, minutes: int = 1, gpu: int = 0, owner: Owner | None = None
) -> GapRecord:
    """Minutes of one H100 that nobody metered."""
    return GapRecord(
        device=Device(uuid=f"GPU-node-1-{gpu}", name=H100, pci_device_id="2330", sm_count=132),
        start_unix_ms=START_UNIX_MS + minute * MINUTE_MS,
        start_boot_ms=1_000 + minute * MINUTE_MS,
        gap_ms=minutes * MINUTE_MS,
        owner=UNATTRIBUTED_OWNER if owner is None else owner,
        attribution=Attribution(source="none"),
        precision=None,
        reason="the driver did not answer",
        flags=(),
        user_commitment=None,
    )


def host(minute: int = 0, *, owner: Owner | None = None, **changes: Any) -> HostRecord:
    """One honest minute of a node of four CPUs, of which an owner used half; see `hosts`."""
    owner = project_owner() if owner is None else owner
    source = {"attributed": "environment", "idle": "idle", "unattributed": "none"}[owner.kind]
    attribution = Attribution(source=source, sharers=2, weight=1, weights=2)  # type: ignore[arg-type]
    record = HostRecord(
        start_unix_ms=START_UNIX_MS + minute * MINUTE_MS,
        start_boot_ms=1_000 + minute * MINUTE_MS,
        window_ms=MINUTE_MS,
        owner=owner,
        attribution=attribution,
        cpu_count=4,
        cpu_time_ms=2 * MINUTE_MS,
        energy_mj={"cpu_package": 90 * MINUTE_MS, "node": 700 * MINUTE_MS},
        energy_sources={"cpu_package": "rapl", "node": "redfish"},
        absent={"energy_dram": "not_supported", "flop": "cpu_flop_not_counted"},
        flags=("apportioned",),
        user_commitment=None,
    )
    return msgspec.structs.replace(record, **changes)


def hosts(minute: int = 0, *, owner: Owner | None = None, **changes: Any) -> list[HostRecord]:
    """The whole minute of that node: half of its CPU time is an owner's, half is idle."""
    return [host(minute, owner=one, **changes) for one in (owner, IDLE)]


def first_estimate(flop: int, model_version: str = "1", table_version: str = "old") -> Estimate:
    """What an agent sealed: its central FLOP, a half below and a half above."""
    return Estimate(
        flop_low=str(flop // 2),
        flop_central=str(flop),
        flop_high=str(flop + flop // 2),
        assumed_precision="bf16",
        peak_basis="dense_at_counted_cycles",
        model_version=model_version,
        table_version=table_version,
    )


def hours(import_key: str, *, project: str | None = "atlas", gpus: int = 8) -> ImportedHours:
    """One hour of a scheduler's job on some H100s; without a project its owner is unknown."""
    owner = UNATTRIBUTED_OWNER if project is None else project_owner(project, job=import_key)
    return ImportedHours(
        import_key=import_key,
        cluster="west",
        owner=owner,
        accelerator="H100 SXM",
        gpus=gpus,
        start_unix_ms=START_UNIX_MS,
        end_unix_ms=START_UNIX_MS + 60 * MINUTE_MS,
        gpu_time_ms=gpus * 60 * MINUTE_MS,
        precision="bf16",
        utilization_per_mille=400,
        utilization_source="a fleet average",
        source="sacct",
        at_unix_ms=START_UNIX_MS,
        author="ops",
    )


class StreamSealer:
    """One agent's stream: every `seal` gives its next batch."""

    def __init__(self, seed: int = 1, *, node: str = "node-1", **header: Any) -> None:
        self.key = SigningKey.from_seed(seed.to_bytes(32, "big"))
        self.node = node
        self.stream_id = header.pop("stream_id", f"{seed:032x}")
        self.sequence = 0
        self.head_hash: str | None = None
        self._header = header
        self._salts_drawn = 0

    def seal(self, records: Sequence[Record], **changes: Any) -> bytes:
        """The next batch over `records`; `changes` replace header fields before it is signed."""
        content = self.peek(records, **changes)
        self.sequence += 1
        self.head_hash = batch_hash(content.partition(b"\n")[0])
        return content

    def peek(self, records: Sequence[Record], **changes: Any) -> bytes:
        """A batch for the same place without moving on: sealed twice, it is a conflict."""
        accounts = dict.fromkeys(map(account_of, records))
        account_salts = {account: self._salt() for account in accounts}
        salts = Salts(
            leaf=tuple(self._salt() for _ in records),
            account=account_salts,
            name=tuple(self._salt() for _ in records),
        )
        leaves = make_leaves(records, [None] * len(records), salts)
        placed = [record for record in records if not isinstance(record, ProjectOpened | BudgetSet)]
        start = min((record.start_unix_ms for record in placed), default=START_UNIX_MS)
        end = max((record.end_unix_ms for record in placed), default=START_UNIX_MS)
        header = BatchHeader(
            schema_version=1,
            ledger_id=None,
            stream_id=self.stream_id,
            sequence=self.sequence,
            previous_hash=self.head_hash,
            predecessor=None,
            author="agent",
            public_key=self.key.public_key,
            node=self.node,
            cluster="west",
            program="flopledger-agent 0.1.0",
            boot_id="boot-1",
            window_start_unix_ms=start,
            window_end_unix_ms=end,
            sealed=ClockState(boot_ms=1_000, unix_ms=end, synchronised=True),
            simulated=False,
            record_count=len(records),
            merkle_root=merkle_root(leaves),
            manifest=make_manifest(records, account_salts),
        )
        header = msgspec.structs.replace(header, **(self._header | changes))
        return seal(header, leaves, self.key)

    def minute(self, minute: int, *, gpus: int = 8, owner: Owner | None = None) -> bytes:
        """The next batch: one honest node-minute of so many GPUs."""
        return self.seal(
            [usage(minute, gpu, owner=owner, node=self.node) for gpu in range(gpus)],
        )

    def _salt(self) -> str:
        self._salts_drawn += 1
        return f"{self._salts_drawn:032x}"


IDLE: Final = IDLE_OWNER
