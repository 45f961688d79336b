"""The hardware table as a page: `python -m tests.core.hardware_table` writes it, a test holds it.

It shows each datasheet figure beside what SMs x rate x clock gives, so that a reader sees what the
table reproduces and what it does not.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from flopledger_core.accelerators import load_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_core.accelerators import Accelerator, AcceleratorTable, Architecture, RateSpan

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "hardware-table.md"
CLOCKS = "tensor / core / maximum clock, MHz"
INTRODUCTION = """# Hardware table

Made from [`accelerators.toml`](../../core/flopledger_core/data/accelerators.toml) by
`python -m tests.core.hardware_table`; table version **{version}**.

The table turns SM-cycles into operations. Rates are dense, per SM and cycle, a fused multiply-add
being two operations: products with 2:4 sparsity are counted for the time the pipe is active, not
for the multiplications it skips. Datasheet figures are here to check the rates and as the
denominator of a utilisation; work is counted at the clock that really ran.

Marks in sources: [D] the vendor's document, [D\\*] the vendor's document as restated elsewhere and
checked by arithmetic, [C] reported by a third party, [I] inferred.

A device is found by its PCI id, else by the name NVML gives it. A model the table lacks, of an
architecture it has, is bounded by the extremes of that architecture and flagged
`device_not_in_table`; of any other, FLOP is absent and the raw counters are kept.
"""


def reproduction_error(table: AcceleratorTable, row: Accelerator, name: str) -> Fraction:
    """Relative difference between SMs x rate x clock and the datasheet's figure."""
    figure = Fraction(Decimal(row.datasheet_teraflop_per_second[name]))
    return _computed(table, row, name) / figure - 1


def page(table: AcceleratorTable) -> str:
    """The whole page as Markdown."""
    lines = [INTRODUCTION.format(version=table.version), "## Architectures", ""]
    lines += ["Rates as low / central / high where they differ. Integer rates are operations.", ""]
    for name, architecture in table.architectures.items():
        lines += _architecture(name, architecture)
    lines += ["## Models", ""]
    heads = "model", "architecture", "form", "SMs", CLOCKS, "power, W", "PCI ids"
    lines += [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    lines += [_model(row) for row in table.accelerators]
    lines += ["", "## Datasheet figures", ""]
    lines += [
        "Tera-operations a second, dense, each with what SMs x rate x clock gives. A difference of",
        "more than 1 % is named with its reason.",
        "",
    ]
    for row in table.accelerators:
        lines += _figures(table, row)
    return "\n".join(lines).rstrip() + "\n"


def _architecture(name: str, architecture: Architecture) -> Iterator[str]:
    capabilities = ", ".join(architecture.compute_capabilities)
    yield f"### {name} ({capabilities})"
    yield ""
    yield f"{_plain(architecture.source)}."
    yield ""
    most = (architecture.most_sm_count, architecture.most_sm_clock_mhz)
    yield (
        f"No model of it is taken to exceed {most[0]} SMs, {most[1]} MHz and "
        f"{architecture.most_power_watts} W."
    )
    yield ""
    yield "| rate | per SM and cycle |"
    yield "|---|---|"
    for rate, span in architecture.spans().items():
        yield f"| {rate} | {_span(span)} |"
    yield ""


def _plain(source: str) -> str:
    """A source as it is, its stars not read as emphasis."""
    return source.replace("*", "\\*")


def _span(span: RateSpan) -> str:
    ends = (span.low_per_cycle, span.central_per_cycle, span.high_per_cycle)
    return str(ends[0]) if len(set(ends)) == 1 else " / ".join(map(str, ends))


def _model(row: Accelerator) -> str:
    sms = str(row.sm_count)
    if row.most_sm_count is not None:
        sms += f" (bounds: {row.most_sm_count})"
    power = str(row.power_limit_watts)
    if row.module_power_limit_watts is not None:
        power += f" (module: {row.module_power_limit_watts})"
    core = row.core_clock_mhz or row.max_sm_clock_mhz
    clocks = f"{row.tensor_clock_mhz} / {core} / {row.max_sm_clock_mhz}"
    if row.most_sm_clock_mhz is not None:
        clocks += f" (bounds: {row.most_sm_clock_mhz})"
    ids = ", ".join(row.pci_device_ids) or "none known"
    return (
        f"| {row.key} | {row.architecture} | {row.form_factor} | {sms} | {clocks} | {power} "
        f"| {ids} |"
    )


def _figures(table: AcceleratorTable, row: Accelerator) -> Iterator[str]:
    yield f"### {row.key}"
    yield ""
    yield f"{_plain(row.source)}."
    yield ""
    if row.energy_scope == "module":
        yield "Its energy counter covers the whole module: CPU, GPU and memory."
        yield ""
    if row.mig_sm_counts:
        profiles = ", ".join(f"{name} {count}" for name, count in row.mig_sm_counts.items())
        yield f"SMs of a GPU instance by its compute slices: {profiles}."
        yield ""
    yield "| rate | sheet | computed | difference | why |"
    yield "|---|---|---|---|---|"
    for name, figure in row.datasheet_teraflop_per_second.items():
        computed = f"{float(_computed(table, row, name)):.2f}"
        difference = f"{float(100 * reproduction_error(table, row, name)):+.1f} %"
        why = row.datasheet_deviations.get(name, "")
        yield f"| {name} | {figure} | {computed} | {difference} | {why} |"
    yield ""
    for name, span in row.rate_exceptions.items():
        ceiling = row.ceiling_tera_per_second.get(name)
        most = "" if ceiling is None else f", never above {ceiling} T/s over time"
        yield f"- {name} of this model: {_span(span)}{most}"
    if row.rate_exceptions:
        yield ""


def _computed(table: AcceleratorTable, row: Accelerator, name: str) -> Fraction:
    rate = table.of_row(row).span(name).central_per_cycle
    return Fraction(row.sm_count * rate * row.quoted_clock_mhz(name), 10**6)


if __name__ == "__main__":
    PAGE.write_text(page(load_table()), "utf-8")
