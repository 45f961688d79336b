"""What the ledger says: the one query path for command line, API, pages, /metrics and statements.

Amounts are read as exact sums of the records' bases; FLOP and energy bounds are computed from
them here, by the core's functions, each time they are asked for, so a better model or table row
restates history. Every answer comes from one snapshot and names the position it was made at.
This module never writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from flopledger_collector.ledger import first_estimates, hosts
from flopledger_collector.ledger.delta import HOST_TIER, MODULE_SCOPE
from flopledger_collector.ledger.position import Head, Position, covered_entries, heads_root
from flopledger_core.bounds import Bounds
from flopledger_core.energy import energy_bounds
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.flop import FLOP_MODEL_VERSION, Work, work
from flopledger_core.identity import OwnerKind
from flopledger_core.records import BudgetSet, Declaration, PeakBasis
from flopledger_core.units import MS_PER_DAY, NS_PER_MS

if TYPE_CHECKING:
    from flopledger_collector.clocks import Clock
    from flopledger_collector.journal import LedgerIdentity
    from flopledger_collector.store.interface import Database
    from flopledger_collector.store.readings import Reading, RollupSum
    from flopledger_core.accelerators import AcceleratorTable, Resolved

Standing = Literal["clear", "disputed"]
EnergyBoundary = Literal["gpu", "module"]
GPU_BOUNDARY: Final = "gpu"
MODULE_BOUNDARY: Final = "module"  # CPU, GPU and memory of a superchip, by one counter


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One group of usage: everything that shares an account, an activity, a device model, a tier.

    `sums` are exact and never altered by the standing; `work` and `energy_mj` of a disputed line
    are already out of low and central and only in high.
    """

    account: str  # the project, or `idle` / `unattributed`
    project: str | None
    kind: OwnerKind
    model: str | None
    run: str | None
    activity: str
    device_name: str  # "" where no device is spoken of (declarations)
    pci_device_id: str | None
    compute_capability: str | None
    accelerator: str | None  # the hardware table's key; None: the table lacks this device
    stand_in: bool  # the table lacks this model; its architecture stands in, with wide bounds
    tier: str
    peak_basis: PeakBasis | None  # what turned cycles into FLOP; None where nothing did
    precision: str | None
    assumed_precision: str | None  # of central tensor FLOP; None where no device is known
    precision_origin: str
    standing: Standing
    simulated: bool
    records: int  # how many records were summed
    sums: dict[str, int]  # quantities of core.flop.basis, unbounded
    work: Work
    energy_mj: Bounds  # by the device's own meter, or as declared
    energy_boundary: EnergyBoundary | None  # of that meter; None where a node is spoken of
    cpu_time_ms: Bounds | None  # of a node; None where GPUs or declarations are spoken of
    host_energy_mj: dict[str, Bounds]  # of a node, by boundary; never added to each other
    first_model_version: str | None  # of the agents' first estimates; None: records without one
    first_table_version: str | None
    first_flop: Bounds | None  # the sum of those estimates as sealed; no dispute alters it
    first_unix_ms: int
    last_unix_ms: int

    @property
    def is_host(self) -> bool:
        """Whether this is usage of a node itself, without its GPUs."""
        return self.tier == HOST_TIER


class JobLine(Line, frozen=True, kw_only=True):
    """A line of one job; `job` is None for work of a project that no job id came with."""

    job: str | None


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Lines, the position they were read at, and what turned cycles into FLOP."""

    position: Position
    lines: tuple[Line, ...]
    model_version: str
    table_version: str


class ProjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A project that a person opened, or that usage named before anybody opened it."""

    project: str
    entity: str | None
    title: str | None
    opened: bool  # False: known only from usage or another entry; to be checked by a person
    opened_unix_ms: int | None
    first_unix_ms: int | None  # of its records; None while it has none
    last_unix_ms: int | None


class StreamInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One stream: who writes it and how far it has come."""

    stream_id: str
    fingerprint: str
    node: str
    cluster: str | None
    author: str
    simulated: bool
    head_sequence: int
    last_received_unix_ms: int
    last_window_end_unix_ms: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the ledger itself is doing."""

    ledger_id: str
    simulated: bool
    journal_entries: int
    fold_lag_entries: int  # journaled, not folded
    clear_records: int  # folded usage, gaps, hours and declarations
    disputed_records: int
    gap_time_ms: int  # device time nobody metered, whoever owned it
    audit_counts: dict[str, int]  # kept conflicts and refusals by code
    streams: tuple[StreamInfo, ...]

    @property
    def conflict_entries(self) -> int:
        """Batches that contradicted the journal, by their place or by their link."""
        return self.audit_counts.get("conflict", 0) + self.audit_counts.get("wrong_link", 0)


class Ledger:
    """The read side. Safe to use from several threads; every call is one snapshot."""

    def __init__(
        self,
        database: Database,
        *,
        table: AcceleratorTable,
        clock: Clock,
        identity: LedgerIdentity,
    ) -> None:
        self._database = database
        self._table = table
        self._clock = clock
        self._identity = identity
        self._root_of: tuple[tuple[Head, ...], str] = ((), heads_root(()))

    def totals(
        self,
        project: str | None = None,
        *,
        start_unix_ms: int | None = None,
        end_unix_ms: int | None = None,
    ) -> Totals:
        """Lines of one project, or of every account; a period is half-open, in whole UTC days.

        Records belong to the day they start in.
        """
        start_day, end_day = _days(start_unix_ms, end_unix_ms)
        with self._database.reading() as reading:
            groups = reading.rollup(project, start_day, end_day, by_job=False)
            position = self._position(reading)
        return Totals(
            position=position,
            lines=tuple(Line(**self._fields(group)) for group in groups),
            model_version=FLOP_MODEL_VERSION,
            table_version=self._table.version,
        )

    def jobs(self, project: str) -> tuple[JobLine, ...]:
        """The lines of one project, apart by job."""
        with self._database.reading() as reading:
            groups = reading.rollup(project, None, None, by_job=True)
        return tuple(JobLine(job=group.job or None, **self._fields(group)) for group in groups)

    def projects(self) -> tuple[ProjectInfo, ...]:
        """Every project by id: the opened ones, and those that only usage or an entry named."""
        with self._database.reading() as reading:
            return tuple(
                ProjectInfo(opened=row.opened_unix_ms is not None, **msgspec.structs.asdict(row))
                for row in reading.projects()
            )

    def budgets(self, project: str | None = None) -> tuple[BudgetSet, ...]:
        """The effective budgets: of each project and name the entry posted last."""
        effective: dict[tuple[str, str], BudgetSet] = {}
        with self._database.reading() as reading:
            for content in reading.entries("budget", project):
                record = msgspec.json.decode(content, type=BudgetSet)
                effective[record.project, record.name] = record
        return tuple(effective[key] for key in sorted(effective))

    def declarations(self, project: str) -> tuple[Declaration, ...]:
        """What people declared for a project, in the order it was posted."""
        with self._database.reading() as reading:
            return tuple(
                msgspec.json.decode(content, type=Declaration)
                for content in reading.entries("declaration", project)
            )

    def position(self) -> Position:
        """What a figure read now would cover."""
        with self._database.reading() as reading:
            return self._position(reading)

    def health(self) -> Health:
        """How the ledger itself is doing, its streams included."""
        with self._database.reading() as reading:
            streams = tuple(StreamInfo(**row) for row in reading.streams())
            records = reading.record_counts()
            position = self._position(reading)
            return Health(
                ledger_id=self._identity.ledger_id,
                simulated=self._identity.simulated,
                journal_entries=position.entries + position.provisional_entries,
                fold_lag_entries=position.provisional_entries,
                clear_records=records.get("clear", 0),
                disputed_records=records.get("disputed", 0),
                gap_time_ms=reading.quantity("gap_time_ms"),
                audit_counts=reading.audit_counts(),
                streams=streams,
            )

    def _position(self, reading: Reading) -> Position:
        heads = tuple(reading.fold_heads())
        covered, root = self._root_of
        if heads != covered:
            root = heads_root(heads)
            self._root_of = (heads, root)
        entries = covered_entries(heads)
        return Position(
            ledger_id=self._identity.ledger_id,
            entries=entries,
            heads_root=root,
            provisional_entries=reading.journal_entries() - entries,
            at_unix_ms=self._clock.wall_unix_ns() // NS_PER_MS,
        )

    def _fields(self, group: RollupSum) -> dict[str, Any]:
        device = self._device(group)
        disputed = group.standing == "disputed"
        amount = work(
            group.sums,
            table=self._table,
            accelerator=device,
            device_name=group.device_name,
            precision=group.precision or None,
        )
        energy = energy_bounds(group.sums, device)
        if disputed:
            amount = amount.disputed()
            energy = Bounds(low=0, central=0, high=energy.high)
        return {
            "account": group.account,
            "project": group.account if group.kind == "attributed" else None,
            "kind": group.kind,
            "model": group.model or None,
            "run": group.run or None,
            "activity": group.activity,
            "device_name": group.device_name,
            "pci_device_id": group.pci_device_id or None,
            "compute_capability": group.compute_capability or None,
            "accelerator": None if device is None else device.accelerator.key,
            "stand_in": device is not None and not device.in_table,
            "tier": group.tier,
            "peak_basis": _peak_basis(group),
            "precision": group.precision or None,
            "assumed_precision": _assumed_precision(group, device),
            "precision_origin": group.precision_origin,
            "standing": group.standing,
            "simulated": group.simulated,
            "records": group.records,
            "sums": group.sums,
            "work": amount,
            "energy_mj": energy,
            "energy_boundary": _energy_boundary(group),
            "cpu_time_ms": (
                hosts.cpu_time_of(group.sums, disputed=disputed)
                if group.tier == HOST_TIER
                else None
            ),
            "host_energy_mj": hosts.energies_of(group.sums, disputed=disputed),
            "first_model_version": group.first_model_version or None,
            "first_table_version": group.first_table_version or None,
            "first_flop": _first_flop(group),
            "first_unix_ms": group.first_unix_ms,
            "last_unix_ms": group.last_unix_ms,
        }

    def _device(self, group: RollupSum) -> Resolved | None:
        """The table's row, or the stand-in of an architecture for a model that the table lacks.

        Imported hours name a key of the table, meters name a product.
        """
        if not group.device_name:
            return None
        if group.tier == "gpu_hours":
            try:
                return self._table.of_row(self._table.by_key(group.device_name))
            except UnknownName:
                return None
        return self._table.resolve(
            group.device_name, group.pci_device_id or None, group.compute_capability or None
        )


def _peak_basis(group: RollupSum) -> PeakBasis | None:
    """How the number of cycles was come by, of all records of a group alike."""
    if group.tier in {HOST_TIER, "declared"}:
        return None
    if group.tier == "gpu_hours":
        return "dense_at_datasheet_clock"
    if not group.sums.get("elapsed"):
        return "dense_at_maximum_clock"  # only what the device could have done
    counting = group.tier == "gpm_cycles" or (
        # A scraped exporter gives cycles where it can, else shares of time.
        group.tier == "dcgm_pipes" and "float_tensor_busy_us" not in group.sums
    )
    return "dense_at_counted_cycles" if counting else "dense_at_sampled_clock"


def _assumed_precision(group: RollupSum, device: Resolved | None) -> str | None:
    if device is None:
        return None
    offered = device.tensor_span(group.precision or None) is not None
    return group.precision if offered else device.default_precision


def _first_flop(group: RollupSum) -> Bounds | None:
    if not group.first_model_version:
        return None
    return first_estimates.flop_of(group.sums)


def _energy_boundary(group: RollupSum) -> EnergyBoundary | None:
    if group.tier == HOST_TIER:
        return None
    return MODULE_BOUNDARY if group.energy_scope == MODULE_SCOPE else GPU_BOUNDARY


def _days(start_unix_ms: int | None, end_unix_ms: int | None) -> tuple[int | None, int | None]:
    """First day and day after the last of a half-open period, counted from 1970-01-01."""
    for field, value in (("start_unix_ms", start_unix_ms), ("end_unix_ms", end_unix_ms)):
        if value is not None and (value < 0 or value % MS_PER_DAY):
            raise InvalidInput(field, value, "give a UTC midnight; totals are kept by the day")
    if start_unix_ms is not None and end_unix_ms is not None and end_unix_ms < start_unix_ms:
        raise InvalidInput("end_unix_ms", end_unix_ms, "end the period at or after its start")
    return (
        None if start_unix_ms is None else start_unix_ms // MS_PER_DAY,
        None if end_unix_ms is None else end_unix_ms // MS_PER_DAY,
    )
