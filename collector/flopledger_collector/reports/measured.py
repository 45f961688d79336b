"""Words for what was metered: which device, what it lacks, what was restated.

Markdown and pages show the same words; both take them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_collector.reports import figures
from flopledger_core.records import HOST_BOUNDARIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flopledger_collector.ledger.totals import Line
    from flopledger_collector.reports.statement import LineItem, Statement
    from flopledger_collector.restatement import Restatement
    from flopledger_core.bounds import Bounds


def accelerator_of(line: Line) -> str | None:
    """The device of a line: its key in the table, or its own name and what stands in for it."""
    if line.stand_in:
        return f"{line.device_name} (not in the table; {line.accelerator})"
    if line.accelerator is None and line.device_name:
        return f"{line.device_name} (not in the table)"
    return line.accelerator


def energy_label(boundary: str) -> str:
    """What energy at a boundary is called: that of nodes is only of the metered ones."""
    of_nodes = "; metered nodes" if boundary in HOST_BOUNDARIES else ""
    return f"Energy, kWh ({boundary}{of_nodes})"


def energy_cell(energies: Mapping[str, Bounds]) -> str:
    """Energies in kWh, each with its boundary; a dash for none."""
    return (
        "; ".join(f"{figures.energy(energy)} ({boundary})" for boundary, energy in energies.items())
        or figures.ABSENT
    )


def lacking_of(line: Line) -> str | None:
    """What a line lacks because the hardware table lacks its device; None for known devices."""
    if line.stand_in:
        return f"bounds of {line.device_name} are those of {line.accelerator}"
    if line.accelerator is None and line.device_name:
        return f"FLOP of {line.device_name} is absent, its raw counters are kept"
    return None


def restatement_rows(found: Restatement) -> Iterator[tuple[str, ...]]:
    """Versions, records, first estimate, today's figure, versions, three differences."""
    for row in found.rows:
        low, central, high = row.difference
        yield (
            f"model {row.first_model_version}, table {row.first_table_version}",
            str(row.records),
            figures.flop(row.first_flop),
            figures.flop(row.flop),
            f"model {row.model_version}, table {row.table_version}"
            + ("" if row.is_restated else " (the same)"),
            figures.signed(low),
            figures.signed(central),
            figures.signed(high),
        )


def restatement_cautions(found: Restatement) -> Iterator[str]:
    """What a reader must know of the rows: what is not in them, and estimates that are not so."""
    for row in found.rows:
        if row.is_contradicted:
            yield (
                f"Estimates said to be by model {row.first_model_version} and table "
                f"{row.first_table_version} are not what these make of the same counters. Totals "
                "do not rest on them; see to the agents that sealed them."
            )
    if found.unestimated_records:
        yield (
            f"{figures.counted(found.unestimated_records, 'metered record')} without a first "
            "estimate: the agent is older, or knew no model of the device."
        )
    if found.disputed_records:
        yield f"{figures.counted(found.disputed_records, 'disputed record')} not compared."
    if not found.rows:
        yield "No record carries a first estimate."


def methods(items: tuple[LineItem, ...]) -> Iterator[str]:
    """How figures were established: tier, peak basis, method, and the items of each."""
    groups: dict[tuple[str, str], list[int]] = {}
    for item in items:
        tier, basis = item.line.tier, item.line.peak_basis
        name = tier if basis is None else f"{tier}, {basis}"
        groups.setdefault((name, item.method), []).append(item.number)
    for (name, method), numbers in sorted(groups.items()):
        yield f"{'Items' if len(numbers) > 1 else 'Item'} {_runs(numbers)} ({name}): {method}"


def _runs(numbers: list[int]) -> str:
    """Ascending numbers, with runs of three and more written by their ends."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(
        f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts
    )


def doubtful(statement: Statement) -> Iterator[str]:
    """Gaps, disputed records, unknown devices and work of unknown owner, by item number."""
    for item in statement.gaps:
        yield (
            f"Item {item.number}: {figures.gpu_hours(item.line.sums['gap_time_ms'])} GPU-hours "
            f"nobody metered; FLOP {figures.flop(item.line.work.flop)}, "
            f"kWh {figures.energy(item.energy_mj)}."
        )
    for item in statement.disputed:
        told = (
            f"CPU-seconds {figures.seconds(item.line.cpu_time_ms)}"
            if item.line.is_host
            else f"FLOP {figures.flop(item.line.work.flop)}"
        )
        records = figures.counted(item.line.records, "disputed record")
        yield f"Item {item.number}: {records}; {told}."
    for item in statement.items:
        lacking = lacking_of(item.line)
        if lacking is not None:
            yield (
                f"Item {item.number}: {figures.counted(item.line.records, 'record')} of a device "
                f"that the hardware table lacks (device_not_in_table): {lacking}."
            )
    if statement.shared.records:
        yield (
            "Work of unknown owner that could belong to this project: "
            f"FLOP {figures.flop(statement.shared.work.flop)}, "
            f"GPU-hours {figures.hours(statement.shared.gpu_time_ms)}, "
            f"CPU-seconds {figures.seconds(statement.shared.known_cpu_time)}."
        )
