"""Words for what was metered: which device, what it lacks, what was restated.

Markdown and pages show the same words; both take them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_collector.reports import figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flopledger_collector.ledger.totals import Line
    from flopledger_collector.restatement import Restatement
    from flopledger_core.bounds import Bounds


def accelerator_of(line: Line) -> str | None:
    """The device of a line: its key in the table, or its own name and what stands in for it."""
    if line.stand_in:
        return f"{line.device_name} (not in the table; {line.accelerator})"
    if line.accelerator is None and line.device_name:
        return f"{line.device_name} (not in the table)"
    return line.accelerator


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
