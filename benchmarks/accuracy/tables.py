"""Accuracy results as one table for the terminal and as a section of docs/validation.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table

from benchmarks.accuracy.cases import ACCEPTED_PPM, PPM

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.accuracy.cases import Outcome, Run

HEADINGS: Final = (
    "case", "declared", "tier", "s", "truth", "central", "error", "bounds / truth", "holds",
    "energy error", "note",
)  # fmt: skip


def rows(run: Run) -> list[tuple[str, ...]]:
    """The cells of a run, a tuple per case."""
    return [_row(outcome) for outcome in run.outcomes]


def terminal_table(run: Run) -> Table:
    """For people at a terminal."""
    table = Table(title=f"accuracy: {run.device}, driver {run.driver}", caption=run.method)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in {"s", "error"} else "left")
    for row in rows(run):
        table.add_row(*row)
    return table


def markdown_section(run: Run) -> str:
    """A section of docs/validation.md: heading, method, table, findings."""
    when = f"{run.date}. " if run.date else ""
    lines = [
        f"### {run.device}, driver {run.driver}",
        "",
        f"{when}Method: {run.method}. {summary(run)}",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| " + " | ".join("---" for _ in HEADINGS) + " |",
        *("| " + " | ".join(row) + " |" for row in rows(run)),
    ]
    if run.findings:
        lines += ["", *(f"- {finding}" for finding in run.findings)]
    return "\n".join(lines) + "\n"


def summary(run: Run) -> str:
    """How many bounds hold, and the median error of the products with a declared precision."""
    holding = sum(outcome.contained for outcome in run.outcomes)
    errors = sorted(
        abs(outcome.error_ppm)
        for outcome in run.outcomes
        if outcome.error_ppm is not None
        and outcome.precision is not None
        and outcome.case.startswith("product-")
    )
    words = f"Bounds hold the truth in {holding} of {len(run.outcomes)} cases."
    if errors:
        median = errors[len(errors) // 2]
        within = "within" if median <= ACCEPTED_PPM else "outside"
        words += (
            f" Median error of declared products {_percent(median)},"
            f" {within} the target of {_percent(ACCEPTED_PPM)}."
        )
    return words


def write_section(file: Path, name: str, text: str) -> None:
    """Replace what stands between the markers `name` in a document."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    document = file.read_text(encoding="utf-8")
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{file}: the markers of {name!r} are missing; put them back")
    file.write_text(head + begin + text + end + tail, encoding="utf-8")


def _row(outcome: Outcome) -> tuple[str, ...]:
    error = outcome.error_ppm
    energy = outcome.energy_error_ppm
    return (
        outcome.case,
        outcome.precision or "no",
        outcome.tier,
        f"{outcome.seconds:.1f}",
        f"{outcome.truth:.4e}" if outcome.truth else "0",
        f"{outcome.central:.4e}" if outcome.central else "0",
        "" if error is None else _percent(error),
        _span(outcome),
        "yes" if outcome.contained else "NO",
        "" if energy is None else _percent(energy),
        outcome.note,
    )


def _span(outcome: Outcome) -> str:
    if outcome.truth == 0:
        return "0 .. " + ("open" if outcome.high is None else f"{outcome.high:.2e}")
    high = "open" if outcome.high is None else f"{outcome.high / outcome.truth:.3f}"
    return f"{outcome.low / outcome.truth:.3f} .. {high}"


def _percent(ppm: int) -> str:
    return f"{ppm * 100 / PPM:.3f} %"
