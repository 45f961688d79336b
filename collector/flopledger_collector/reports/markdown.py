"""A statement as Markdown: for people, for a repository, for an annex.

Every text that came from outside is escaped, so that a hostile project name or method stays text
in a table cell. Figures carry at most four digits; the JSON form has all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_collector.reports import figures, markdown_metered
from flopledger_collector.reports.markdown_table import bullets, table, text
from flopledger_collector.reports.measured import doubtful, energy_label
from flopledger_collector.reports.statement import (
    ENERGY_BOUNDARY,
    NOTES,
    Period,
    Statement,
)
from flopledger_collector.usage import integer_operations
from flopledger_core.units import decimal_text, scientific

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_core.records import Declaration


def statement_markdown(statement: Statement) -> str:
    """The whole statement."""
    parts = (
        _header(statement),
        _summary(statement),
        _instruments(statement),
        _budgets(statement),
        markdown_metered.items(statement),
        markdown_metered.hosts(statement),
        markdown_metered.restatement(statement),
        _declarations(statement),
        _unmetered(statement),
        markdown_metered.cautions(statement),
        _reconciliation(statement),
        _policies(statement),
        _notes(statement),
    )
    lines = [line for part in parts for line in part]
    return "\n".join(lines).rstrip("\n") + "\n"


def _header(statement: Statement) -> Iterator[str]:
    info, position = statement.info, statement.position
    yield f"# Statement: {text(info.project)}"
    yield ""
    if statement.simulated:
        yield "> **Simulated data.** Part of these figures was metered on simulated devices."
        yield ""
    if not info.opened:
        yield (
            "> **Not opened.** The ledger names this project, but nobody opened it with "
            "`flopledger project create`."
        )
        yield ""
    if position.provisional_entries:
        yield (
            f"> **Provisional.** {position.provisional_entries} journal entries are not in these "
            "figures yet."
        )
        yield ""
    yield from table(
        ("Field", "Value"),
        (
            ("Title", text(info.title)),
            ("Entity", text(info.entity)),
            ("Period", period_text(statement.period)),
            ("Records span", _span_of(info.first_unix_ms, info.last_unix_ms)),
            ("Ledger", f"`{position.ledger_id}`"),
            ("Position", f"{position.entries} journal entries"),
            ("Heads root", f"`{position.heads_root}`"),
            ("FLOP model", f"version {statement.model_version}"),
            ("Hardware table", f"version {statement.table_version}"),
            ("Generated", figures.instant(statement.generated_unix_ms)),
        ),
    )
    if statement.overlapping:
        yield "Partly in the period:"
        yield ""
        yield from bullets(text(sentence) for sentence in statement.overlapping)


def period_text(period: Period) -> str:
    """The period in words; its end is the first day that is not in it."""
    if period.is_everything:
        return "everything the ledger holds"
    start = "the beginning" if period.start_unix_ms is None else _day(period.start_unix_ms)
    end = "now" if period.end_unix_ms is None else f"before {_day(period.end_unix_ms)}"
    return f"from {start}, {end}, UTC"


def _day(unix_ms: int) -> str:
    return figures.instant(unix_ms)[:10]


def _span_of(first_unix_ms: int | None, last_unix_ms: int | None) -> str:
    if first_unix_ms is None:
        return "none"
    return f"{figures.instant(first_unix_ms)} to {figures.instant(last_unix_ms)}"


def _summary(statement: Statement) -> Iterator[str]:
    usage = statement.usage
    yield "## Summary"
    yield ""
    yield "FLOP under each policy, as central [low, high]:"
    yield ""
    yield from table(
        ("Policy", "FLOP", "Integer operations", "Undecided for want of a declaration"),
        (
            (
                (
                    f"{text(found.view.policy_title)} (`{found.view.policy_id}` "
                    f"{text(found.view.policy_version)})"
                ),
                figures.flop(found.view.total),
                figures.flop(found.integer_operations),
                ", ".join(found.view.undeclared()) or "-",
            )
            for found in statement.policies
        ),
    )
    rows = [
        ("Executed FLOP", figures.flop(usage.known("flop", usage.work.flop))),
        ("... by tensor pipes", figures.flop(usage.known("flop", usage.work.flop_tensor))),
        ("... by CUDA cores", figures.flop(usage.known("flop", usage.work.flop_cores))),
        ("... with work of unknown owner", figures.flop(statement.flop)),
        (
            "Integer operations",
            figures.flop(usage.known("integer_operations", integer_operations(usage.work))),
        ),
        ("Model FLOP, declared", figures.flop(usage.model_flop)),
        (
            energy_label(ENERGY_BOUNDARY),
            figures.energy(usage.known("energy_mj", usage.energy_mj)),
        ),
        *(
            (energy_label(boundary), figures.energy(energy))
            for boundary, energy in usage.energy_by_boundary.items()
            if boundary != ENERGY_BOUNDARY
        ),
        ("GPU-hours", figures.hours(usage.known("gpu_time_ms", usage.gpu_time_ms))),
        ("CPU-seconds (metered nodes)", figures.seconds(usage.known_cpu_time)),
        *(
            (f"Cost, declared, {currency}", figures.quantity_span("cost_cents", cost))
            for currency, cost in usage.cost_cents.items()
        ),
        (
            "Records",
            (
                f"{usage.records}, of them disputed {usage.disputed_records}, "
                f"of nodes without their GPUs {usage.host_records}"
            ),
        ),
    ]
    yield "Its own work, before any policy:"
    yield ""
    yield from table(("Quantity", "Amount"), rows)


def _instruments(statement: Statement) -> Iterator[str]:
    yield "## Instruments"
    yield ""
    if not statement.period.is_everything:
        yield "Over the project's whole life, not only the period."
        yield ""
    rows: list[tuple[str, ...]] = []
    for found in statement.assessments:
        instrument, evaluation = found.instrument, found.evaluation
        value = evaluation.threshold.value
        rows.append(
            (
                f"{text(instrument.title)} (`{instrument.id}`)",
                (
                    f"{text(instrument.comparator)} {scientific(instrument.threshold)} "
                    f"{figures.unit(instrument.quantity)}"
                ),
                f"`{instrument.scope_policy}`",
                "-" if value is None else figures.flop(value),
                figures.ratio(evaluation.threshold.ratio),
                _verdict(evaluation.verdict, evaluation.would_be, evaluation.undeclared),
            )
        )
    yield from table(("Instrument", "Threshold", "Scope", "Value", "Share", "Verdict"), rows)
    warnings = [warning for found in statement.assessments for warning in found.evaluation.warnings]
    if warnings:
        yield from bullets(text(warning) for warning in dict.fromkeys(warnings))


def _verdict(verdict: str, would_be: str, undeclared: tuple[str, ...]) -> str:
    words = f"**{figures.VERDICT_WORDS[verdict]}**"
    if verdict == "not_in_force":
        words += f" (would be: {figures.VERDICT_WORDS[would_be]})"
    if verdict == "undetermined":
        words += f"; undeclared: {text(', '.join(undeclared))}"
    return words


def _budgets(statement: Statement) -> Iterator[str]:
    yield "## Budgets"
    yield ""
    if not statement.budgets:
        yield "No budget is set."
        yield ""
        return
    yield from table(
        ("Budget", "Limit", "Used", "Share", "Verdict"),
        (
            (
                text(found.name),
                (
                    f"{figures.amount(found.quantity, found.limit)} "
                    f"{figures.unit(found.quantity, found.currency)}"
                ),
                figures.quantity_span(found.quantity, found.used),
                figures.ratio(found.reached),
                f"**{figures.VERDICT_WORDS[found.verdict]}**",
            )
            for found in statement.budgets
        ),
    )


def _declarations(statement: Statement) -> Iterator[str]:
    yield "## Declarations"
    yield ""
    if not statement.declarations:
        yield "Nobody declared anything."
        yield ""
        return
    yield from table(
        (
            "Activity", "Period", "FLOP", "Basis", "kWh", "GPU-hours", "Cost", "Method",
            "Evidence", "Author", "Declared at",
        ),
        (
            (
                text(found.activity),
                f"{_day(found.start_unix_ms)} to {_day(found.end_unix_ms)}",
                declared_flop(found),
                found.flop_basis,
                "-" if found.energy_mj is None else figures.kilowatt_hours(int(found.energy_mj)),
                "-" if found.gpu_time_ms is None else figures.gpu_hours(int(found.gpu_time_ms)),
                declared_cost(found),
                text(found.method),
                text(found.evidence),
                text(found.author),
                figures.instant(found.at_unix_ms),
            )
            for found in statement.declarations
        ),
    )  # fmt: skip


def declared_flop(found: Declaration) -> str:
    """A declaration's FLOP as central [low, high]."""
    if found.flop_low is None or found.flop_central is None or found.flop_high is None:
        return "-"
    low, central, high = int(found.flop_low), int(found.flop_central), int(found.flop_high)
    if low == high:
        return scientific(central)
    return f"{scientific(central)} [{scientific(low)}, {scientific(high)}]"


def declared_cost(found: Declaration) -> str:
    """A declaration's cost with its currency."""
    if found.cost_cents is None:
        return "-"
    return f"{decimal_text(int(found.cost_cents), figures.CENTS_PER_UNIT, 2)} {found.currency}"


def _unmetered(statement: Statement) -> Iterator[str]:
    yield "## Gaps, disputed records and work of unknown owner"
    yield ""
    lines = [text(sentence) for sentence in doubtful(statement)]
    if not lines:
        yield "None."
        yield ""
        return
    yield from bullets(lines)


def _reconciliation(statement: Statement) -> Iterator[str]:
    yield "## The ledger's own accounts in the same period"
    yield ""
    yield from table(
        ("Account", "GPU-hours", "of them gaps", f"kWh ({ENERGY_BOUNDARY})", "FLOP", "CPU-seconds"),
        (
            (
                name,
                figures.hours(usage.known("gpu_time_ms", usage.gpu_time_ms)),
                figures.gpu_hours(usage.gap_time_ms),
                figures.energy(usage.known("energy_mj", usage.energy_mj)),
                figures.flop(usage.known("flop", usage.work.flop)),
                figures.seconds(usage.known_cpu_time),
            )
            for name, usage in (
                ("this project", statement.usage),
                ("unattributed", statement.unattributed),
                ("idle", statement.idle),
            )
        ),
    )


def _policies(statement: Statement) -> Iterator[str]:
    yield "## What each policy counts"
    yield ""
    for found in statement.policies:
        yield f"### {text(found.view.policy_title)}"
        yield ""
        yield (
            f"`{found.view.policy_id}` {text(found.view.policy_version)}, "
            f"SHA-256 `{found.view.policy_digest}`"
        )
        yield ""
        yield from table(
            ("Activity", "Verdict", "FLOP", "Contribution", "Rule"),
            (
                (
                    text(line.activity),
                    line.verdict + (" (our reading)" if line.inferred else ""),
                    figures.flop(line.amount),
                    figures.flop(line.contribution),
                    f"{text(line.rule_text)} ({text(line.citation)})",
                )
                for line in found.view.lines
            ),
        )
    for bridge in statement.bridges:
        yield f"### From `{bridge.from_policy}` to `{bridge.to_policy}`"
        yield ""
        if not bridge.steps:
            yield "The same activities count; there is no difference."
            yield ""
            continue
        rows = [
            (
                text(step.activity),
                f"{step.from_verdict} to {step.to_verdict}",
                scientific(step.low),
                scientific(step.central),
                figures.OPEN if step.high is None else scientific(step.high),
            )
            for step in bridge.steps
        ]
        yield from table(("Activity", "Verdicts", "Low", "Central", "High"), rows)


def _notes(statement: Statement) -> Iterator[str]:
    yield "## Notes"
    yield ""
    yield from bullets(NOTES)
    if statement.reasons:
        yield "Why bounds are open or wide:"
        yield ""
        yield from bullets(text(reason) for reason in statement.reasons)
    if statement.provenance:
        yield "Where the inputs come from:"
        yield ""
        yield from bullets(text(note) for note in statement.provenance)
