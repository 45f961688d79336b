"""From journal entries to what they add to the projections: pure, exact, in memory.

A batch was fully checked when it was admitted, so its records are read here without checking
signature, hashes and byte form again. Every part of a delta is a sum, a minimum, a maximum or a
set, so deltas can be added in any grouping and give the same projections: that is why a rebuild
equals what was folded live.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from flopledger_collector.journal import AuditEntry, disputed_indexes, excluded_indexes
from flopledger_collector.ledger.position import Head
from flopledger_core.basis import basis
from flopledger_core.errors import FlopLedgerError
from flopledger_core.records import (
    BudgetSet,
    Declaration,
    GapRecord,
    HostRecord,
    ImportedHours,
    ProjectOpened,
    Record,
    UsageRecord,
)
from flopledger_core.units import MS_PER_DAY
from flopledger_core.validation import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable

UNKNOWN_ACCELERATOR: Final = "unknown accelerator"  # the device name of hours that state none
HOST_TIER: Final = "host"  # of groups that hold a node's own usage, without its GPUs
MODULE_SCOPE: Final = "module"  # of energy counters that read CPU, GPU and memory together
CPU_TIME_POSSIBLE: Final = "host_cpu_possible_time_ms"  # of all CPUs, where none was read
FIRST_ESTIMATE: Final = "first_flop"  # begins the quantities of estimates that agents sealed
FLAGGED: Final = "flagged_records_"  # begins the quantity that counts the records with a flag

AmountRecord = UsageRecord | GapRecord | HostRecord | ImportedHours | Declaration


class GroupKey(NamedTuple):
    """What a rollup is kept by; '' stands for None. The order is `schema.GROUP_KEYS`."""

    day: int  # of the record's start, UTC, counted from 1970-01-01
    account: str
    kind: str
    model: str
    run: str
    job: str
    activity: str
    device_name: str
    pci_device_id: str
    compute_capability: str
    tier: str
    energy_scope: str  # 'module' where the counter reads more than the GPU, else ''
    precision: str
    precision_origin: str
    first_model_version: str  # of the agent's first estimate; '' where a record carries none
    first_table_version: str
    standing: str
    simulated: int

    @property
    def digest(self) -> str:
        """The hex SHA-256 over the columns: the group's id, the same in every database."""
        return hashlib.sha256(msgspec.json.encode(tuple(self))).hexdigest()


class GroupDelta:
    """What a group gains."""

    __slots__ = ("first_unix_ms", "last_unix_ms", "records", "sums")

    def __init__(self, first_unix_ms: int, last_unix_ms: int) -> None:
        self.records = 0
        self.first_unix_ms = first_unix_ms
        self.last_unix_ms = last_unix_ms
        self.sums: dict[str, int] = {}

    def add(self, sums: dict[str, int], first_unix_ms: int, last_unix_ms: int) -> None:
        """Take in one record."""
        self.records += 1
        self.first_unix_ms = min(self.first_unix_ms, first_unix_ms)
        self.last_unix_ms = max(self.last_unix_ms, last_unix_ms)
        own = self.sums
        for quantity, amount in sums.items():
            own[quantity] = own.get(quantity, 0) + amount


class ProjectDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a project; `merged` is commutative and associative."""

    entity: str | None = None
    title: str | None = None
    opened_unix_ms: int | None = None
    opened_rank: str = ""  # '' while nobody opened it
    first_unix_ms: int | None = None
    last_unix_ms: int | None = None

    def merged(self, other: ProjectDelta) -> ProjectDelta:
        """Both together: the later opening speaks, times span both."""
        speaker = self if self.opened_rank >= other.opened_rank else other
        return ProjectDelta(
            entity=speaker.entity,
            title=speaker.title,
            opened_unix_ms=_least(self.opened_unix_ms, other.opened_unix_ms),
            opened_rank=speaker.opened_rank,
            first_unix_ms=_least(self.first_unix_ms, other.first_unix_ms),
            last_unix_ms=_greatest(self.last_unix_ms, other.last_unix_ms),
        )


class PostedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A person's entry, kept whole, with the rank that orders it among the others."""

    project: str
    rank: str
    record: bytes


class UnfoldedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A journal row that no projection has in it yet."""

    stream_id: str
    sequence: int
    batch_hash: str
    content: bytes
    findings: str
    received_unix_ms: int = 0


class TakenEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A journal entry as the fold read it; empty where it could not."""

    node: str = ""
    boot_id: str = ""
    records: tuple[Record, ...] = ()
    findings: tuple[Finding, ...] = ()


class FoldedHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What folding needs of a header; the rest is skipped."""

    node: str
    boot_id: str
    simulated: bool
    window_end_unix_ms: int


class FoldedLeaf(msgspec.Struct, frozen=True, kw_only=True):
    """What folding needs of a leaf."""

    record: Record


_header_decoder = msgspec.json.Decoder(FoldedHeader)
_leaf_decoder = msgspec.json.Decoder(FoldedLeaf)
_findings_decoder = msgspec.json.Decoder(tuple[Finding, ...])


class Delta:
    """What a run of journal entries adds to the projections."""

    def __init__(self) -> None:
        self.entries = 0
        self.from_sequences: dict[str, int] = {}  # stream -> first sequence taken in
        self.heads: dict[str, Head] = {}
        self.groups: dict[GroupKey, GroupDelta] = {}
        self._named: dict[str, ProjectDelta] = {}  # by entries of people; usage names more
        self.budgets: list[PostedRecord] = []
        self.declarations: list[PostedRecord] = []
        self.audits: list[AuditEntry] = []  # entries that count less than they say

    def take(self, entry: UnfoldedEntry) -> TakenEntry:
        """Add one journal entry; entries of a stream come in order. Returns what it read.

        An entry that cannot be read or summed never stops the fold: it is covered with none of
        its amounts, and noted.
        """
        self.entries += 1
        self.from_sequences.setdefault(entry.stream_id, entry.sequence)
        self.heads[entry.stream_id] = Head(
            stream_id=entry.stream_id, sequence=entry.sequence, batch_hash=entry.batch_hash
        )
        try:
            header, taken = _read(entry)
            sums = [folded_sums(record) for record in taken.records]
        except (msgspec.MsgspecError, FlopLedgerError, ArithmeticError, ValueError) as error:
            self._note(entry, "unfoldable", f"counted with no amounts: {error}")
            return TakenEntry()
        disputed = disputed_indexes(taken.findings, len(sums))
        excluded = excluded_indexes(taken.findings)
        if excluded:
            message = f"{len(excluded)} records that this author may not write count nowhere"
            self._note(entry, "wrong_author", message)
        for index, record in enumerate(taken.records):
            if index in excluded:
                continue
            if isinstance(record, AmountRecord):
                self._add_amounts(record, sums[index], index in disputed, header.simulated)
            if index not in disputed:
                rank = _rank(header.window_end_unix_ms, entry, index)
                self._add_posted(record, rank)
        return taken

    def _note(self, entry: UnfoldedEntry, code: str, message: str) -> None:
        self.audits.append(
            AuditEntry(
                at_unix_ms=entry.received_unix_ms,
                code=code,
                stream_id=entry.stream_id,
                sequence=entry.sequence,
                batch_hash=entry.batch_hash,
                message=message,
            )
        )

    def projects(self) -> dict[str, ProjectDelta]:
        """Every project these entries name, with when its usage was seen."""
        projects = dict(self._named)
        for key, group in self.groups.items():
            if key.kind == "attributed":
                seen = ProjectDelta(
                    first_unix_ms=group.first_unix_ms, last_unix_ms=group.last_unix_ms
                )
                known = projects.get(key.account)
                projects[key.account] = seen if known is None else known.merged(seen)
        return projects

    def _add_amounts(
        self,
        record: AmountRecord,
        sums: dict[str, int],
        disputed: bool,  # noqa: FBT001
        simulated: bool,  # noqa: FBT001
    ) -> None:
        key = group_key(record, "disputed" if disputed else "clear", int(simulated))
        start, end = record.start_unix_ms, record.end_unix_ms
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = GroupDelta(start, end)
        group.add(sums, start, end)

    def _add_posted(self, record: Record, rank: str) -> None:
        if isinstance(record, ProjectOpened):
            opened = ProjectDelta(
                entity=record.entity,
                title=record.title,
                opened_unix_ms=record.at_unix_ms,
                opened_rank=rank,
            )
            self._see(record.project, opened)
        elif isinstance(record, (BudgetSet, Declaration)):
            self._see(record.project, ProjectDelta())
            content = msgspec.json.encode(record)
            posted = PostedRecord(project=record.project, rank=rank, record=content)
            (self.budgets if isinstance(record, BudgetSet) else self.declarations).append(posted)

    def _see(self, project: str, seen: ProjectDelta) -> None:
        known = self._named.get(project)
        self._named[project] = seen if known is None else known.merged(seen)


def folded_sums(record: Record) -> dict[str, int]:
    """What a record adds to its group: its basis, and each of its flags as a count of one.

    The counts say how many records carry a caution, so that a statement can repeat it. CPU time
    that nobody read is limited by the CPUs there were, which the basis does not multiply out.
    """
    # The group's key has the versions of a first estimate. As part of a name they would be an
    # agent's own text where the store gives names a meaning.
    sums = {
        name.partition("@")[0] if name.startswith(FIRST_ESTIMATE) else name: amount
        for name, amount in basis(record).items()
    }
    if isinstance(record, (UsageRecord, GapRecord, HostRecord)):
        sums |= {f"{FLAGGED}{flag}": 1 for flag in record.flags}
    if isinstance(record, HostRecord) and record.cpu_time_ms is None:
        sums[CPU_TIME_POSSIBLE] = record.cpu_count * record.window_ms
    return sums


def group_key(record: AmountRecord, standing: str, simulated: int) -> GroupKey:
    """The rollup group a record belongs to."""
    if isinstance(record, Declaration):
        account, kind, job = record.project, "attributed", None
        model, run, activity = record.model, record.run, record.activity
    else:
        owner = record.owner
        account, kind, job = owner.account, owner.kind, owner.job
        model, run, activity = owner.model, owner.run, owner.activity
    return GroupKey(
        day=record.start_unix_ms // MS_PER_DAY,
        account=account,
        kind=kind,
        model=model or "",
        run=run or "",
        job=job or "",
        activity=activity,
        standing=standing,
        simulated=simulated,
        **_device_columns(record),
    )


def _device_columns(record: AmountRecord) -> dict[str, str]:
    """The columns that say what was metered and how."""
    columns: dict[str, str] = dict.fromkeys(
        (
            "device_name", "pci_device_id", "compute_capability", "energy_scope", "precision",
            "first_model_version", "first_table_version",
        ),
        "",
    )  # fmt: skip
    columns["precision_origin"] = "unknown"
    if isinstance(record, HostRecord):
        return columns | {"tier": HOST_TIER}
    if isinstance(record, Declaration):
        return columns | {"tier": "declared"}
    if record.precision is not None:
        columns |= {"precision": record.precision, "precision_origin": "declared"}
    if isinstance(record, ImportedHours):
        name = record.accelerator or UNKNOWN_ACCELERATOR
        return columns | {"tier": "gpu_hours", "device_name": name}
    device = record.device
    columns |= {
        "device_name": device.name,
        "pci_device_id": device.pci_device_id or "",
        "compute_capability": device.compute_capability or "",
    }
    if isinstance(record, GapRecord):
        return columns | {"tier": "none"}
    estimate = record.estimate
    return columns | {
        "tier": record.tier,
        "energy_scope": MODULE_SCOPE if record.energy_scope == MODULE_SCOPE else "",
        "precision_origin": record.precision_origin,
        "first_model_version": "" if estimate is None else estimate.model_version,
        "first_table_version": "" if estimate is None else estimate.table_version,
    }


def delta_of(entries: Iterable[UnfoldedEntry]) -> Delta:
    """What these entries add together."""
    delta = Delta()
    for entry in entries:
        delta.take(entry)
    return delta


def _read(entry: UnfoldedEntry) -> tuple[FoldedHeader, TakenEntry]:
    lines = entry.content.split(b"\n")
    header = _header_decoder.decode(lines[0])
    taken = TakenEntry(
        node=header.node,
        boot_id=header.boot_id,
        records=tuple(_leaf_decoder.decode(line).record for line in lines[2:-1]),
        findings=() if entry.findings == "[]" else _findings_decoder.decode(entry.findings),
    )
    return header, taken


def _rank(posted_unix_ms: int, entry: UnfoldedEntry, index: int) -> str:
    """Text that sorts as entries were posted; within a stream, posting times never fall."""
    return f"{posted_unix_ms:015d} {entry.stream_id} {entry.sequence:019d} {index:05d}"


def _least(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return min(known, default=None)


def _greatest(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return max(known, default=None)
