"""Statuses and statements as JSON documents: stable, exact, for programs and auditors.

Exact integers are decimal strings, because JSON readers lose digits beyond 2^53; instants are Unix
milliseconds as numbers beside nothing else. An open high end is null. Keys are only ever added.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

import msgspec

from flopledger_collector.budgets import BudgetEvaluation
from flopledger_collector.instruments.comparison import Ratio
from flopledger_collector.instruments.evaluation import Assessment
from flopledger_collector.ledger.position import Position
from flopledger_collector.ledger.totals import JobLine, Line, ProjectInfo
from flopledger_collector.policies.evaluation import Bridge, PolicyLine
from flopledger_collector.reports.statement import (
    ENERGY_BOUNDARY,
    NOTES,
    LineItem,
    Statement,
)
from flopledger_collector.restatement import Restatement
from flopledger_collector.silence import said
from flopledger_collector.status import LedgerStatus, PolicyTotals, ProjectStatus
from flopledger_collector.usage import (
    CPU_FLOP_ABSENT,
    UNKNOWN_DEVICE,
    Usage,
    energies_of,
    energy_of,
    gpu_time_of,
)
from flopledger_core.bounds import Bounds
from flopledger_core.flop import Work
from flopledger_core.records import BudgetSet, Declaration

STATEMENT_FORM_VERSION: Final = 1
DEVICE_METERS: Final = "device"  # each device's own meter: its GPU's, or its whole module's
RATIO_PLACES: Final = 12  # decimal places of a ratio; the exact one follows from the amounts

Document = dict[str, Any]


def encode(document: Document | list[Document]) -> bytes:
    """The document as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def bounds_document(bounds: Bounds) -> Document:
    """Low, central and high as decimal strings; an open high is null."""
    high = None if bounds.high is None else str(bounds.high)
    return {"low": str(bounds.low), "central": str(bounds.central), "high": high}


def position_document(position: Position) -> Document:
    """What the figures were computed at; provisional while entries wait to be folded."""
    return {
        "ledger_id": position.ledger_id,
        "entries": position.entries,
        "heads_root": position.heads_root,
        "provisional_entries": position.provisional_entries,
        "at_unix_ms": position.at_unix_ms,
    }


def project_document(info: ProjectInfo) -> Document:
    """Who the project is."""
    return msgspec.structs.asdict(info)


def work_document(work: Work) -> Document:
    """The three quantities of work, apart; tensor and CUDA-core FLOP are parts of FLOP."""
    return {
        "flop": bounds_document(work.flop),
        "tensor_integer_operations": bounds_document(work.tensor_integer_operations),
        "integer_operations": bounds_document(work.integer_operations),
        "tensor_flop": bounds_document(work.flop_tensor),
        "cuda_core_flop": bounds_document(work.flop_cores),
    }


def energies_document(energies: Mapping[str, Bounds]) -> Document:
    """Energy in mJ by boundary; boundaries contain each other and are never added."""
    return {boundary: bounds_document(energy) for boundary, energy in energies.items()}


def optional_bounds(bounds: Bounds | None) -> Document | None:
    """Bounds, or null where nothing speaks of the quantity."""
    return None if bounds is None else bounds_document(bounds)


def usage_document(usage: Usage) -> Document:
    """Sums over lines."""
    return {
        **work_document(usage.work),
        "model_flop": bounds_document(usage.model_flop),
        "energy_mj": bounds_document(usage.energy_mj),
        "gpu_time_ms": bounds_document(usage.gpu_time_ms),
        "device_energy_mj": bounds_document(usage.device_energy_mj),
        "energy_by_boundary_mj": energies_document(usage.energy_by_boundary),
        "cpu_time_ms": optional_bounds(usage.known_cpu_time),
        "gap_time_ms": str(usage.gap_time_ms),
        "cost_cents": {name: bounds_document(cost) for name, cost in usage.cost_cents.items()},
        "records": usage.records,
        "host_records": usage.host_records,
        "stand_in_records": usage.stand_in_records,
        "disputed_records": usage.disputed_records,
        "silent_records": usage.silent_records,
    }


def status_document(status: ProjectStatus) -> Document:
    """One project's status: totals, policies, instruments, budgets."""
    return {
        "project": project_document(status.info),
        "position": position_document(status.position),
        "as_of": status.as_of.isoformat(),
        "simulated": status.simulated,
        "model_version": status.model_version,
        "table_version": status.table_version,
        "flop": bounds_document(status.flop),
        "energy_mj": bounds_document(status.energy_mj),
        "energy_boundary": ENERGY_BOUNDARY,
        "energy_by_boundary_mj": energies_document(status.energy_by_boundary),
        "gpu_time_ms": bounds_document(status.gpu_time_ms),
        "cpu_time_ms": optional_bounds(status.known_cpu_time),
        "own": usage_document(status.usage),
        "unattributed_share": usage_document(status.shared),
        "policies": [policy_document(found) for found in status.policies],
        "instruments": [assessment_document(found) for found in status.assessments],
        "budgets": [budget_document(found) for found in status.budgets],
        "exceeded": list(status.exceeded),
        "reasons": list(status.reasons),
    }


def ledger_document(status: LedgerStatus) -> Document:
    """Every project's status, and the ledger's own accounts."""
    return {
        "position": position_document(status.position),
        "as_of": status.as_of.isoformat(),
        "simulated": status.simulated,
        "model_version": status.model_version,
        "table_version": status.table_version,
        "projects": [status_document(project) for project in status.projects],
        "idle": usage_document(status.idle),
        "unattributed": usage_document(status.unattributed),
    }


def policy_document(found: PolicyTotals) -> Document:
    """A policy's total with the lines that add up to it."""
    view = found.view
    return {
        "policy": view.policy_id,
        "version": view.policy_version,
        "title": view.policy_title,
        "digest": view.policy_digest,
        "flop": bounds_document(view.total),
        "integer_operations": bounds_document(found.integer_operations),
        "undeclared": list(view.undeclared()),
        "lines": [_policy_line(line) for line in view.lines],
    }


def assessment_document(found: Assessment) -> Document:
    """An instrument's verdict with what it compared."""
    instrument, evaluation = found.instrument, found.evaluation
    compared = evaluation.threshold
    return {
        "instrument": instrument.id,
        "version": instrument.version,
        "title": instrument.title,
        "jurisdiction": instrument.jurisdiction,
        "subject": instrument.subject,
        "scope_policy": instrument.scope_policy,
        "quantity": instrument.quantity,
        "comparator": instrument.comparator,
        "threshold": str(instrument.threshold),
        "value": None if compared.value is None else bounds_document(compared.value),
        "ratio": ratio_document(compared.ratio),
        "state": evaluation.state,
        "verdict": evaluation.verdict,
        "would_be": evaluation.would_be,
        "undeclared": list(evaluation.undeclared),
        "warnings": list(evaluation.warnings),
        "citation": instrument.source.citation,
        "url": instrument.source.url,
        "digest": instrument.digest,
    }


def budget_document(found: BudgetEvaluation) -> Document:
    """A budget's verdict."""
    return {
        "name": found.name,
        "quantity": found.quantity,
        "currency": found.currency,
        "energy_boundary": DEVICE_METERS if found.quantity == "energy_mj" else None,
        "limit": str(found.limit),
        "used": bounds_document(found.used),
        "ratio": ratio_document(found.reached),
        "verdict": found.verdict,
    }


def budget_record_document(budget: BudgetSet) -> Document:
    """A budget as a person set it."""
    return msgspec.structs.asdict(budget)


def ratio_document(found: Ratio | None) -> Document | None:
    """Value over limit as decimal text; null for a limit of zero."""
    if found is None:
        return None
    return {
        "low": _decimal(found.low),
        "central": _decimal(found.central),
        "high": None if found.high is None else _decimal(found.high),
    }


def line_document(line: Line) -> Document:
    """A group of usage, with its exact sums."""
    document = {
        "activity": line.activity,
        "model": line.model,
        "run": line.run,
        "device_name": line.device_name or None,
        "pci_device_id": line.pci_device_id,
        "compute_capability": line.compute_capability,
        "accelerator": line.accelerator,
        "stand_in": line.stand_in,
        "tier": line.tier,
        "peak_basis": line.peak_basis,
        "precision": line.precision,
        "assumed_precision": line.assumed_precision,
        "precision_origin": line.precision_origin,
        "standing": line.standing,
        "simulated": line.simulated,
        "records": line.records,
        "first_unix_ms": line.first_unix_ms,
        "last_unix_ms": line.last_unix_ms,
        "gpu_time_ms": bounds_document(gpu_time_of(line)),
        "energy_mj": bounds_document(energy_of(line)),
        "energy_by_boundary_mj": energies_document(energies_of(line)),
        "cpu_time_ms": optional_bounds(said(line, "cpu_time_ms", line.cpu_time_ms)),
        **work_document(line.work),
        "first_estimate": _first_estimate(line),
        "reasons": list(line.work.reasons),
        "sums": {name: str(amount) for name, amount in line.sums.items()},
    }
    absent = absent_quantities(line)
    document |= {"absent": absent} | {name: None for name in absent if line.is_host}
    if isinstance(line, JobLine):
        return {"job": line.job, **document}
    return document


def absent_quantities(line: Line) -> dict[str, str]:
    """What a line cannot say, with the reason word; of a node these figures are null."""
    if line.is_host:
        operations = dict.fromkeys(work_document(line.work), CPU_FLOP_ABSENT)
        return operations | dict.fromkeys(("energy_mj", "gpu_time_ms"), "no_gpu")
    if line.device_name and line.accelerator is None:
        return dict.fromkeys(work_document(line.work), UNKNOWN_DEVICE)
    return {}


def statement_document(statement: Statement) -> Document:
    """The whole statement."""
    return {
        "form_version": STATEMENT_FORM_VERSION,
        "project": project_document(statement.info),
        "period": {
            "start_unix_ms": statement.period.start_unix_ms,
            "end_unix_ms": statement.period.end_unix_ms,
        },
        "position": position_document(statement.position),
        "generated_unix_ms": statement.generated_unix_ms,
        "model_version": statement.model_version,
        "table_version": statement.table_version,
        "simulated": statement.simulated,
        "energy_boundary": ENERGY_BOUNDARY,
        "flop": bounds_document(statement.flop),
        "own": usage_document(statement.usage),
        "unattributed_share": usage_document(statement.shared),
        "idle": usage_document(statement.idle),
        "unattributed": usage_document(statement.unattributed),
        "policies": [policy_document(found) for found in statement.policies],
        "bridges": [_bridge_document(found) for found in statement.bridges],
        "instruments": [assessment_document(found) for found in statement.assessments],
        "budgets": [budget_document(found) for found in statement.budgets],
        "items": [_item_document(item) for item in statement.items],
        "host_items": [_host_document(item) for item in statement.host_items],
        "restatement": _restatement_document(statement.restatement),
        "cautions": dict(statement.cautions),
        "declarations": [_declaration_document(found) for found in statement.declarations],
        "overlapping": list(statement.overlapping),
        "gap_items": [item.number for item in statement.gaps],
        "disputed_items": [item.number for item in statement.disputed],
        "reasons": list(statement.reasons),
        "provenance": list(statement.provenance),
        "notes": list(NOTES),
    }


def _item_document(item: LineItem) -> Document:
    return {"number": item.number, "method": item.method, **line_document(item.line)}


def _host_document(item: LineItem) -> Document:
    """Usage of nodes: no FLOP, because no counter reads it, and no zero in its place."""
    line = item.line
    return {
        "number": item.number,
        "method": item.method,
        "activity": line.activity,
        "model": line.model,
        "run": line.run,
        "standing": line.standing,
        "simulated": line.simulated,
        "records": line.records,
        "first_unix_ms": line.first_unix_ms,
        "last_unix_ms": line.last_unix_ms,
        "cpu_time_ms": optional_bounds(said(line, "cpu_time_ms", line.cpu_time_ms)),
        "energy_by_boundary_mj": energies_document(item.energies_mj),
        "flop": None,
        "flop_absent": CPU_FLOP_ABSENT,
        "sums": {name: str(amount) for name, amount in line.sums.items()},
    }


def _first_estimate(line: Line) -> Document | None:
    if line.first_flop is None:
        return None
    return {
        "model_version": line.first_model_version,
        "table_version": line.first_table_version,
        "flop": bounds_document(line.first_flop),
    }


def _restatement_document(found: Restatement) -> Document:
    return {
        "rows": [
            {
                "first_model_version": row.first_model_version,
                "first_table_version": row.first_table_version,
                "model_version": row.model_version,
                "table_version": row.table_version,
                "restated": row.is_restated,
                "contradicted": row.is_contradicted,
                "records": row.records,
                "first_flop": bounds_document(row.first_flop),
                "flop": bounds_document(row.flop),
                "difference": {
                    name: None if amount is None else str(amount)
                    for name, amount in zip(("low", "central", "high"), row.difference, strict=True)
                },
            }
            for row in found.rows
        ],
        "unestimated_records": found.unestimated_records,
        "disputed_records": found.disputed_records,
    }


def _policy_line(line: PolicyLine) -> Document:
    return {
        "activity": line.activity,
        "verdict": line.verdict,
        "flop": bounds_document(line.amount),
        "contribution": bounds_document(line.contribution),
        "rule": line.rule,
        "rule_text": line.rule_text,
        "citation": line.citation,
        "depends_on": line.depends_on,
        "inferred": line.inferred,
        "note": line.note,
    }


def _bridge_document(found: Bridge) -> Document:
    return {
        "from_policy": found.from_policy,
        "to_policy": found.to_policy,
        "from_flop": bounds_document(found.from_total),
        "to_flop": bounds_document(found.to_total),
        "steps": [
            {
                "activity": step.activity,
                "from_verdict": step.from_verdict,
                "to_verdict": step.to_verdict,
                "low": str(step.low),
                "central": str(step.central),
                "high": None if step.high is None else str(step.high),
            }
            for step in found.steps
        ],
    }


def _declaration_document(found: Declaration) -> Document:
    return msgspec.structs.asdict(found)


def _decimal(value: Fraction) -> str:
    """A ratio as plain decimal text; digits beyond the places are cut, never rounded up."""
    scaled = value.numerator * 10**RATIO_PLACES // value.denominator
    whole, fraction = divmod(scaled, 10**RATIO_PLACES)
    return f"{whole}.{fraction:0{RATIO_PLACES}d}"
