"""The one evaluation of a project: what it used, what policies make of it, what it is close to.

Command line, API, pages, /metrics and statements all show values made here, so no two of them
can disagree. Everything is computed from one position of the ledger; nothing here is stored.
Work of unknown owner could belong to any project: it enters the high bound of each of them, as
a contribution of its own that is always shown apart, and never their low or central.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final, Protocol

import msgspec

from flopledger_collector.budgets import BudgetEvaluation, evaluate_budget
from flopledger_collector.instruments.definitions import Instrument, load_instruments
from flopledger_collector.instruments.evaluation import Assessment, assess
from flopledger_collector.ledger.position import Position
from flopledger_collector.ledger.totals import MODULE_BOUNDARY, Line, ProjectInfo, Totals
from flopledger_collector.policies.definitions import HEADLINE_POLICIES, Policy, load_policies
from flopledger_collector.policies.evaluation import PolicyView, contribution, views
from flopledger_collector.silence import opened, unlimited
from flopledger_collector.usage import (
    COST_PREFIX,
    Usage,
    integer_operations,
    possible,
    reasons_of,
    usage_of,
)
from flopledger_core.activities import IDLE, UNATTRIBUTED
from flopledger_core.bounds import ZERO, Bounds, total
from flopledger_core.errors import UnknownName
from flopledger_core.flop import Work
from flopledger_core.records import HOST_BOUNDARIES, BudgetSet, Declaration
from flopledger_core.units import MS_PER_SECOND

READ_ATTEMPTS_MAX: Final = 4  # accounts are read one by one; the fold may move in between
PROJECTS_NAMED_MAX: Final = 8  # projects that an error sentence lists


class Reader(Protocol):
    """What evaluation asks of a ledger."""

    def totals(
        self,
        project: str | None = None,
        *,
        start_unix_ms: int | None = None,
        end_unix_ms: int | None = None,
    ) -> Totals:
        """Lines of one account, or of all."""
        ...

    def projects(self) -> tuple[ProjectInfo, ...]:
        """Every known project."""
        ...

    def budgets(self, project: str | None = None) -> tuple[BudgetSet, ...]:
        """The effective budgets."""
        ...

    def declarations(self, project: str) -> tuple[Declaration, ...]:
        """What people declared."""
        ...


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The policies and instruments to evaluate with, by id."""

    policies: Mapping[str, Policy]
    instruments: Mapping[str, Instrument]
    adopted: tuple[str, ...]  # the policies a project's totals are shown under

    def policy(self, policy_id: str) -> Policy:
        """One policy; UnknownName when it is not loaded."""
        if policy_id not in self.policies:
            raise UnknownName("policy", policy_id, f"use one of: {', '.join(self.policies)}")
        return self.policies[policy_id]

    def instrument(self, instrument_id: str) -> Instrument:
        """One instrument; UnknownName when it is not loaded."""
        if instrument_id not in self.instruments:
            known = ", ".join(self.instruments)
            raise UnknownName("instrument", instrument_id, f"use one of: {known}")
        return self.instruments[instrument_id]


def load_rules(
    adopted: Iterable[str] = HEADLINE_POLICIES,
    *,
    policy_directory: Path | None = None,
    instrument_directory: Path | None = None,
) -> Rules:
    """The packaged rules and one's own; UnknownName when an adopted policy is not among them."""
    policies = load_policies(policy_directory)
    instruments = load_instruments(policies, instrument_directory)
    rules = Rules(policies=policies, instruments=instruments, adopted=tuple(adopted))
    for policy_id in rules.adopted:
        rules.policy(policy_id)
    return rules


class PolicyTotals(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's view of the FLOP, and its total of integer operations beside it."""

    view: PolicyView
    integer_operations: Bounds


class ProjectStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is said of one project at one position."""

    info: ProjectInfo
    position: Position
    as_of: date
    model_version: str
    table_version: str
    simulated: bool  # at least one of its records, or of what it could own, is simulated
    lines: tuple[Line, ...]
    usage: Usage  # of its own lines
    shared: Usage  # unattributed work that could belong to it: only high bounds
    policies: tuple[PolicyTotals, ...]
    assessments: tuple[Assessment, ...]
    budgets: tuple[BudgetEvaluation, ...]
    reasons: tuple[str, ...]  # why bounds are open or wide

    @property
    def flop(self) -> Bounds:
        """Executed FLOP of all its work, shared work in the high bound; before any policy."""
        return self.usage.work.flop + self.shared.work.flop

    @property
    def energy_mj(self) -> Bounds:
        """Energy at the GPU's boundary in mJ, shared work in the high bound."""
        return self.usage.energy_mj + self.shared.energy_mj

    @property
    def energy_by_boundary(self) -> dict[str, Bounds]:
        """Energy of its own usage in mJ at each boundary, shared usage in the high bounds."""
        shared = self.shared.energy_by_boundary
        unread = unlimited(ZERO) if self.shared.host_records else ZERO
        return {
            boundary: energy + shared.get(boundary, unread if boundary in HOST_BOUNDARIES else ZERO)
            for boundary, energy in self.usage.energy_by_boundary.items()
        }

    @property
    def gpu_time_ms(self) -> Bounds:
        """GPU time in ms, shared work in the high bound."""
        return self.usage.gpu_time_ms + self.shared.gpu_time_ms

    @property
    def known_cpu_time(self) -> Bounds | None:
        """CPU time in ms, shared usage in the high bound; None where none was metered for it."""
        own = self.usage.known_cpu_time
        return None if own is None else own + self.shared.cpu_time_ms

    @property
    def exceeded(self) -> tuple[str, ...]:
        """Instruments in force and budgets that are certainly exceeded, by name."""
        return (
            *(
                assessment.instrument.id
                for assessment in self.assessments
                if assessment.evaluation.verdict == "exceeds"
            ),
            *(budget.name for budget in self.budgets if budget.verdict == "exceeds"),
        )


class LedgerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Every project at one position, with the ledger's own accounts."""

    position: Position
    as_of: date
    model_version: str
    table_version: str
    simulated: bool
    projects: tuple[ProjectStatus, ...]
    idle: Usage
    unattributed: Usage  # as it is, not as what a project could own


class Accounts(msgspec.Struct, frozen=True, kw_only=True):
    """A project's lines and those of the ledger's own accounts, read at one position."""

    totals: Totals
    unattributed: tuple[Line, ...]
    idle: tuple[Line, ...]


def evaluate_project(
    reader: Reader, rules: Rules, project: str, *, policies: Iterable[str] = ()
) -> ProjectStatus:
    """The status of one project under the adopted policies, or those given.

    UnknownName when nobody opened the project and no entry names it.
    """
    info = require_project(reader, project)
    accounts = read_accounts(reader, project)
    return project_status(info, accounts, reader.budgets(project), rules, tuple(policies))


def evaluate_ledger(reader: Reader, rules: Rules) -> LedgerStatus:
    """The status of every project, all at one position."""
    totals = _opened(reader.totals())
    lines: dict[str, list[Line]] = {}
    for line in totals.lines:
        if line.kind == "attributed":
            lines.setdefault(line.account, []).append(line)
    budgets: dict[str, list[BudgetSet]] = {}
    for budget in reader.budgets(None):
        budgets.setdefault(budget.project, []).append(budget)
    unattributed, idle = _of_kind(totals, UNATTRIBUTED), _of_kind(totals, IDLE)
    statuses = [
        project_status(
            info,
            Accounts(
                totals=msgspec.structs.replace(totals, lines=tuple(lines.get(info.project, ()))),
                unattributed=unattributed,
                idle=idle,
            ),
            budgets.get(info.project, []),
            rules,
            (),
        )
        for info in reader.projects()
    ]
    return LedgerStatus(
        position=totals.position,
        as_of=_day(totals.position),
        model_version=totals.model_version,
        table_version=totals.table_version,
        simulated=any(line.simulated for line in totals.lines),
        projects=tuple(statuses),
        idle=usage_of(idle),
        unattributed=usage_of(unattributed),
    )


def require_project(reader: Reader, project: str) -> ProjectInfo:
    """What is known of a project; an unknown one is an error that says how to open it."""
    known = reader.projects()
    for info in known:
        if info.project == project:
            return info
    names = ", ".join(info.project for info in known[:PROJECTS_NAMED_MAX])
    more = ", ..." if len(known) > PROJECTS_NAMED_MAX else ""
    remedy = "open it with `flopledger project create`"
    if names:
        remedy = f"name a known one ({names}{more}), or {remedy}"
    raise UnknownName("project", project, remedy)


def read_accounts(
    reader: Reader,
    project: str,
    *,
    start_unix_ms: int | None = None,
    end_unix_ms: int | None = None,
) -> Accounts:
    """The three accounts that speak of a project, at one position and without reading the rest."""
    for _ in range(READ_ATTEMPTS_MAX):
        own, unattributed, idle = (
            reader.totals(account, start_unix_ms=start_unix_ms, end_unix_ms=end_unix_ms)
            for account in (project, UNATTRIBUTED, IDLE)
        )
        if own.position.heads_root == unattributed.position.heads_root == idle.position.heads_root:
            return Accounts(totals=_opened(own), unattributed=unattributed.lines, idle=idle.lines)
    everything = _opened(reader.totals(start_unix_ms=start_unix_ms, end_unix_ms=end_unix_ms))
    return Accounts(
        totals=msgspec.structs.replace(
            everything, lines=tuple(line for line in everything.lines if line.project == project)
        ),
        unattributed=_of_kind(everything, UNATTRIBUTED),
        idle=_of_kind(everything, IDLE),
    )


def _opened(totals: Totals) -> Totals:
    """What declarations leave unsaid is open in everything that is made of these lines."""
    return msgspec.structs.replace(totals, lines=tuple(opened(line) for line in totals.lines))


def _of_kind(totals: Totals, kind: str) -> tuple[Line, ...]:
    return tuple(line for line in totals.lines if line.kind == kind)


def _day(position: Position) -> date:
    return datetime.fromtimestamp(position.at_unix_ms // MS_PER_SECOND, tz=UTC).date()


def project_status(
    info: ProjectInfo,
    accounts: Accounts,
    budgets: Iterable[BudgetSet],
    rules: Rules,
    policy_ids: tuple[str, ...],
) -> ProjectStatus:
    """What is said of a project with these accounts; the adopted policies where none is given."""
    totals, budgets = accounts.totals, tuple(budgets)
    as_of = _day(totals.position)
    usage = usage_of(totals.lines)
    shared = possible(usage_of(accounts.unattributed))
    works = dict(usage.works)
    if shared.records:
        works[UNATTRIBUTED] = works.get(UNATTRIBUTED, Work()) + shared.work
    every_line = (*totals.lines, *accounts.unattributed)
    return ProjectStatus(
        info=info,
        position=totals.position,
        as_of=as_of,
        model_version=totals.model_version,
        table_version=totals.table_version,
        simulated=any(line.simulated for line in every_line),
        lines=totals.lines,
        usage=usage,
        shared=shared,
        policies=policy_totals(rules, policy_ids or rules.adopted, works),
        assessments=tuple(
            assess(instrument, rules.policies, works, {}, as_of)
            for instrument in rules.instruments.values()
        ),
        budgets=tuple(
            evaluate_budget(budget, _budget_use(budget, usage, shared, every_line))
            for budget in budgets
        ),
        reasons=(*reasons_of(totals.lines, usage, shared), *budget_reasons(budgets, every_line)),
    )


def policy_totals(
    rules: Rules, policy_ids: Iterable[str], works: Mapping[str, Work]
) -> tuple[PolicyTotals, ...]:
    """The same works under several policies, in the order asked for."""
    chosen = [rules.policy(policy_id) for policy_id in dict.fromkeys(policy_ids)]
    return tuple(
        PolicyTotals(
            view=found,
            integer_operations=total(
                contribution(policy, activity, integer_operations(work))
                for activity, work in works.items()
            ),
        )
        for policy, found in zip(chosen, views(chosen, works, "flop"), strict=True)
    )


def budget_reasons(budgets: Iterable[BudgetSet], lines: Iterable[Line]) -> tuple[str, ...]:
    """Why a cost budget is open, and what an energy budget counts beside or without the GPUs."""
    chosen, budgets = tuple(lines), tuple(budgets)
    currencies = dict.fromkeys(budget.currency for budget in budgets if budget.currency is not None)
    found = [
        f"usage carries no declared cost in {currency}: what was spent is open upwards"
        for currency in currencies
        if _lacks_cost(chosen, currency)
    ]
    if any(budget.quantity == "energy_mj" for budget in budgets):
        if any(line.energy_boundary == MODULE_BOUNDARY for line in chosen):
            found.append("an energy budget counts whole modules where their counters read no less")
        if any(line.is_host for line in chosen):
            found.append("an energy budget counts the energy of devices, not that of their nodes")
    return tuple(found)


def _lacks_cost(lines: Iterable[Line], currency: str) -> bool:
    return any(f"{COST_PREFIX}{currency}" not in line.sums for line in lines)


def _budget_use(budget: BudgetSet, usage: Usage, shared: Usage, lines: tuple[Line, ...]) -> Bounds:
    """What a budget is compared with: everything the project used, before any policy.

    Energy is what the devices' own meters read. At the GPU's boundary a module's counter proves
    nothing, and a budget on superchips could never be exceeded.
    """
    if budget.quantity == "flop":
        return usage.work.flop + shared.work.flop
    if budget.quantity == "energy_mj":
        return usage.device_energy_mj + shared.device_energy_mj
    if budget.quantity == "gpu_time_ms":
        return usage.gpu_time_ms + shared.gpu_time_ms
    currency = budget.currency or ""
    cost = usage.cost_cents.get(currency, ZERO) + shared.cost_cents.get(currency, ZERO)
    return unlimited(cost) if _lacks_cost(lines, currency) else cost
