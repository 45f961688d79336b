"""What is on a statement: one value, complete, from which every rendering is made.

A statement itemises a project so that an auditor can add it up again: the line items' FLOP is the
total, exactly, and every policy view adds up from the same items. It shows a project beside the
ledger's own accounts (idle, unattributed) but never another project's figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from flopledger_collector.budgets import BudgetEvaluation
from flopledger_collector.errors import StoreBusy
from flopledger_collector.instruments.evaluation import Assessment
from flopledger_collector.ledger.delta import FLAGGED
from flopledger_collector.ledger.position import Position
from flopledger_collector.ledger.totals import Line, ProjectInfo
from flopledger_collector.policies.evaluation import Bridge, bridge
from flopledger_collector.restatement import Restatement, restatement_of
from flopledger_collector.status import (
    READ_ATTEMPTS_MAX,
    Accounts,
    PolicyTotals,
    Reader,
    Rules,
    budget_reasons,
    policy_totals,
    project_status,
    read_accounts,
    require_project,
)
from flopledger_collector.usage import (
    Usage,
    energies_of,
    energy_of,
    gpu_time_of,
    possible,
    reasons_of,
    usage_of,
)
from flopledger_core.activities import UNATTRIBUTED
from flopledger_core.bounds import Bounds
from flopledger_core.flop import Work
from flopledger_core.records import FLAGS, Declaration

ENERGY_BOUNDARY: Final = "gpu"  # of every energy that names no other: not node nor building
BOUNDARIES: Final[dict[str, str]] = {
    "gpu": "the GPU with its memory, by its own counter",
    "module": "a superchip by one counter: CPU, GPU and memory together",
    "cpu_package": "the node's CPU packages (RAPL)",
    "dram": "the node's memory (RAPL)",
    "platform": "the node's platform domain (RAPL psys)",
    "node": "the whole node at its power supplies (Redfish or IPMI)",
}

METHODS: Final[dict[str, str]] = {
    "gpm_cycles": "measured: active SM-cycles per pipe, counted by the device",
    "gpm_util": "derived: pipe activity in per cent x SMs x SM clock x time",
    "dcgm_pipes": "derived: pipe activity of DCGM's profiling fields x SMs x SM clock x time",
    "sm_active": "estimated: SM activity only; low is zero, high every pipe active",
    "gpu_util": "estimated: GPU utilisation only; low is zero, high every pipe active",
    "gpu_hours": "estimated: scheduler's GPU-hours x peak x stated utilisation",
    "declared": "declared by a person, with the evidence named",
    "none": "absent: nobody could meter it; from zero to the device's peak",
    "host": "measured: the node's own meters; energy is cut between owners by CPU time",
}

NOTES: Final[tuple[str, ...]] = (
    (
        "Executed FLOP is what the hardware carried out: active SM-cycles of each pipe times the "
        "FLOP that one SM does per cycle at its precision. Integer operations are counted apart "
        "and are never part of FLOP."
    ),
    (
        "Model FLOP (6 x parameters x tokens and kin) is declared, shown apart, and never added "
        "to executed FLOP nor compared with a threshold here."
    ),
    (
        "Low, central and high are limits, not standard deviations; they add linearly. Low rounds "
        "down, high rounds up; figures written for people are then cut to three digits, and the "
        "JSON form has all of them."
    ),
    (
        "A gap contributes from zero to the device's peak at its maximum clock. Disputed records "
        "are out of low and central and stay in high."
    ),
    (
        "Work whose owner is not known could belong to any project: its high bound is in the high "
        "bound of every one, shown as a line of its own."
    ),
    (
        "Energy is kept by the boundary of its meter. Boundaries contain each other, so they are "
        "never added: the GPU's is its own counter, without node, cooling or building. Where a "
        "counter reads a whole module, the GPU's own part is only limited by it."
    ),
    (
        "CPU-seconds and the energy of nodes are of those nodes whose own meters were read. What "
        "work used on other nodes beside their GPUs is in no figure."
    ),
    (
        "An energy budget is compared with what each device's own meter read: the GPU's, or the "
        "whole module's where a counter reads no less. Energy of nodes is not in it."
    ),
    (
        "FLOP of CPUs is absent: no counter reads it (cpu_flop_not_counted). It is in no figure "
        "and in no bound; CPU-seconds stand beside."
    ),
    (
        "CUDA-core FLOP is at most what the busy pipe could have done: its low end is zero. "
        "Tensor FLOP, CUDA-core FLOP and what people declared add up to executed FLOP."
    ),
    (
        "Peak rates are dense, never with structured sparsity. The peak basis says which clock "
        "turned time into cycles where cycles were not counted."
    ),
)


class LineItem(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the statement: a group of usage, numbered, with how it was established."""

    number: int
    line: Line
    gpu_time_ms: Bounds
    energy_mj: Bounds  # at the GPU's boundary
    energies_mj: dict[str, Bounds]  # what the line's own meters read, by boundary
    method: str


class Period(msgspec.Struct, frozen=True, kw_only=True):
    """A half-open period in whole UTC days; None is unlimited."""

    start_unix_ms: int | None = None
    end_unix_ms: int | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self.start_unix_ms is None and self.end_unix_ms is None


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """A project's itemised statement at one position of the ledger."""

    info: ProjectInfo
    period: Period
    position: Position
    generated_unix_ms: int
    model_version: str
    table_version: str
    simulated: bool
    usage: Usage  # of the items
    shared: Usage  # unattributed work of the period that could belong to the project
    unattributed: Usage  # the same as the ledger has it
    idle: Usage
    policies: tuple[PolicyTotals, ...]
    bridges: tuple[Bridge, ...]  # from the first policy to each other one
    assessments: tuple[Assessment, ...]  # over the project's whole life, whatever the period
    budgets: tuple[BudgetEvaluation, ...]  # the same
    items: tuple[LineItem, ...]  # of GPUs, and what people declared
    host_items: tuple[LineItem, ...]  # of nodes themselves; numbered on from the items
    restatement: Restatement  # first estimates beside today's figures
    cautions: dict[str, int]  # records that carry a flag, by flag
    declarations: tuple[Declaration, ...]  # that overlap the period
    overlapping: tuple[str, ...]  # work that is partly in the period and counted on another day
    reasons: tuple[str, ...]
    provenance: tuple[str, ...]  # where the inputs came from, as the operator says

    @property
    def flop(self) -> Bounds:
        """Executed FLOP with the shared high bound; before any policy."""
        return self.usage.work.flop + self.shared.work.flop

    @property
    def gaps(self) -> tuple[LineItem, ...]:
        """The items that hold time nobody metered."""
        return tuple(item for item in self.items if item.line.sums.get("gap_time_ms"))

    @property
    def disputed(self) -> tuple[LineItem, ...]:
        """The items whose records are disputed, of nodes too."""
        every = (*self.items, *self.host_items)
        return tuple(item for item in every if item.line.standing == "disputed")


def build_statement(  # noqa: PLR0913 - everything a statement depends on is named here
    reader: Reader,
    rules: Rules,
    project: str,
    *,
    generated_unix_ms: int,
    policies: Iterable[str] = (),
    period: Period | None = None,
    provenance: tuple[str, ...] = (),
) -> Statement:
    """The statement of one project; UnknownName for a project nobody knows.

    `generated_unix_ms` comes from an injected clock. A period must be whole UTC days.
    """
    period = period or Period()
    policy_ids = tuple(policies)
    info = require_project(reader, project)
    lifetime, accounts = _read(reader, project, period)
    budgets = reader.budgets(project)
    status = project_status(info, lifetime, budgets, rules, policy_ids)
    usage, unattributed = usage_of(accounts.totals.lines), usage_of(accounts.unattributed)
    shared = possible(unattributed)
    works = dict(usage.works)
    if shared.records:
        works[UNATTRIBUTED] = works.get(UNATTRIBUTED, Work()) + shared.work
    totals = policy_totals(rules, policy_ids or rules.adopted, works)
    items = _items(accounts.totals.lines)
    return Statement(
        info=info,
        period=period,
        position=accounts.totals.position,
        generated_unix_ms=generated_unix_ms,
        model_version=accounts.totals.model_version,
        table_version=accounts.totals.table_version,
        simulated=any(line.simulated for line in (*accounts.totals.lines, *accounts.unattributed)),
        usage=usage,
        shared=shared,
        unattributed=unattributed,
        idle=usage_of(accounts.idle),
        policies=totals,
        bridges=tuple(bridge(totals[0].view, other.view) for other in totals[1:]),
        assessments=status.assessments,
        budgets=status.budgets,
        items=tuple(item for item in items if not item.line.is_host),
        host_items=tuple(item for item in items if item.line.is_host),
        restatement=restatement_of(
            accounts.totals.lines,
            model_version=accounts.totals.model_version,
            table_version=accounts.totals.table_version,
        ),
        cautions=_cautions(accounts.totals.lines),
        declarations=_declarations(reader, project, period),
        overlapping=_overlapping(reader.declarations(project), lifetime.totals.lines, period),
        reasons=tuple(
            dict.fromkeys(
                (
                    *reasons_of(accounts.totals.lines, usage, shared),
                    *budget_reasons(budgets, (*lifetime.totals.lines, *lifetime.unattributed)),
                )
            )
        ),
        provenance=provenance,
    )


def _read(reader: Reader, project: str, period: Period) -> tuple[Accounts, Accounts]:
    """The project's whole life and the period of it, at one position."""
    for _ in range(READ_ATTEMPTS_MAX):
        lifetime = read_accounts(reader, project)
        if period.is_everything:
            return lifetime, lifetime
        part = read_accounts(
            reader, project, start_unix_ms=period.start_unix_ms, end_unix_ms=period.end_unix_ms
        )
        if part.totals.position.heads_root == lifetime.totals.position.heads_root:
            return lifetime, part
    raise StoreBusy("ledger: it is being folded faster than it can be read; ask again")


def _items(lines: Iterable[Line]) -> tuple[LineItem, ...]:
    return tuple(
        LineItem(
            number=number,
            line=line,
            gpu_time_ms=gpu_time_of(line),
            energy_mj=energy_of(line),
            energies_mj=energies_of(line),
            method=method_of(line),
        )
        for number, line in enumerate(sorted(lines, key=_order), start=1)
    )


def _cautions(lines: Iterable[Line]) -> dict[str, int]:
    """How many records carry each flag, in the order flags are defined."""
    chosen = tuple(lines)
    counts = {flag: sum(line.sums.get(f"{FLAGGED}{flag}", 0) for line in chosen) for flag in FLAGS}
    return {flag: count for flag, count in counts.items() if count}


def _order(line: Line) -> tuple[str | bool, ...]:
    return (
        line.is_host,
        line.activity,
        line.model or "",
        line.run or "",
        line.device_name,
        line.pci_device_id or "",
        line.compute_capability or "",
        line.tier,
        line.energy_boundary or "",
        line.precision or "",
        line.precision_origin,
        line.first_model_version or "",
        line.first_table_version or "",
        line.standing,
        line.simulated,
    )


def method_of(line: Line) -> str:
    """How the figures of a line were established."""
    if line.tier == "none" and not line.sums.get("gap_time_ms"):
        return "absent: the device's counters could not be read; from zero to the device's peak"
    return METHODS[line.tier]


def precision_of(line: Line) -> str:
    """The precision of a line, where it comes from, and what central figures take it for."""
    if line.assumed_precision is None and line.precision is None:
        return "-"
    known = "unknown" if line.precision is None else f"{line.precision} ({line.precision_origin})"
    if line.assumed_precision in {None, line.precision}:
        return known
    return f"{known}, taken as {line.assumed_precision}"


def _overlapping(
    declarations: Iterable[Declaration], lines: Iterable[Line], period: Period
) -> tuple[str, ...]:
    """Work that crosses an end of the period, each with what is done about it.

    Meters write a record a minute; declarations and imported jobs last longer, and each is
    counted whole on the day it begins. Imported hours are kept in groups, so a group is named.
    """
    spans = [
        (f"declaration of {one.activity} work ({one.method})", one.start_unix_ms, one.end_unix_ms)
        for one in declarations
    ]
    spans += [
        (f"imported hours of {line.activity} work", line.first_unix_ms, line.last_unix_ms)
        for line in lines
        if line.tier == "gpu_hours"
    ]
    start, end = period.start_unix_ms, period.end_unix_ms
    found: list[str] = []
    for name, first, last in spans:
        if start is not None and first < start < last:
            found.append(f"{name}: begins before the period; counted on its first day")
        if end is not None and first < end < last and (start is None or first >= start):
            found.append(f"{name}: ends after the period; counted whole on its first day")
    return tuple(dict.fromkeys(found))


def _declarations(reader: Reader, project: str, period: Period) -> tuple[Declaration, ...]:
    """Declarations belong to the day they start in, as the line items that they make do."""
    start, end = period.start_unix_ms, period.end_unix_ms
    return tuple(
        declaration
        for declaration in reader.declarations(project)
        if (start is None or declaration.start_unix_ms >= start)
        and (end is None or declaration.start_unix_ms < end)
    )
