"""Sections of a Markdown statement about what was metered: items, nodes, restatement, cautions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_collector.reports import figures
from flopledger_collector.reports.markdown_table import bullets, table, text
from flopledger_collector.reports.measured import (
    accelerator_of,
    energy_cell,
    methods,
    restatement_cautions,
    restatement_rows,
)
from flopledger_collector.reports.statement import BOUNDARIES, LineItem, Statement, precision_of
from flopledger_collector.silence import said
from flopledger_collector.usage import integer_operations
from flopledger_core.records import FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterator


def items(statement: Statement) -> Iterator[str]:
    """What GPUs did and people declared, line by line, and its total."""
    yield "## Line items"
    yield ""
    if not statement.items:
        yield "No usage of GPUs, gap or declaration is in this period."
        yield ""
        return
    yield from table(
        (
            "No.", "Activity", "Model", "Run", "Accelerator", "Tier", "Precision", "Standing",
            "GPU-hours", "kWh (boundary)", "FLOP", "by tensor pipes", "by CUDA cores",
            "Integer operations",
        ),
        (_item(item) for item in statement.items),
    )  # fmt: skip
    usage = statement.usage
    energies = {"gpu": usage.energy_mj} | {
        boundary: usage.energy_by_boundary[boundary]
        for boundary in ("module",)
        if boundary in usage.energy_by_boundary
    }
    yield (
        f"Total of the items: {figures.flop(usage.work.flop)} FLOP, {energy_cell(energies)} kWh, "
        f"{figures.hours(usage.gpu_time_ms)} GPU-hours."
    )
    yield ""
    yield "How each was established:"
    yield ""
    yield from bullets(text(sentence) for sentence in methods(statement.items))


def _item(item: LineItem) -> tuple[str, ...]:
    line = item.line
    return (
        str(item.number),
        text(line.activity),
        text(line.model),
        text(line.run),
        text(accelerator_of(line)),
        text(line.tier),
        text(precision_of(line)),
        text(line.standing) + (", simulated" if line.simulated else ""),
        figures.hours(said(line, "gpu_time_ms", item.gpu_time_ms)),
        energy_cell(item.energies_mj),
        figures.flop(said(line, "flop", line.work.flop)),
        figures.flop(said(line, "flop", line.work.flop_tensor)),
        figures.flop(said(line, "flop", line.work.flop_cores)),
        figures.flop(said(line, "integer_operations", integer_operations(line.work))),
    )


def hosts(statement: Statement) -> Iterator[str]:
    """What nodes used without their GPUs: CPU-seconds and energy by boundary, no FLOP."""
    yield "## Usage of nodes without their GPUs"
    yield ""
    if not statement.host_items:
        yield "No node was metered for this project; CPU-seconds and host energy are absent."
        yield ""
        return
    yield from table(
        (
            "No.", "Activity", "Model", "Run", "Standing", "CPU-seconds",
            "kWh (boundary; never added)",
        ),
        (
            (
                str(item.number),
                text(item.line.activity),
                text(item.line.model),
                text(item.line.run),
                text(item.line.standing) + (", simulated" if item.line.simulated else ""),
                figures.seconds(said(item.line, "cpu_time_ms", item.line.cpu_time_ms)),
                energy_cell(item.energies_mj),
            )
            for item in statement.host_items
        ),
    )  # fmt: skip
    yield "FLOP of CPUs is absent: no counter reads it."
    yield ""
    shown = [name for name in statement.usage.energy_by_boundary if name in BOUNDARIES]
    yield from bullets(f"{name}: {BOUNDARIES[name]}" for name in shown)


def restatement(statement: Statement) -> Iterator[str]:
    """First estimates beside today's figures."""
    found = statement.restatement
    yield "## Restatement"
    yield ""
    yield (
        "What agents first estimated and sealed, beside the same records by today's FLOP model "
        f"{text(statement.model_version)} and hardware table {text(statement.table_version)}. "
        "Nothing is edited: totals are computed from the counters."
    )
    yield ""
    if found.rows:
        yield from table(
            (
                "First estimated by", "Records", "First estimate", "Today's figure", "By",
                "Difference: low", "central", "high",
            ),
            (
                (text(row[0]), *row[1:4], text(row[4]), *row[5:])
                for row in restatement_rows(found)
            ),
        )  # fmt: skip
    yield from bullets(text(sentence) for sentence in restatement_cautions(found))


def cautions(statement: Statement) -> Iterator[str]:
    """The flags that records carry, with what they mean."""
    yield "## Cautions that records carry"
    yield ""
    if not statement.cautions:
        yield "None."
        yield ""
        return
    yield from table(
        ("Flag", "Records", "Meaning"),
        ((f"`{flag}`", str(count), FLAGS[flag]) for flag, count in statement.cautions.items()),
    )
