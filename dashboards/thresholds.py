"""Rows about thresholds: how near each project is to what a law or a budget allows.

Totals belong to the ledger, not to the process that shows them: several collectors may serve one
ledger, so every ledger figure is taken with `max`, never added up over scraped processes.
"""

from __future__ import annotations

from typing import Final

from dashboards.panels import (
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    UNIT_COUNT,
    UNIT_FLOP,
    UNIT_RATIO,
    AnyPanel,
    bar_panel,
    latest,
    line_color,
    line_style,
    logarithmic,
    query,
    ratio_steps,
    stat_panel,
    state_panel,
    steps,
    time_panel,
    value_names,
)

# The collector's verdict on an instrument -> number in the timeline, word and colour.
VERDICTS: Final[dict[str, tuple[int, str, str]]] = {
    "not_in_force": (0, "not in force", GREY),
    "below": (1, "below", GREEN),
    "undetermined": (2, "undetermined", PURPLE),
    "may_exceed": (3, "may exceed", ORANGE),
    "exceeds": (4, "exceeds", RED),
}
# Zero that exists only while a collector is scraped: without one a count is absent, not zero.
SCRAPED_ZERO: Final = "0 * max(flopledger_journal_entries)"


def summary() -> list[AnyPanel]:
    """The line of numbers one reads from across the room."""
    unopened_ids = 'flopledger_project_info{project=~"$project",opened="false"}'
    unopened_count = f"count(count by (project) ({unopened_ids}))"
    verdicts = 'flopledger_instrument_state{project=~"$project",state=~"%s"} == 1'
    highest = stat_panel(
        "Nearest to a legal threshold",
        "The highest central ratio of any shown project to any instrument. At 80 % decide who "
        "notifies whom: some clocks start when a crossing becomes foreseeable.",
        UNIT_RATIO,
    ).thresholds(ratio_steps())
    exceeded = stat_panel(
        "Thresholds exceeded",
        "Project and instrument pairs whose whole bound lies above the threshold. Print the "
        "statement (flopledger statement PROJECT) and follow the instrument's duties.",
        UNIT_COUNT,
    ).thresholds(steps((1, RED)))
    open_verdicts = stat_panel(
        "May exceed, or undetermined",
        "Pairs whose bounds straddle the threshold, or that miss a declared fact. Declare the "
        "precision, the facts or the gaps that the statement lists.",
        UNIT_COUNT,
    ).thresholds(steps((1, ORANGE)))
    projects = stat_panel(
        "Projects", "Projects that the ledger knows, opened or only seen in usage.", UNIT_COUNT
    )
    unopened = stat_panel(
        "Unopened project ids",
        "Ids that jobs named but nobody opened, those that the collector's page has no room for "
        "included. Their work is counted. Open them (flopledger project create) or correct the "
        "tag.",
        UNIT_COUNT,
    ).thresholds(steps((1, ORANGE)))
    source = (
        stat_panel(
            "Ledger",
            "Whether this ledger holds measurements of real GPUs or a demonstration. Figures of a "
            "simulated ledger are no evidence of anything.",
            UNIT_COUNT,
        )
        .thresholds(steps((1, PURPLE)))
        .mappings(value_names({0: ("measured", GREEN), 1: ("SIMULATED", PURPLE)}))
    )
    queries: list[tuple[AnyPanel, str]] = [
        (highest, 'max(flopledger_instrument_ratio{project=~"$project",bound="central"})'),
        (exceeded, _pairs(verdicts % "exceeds")),
        (open_verdicts, _pairs(verdicts % "may_exceed|undetermined")),
        (projects, 'count(count by (project) (flopledger_project_info{project=~"$project"}))'),
        (
            unopened,
            f"({unopened_count} or {SCRAPED_ZERO}) + max(flopledger_projects_left_out)",
        ),
        (
            source,
            'max(flopledger_ledger_info{simulated="true"}) or 0 * max(flopledger_ledger_info)',
        ),
    ]
    return [panel.with_target(latest(expr)).span(4).height(4) for panel, expr in queries]


def thresholds() -> list[AnyPanel]:
    """Ratios to instruments and budgets, verdicts over time, FLOP beside the thresholds."""
    instruments = (
        bar_panel(
            "Share of each legal threshold",
            "Value over threshold, with low, central and high bound, highest first; 100 % is the "
            "threshold itself. A high bound far from the central one means undeclared precision, "
            "gaps or unattributed work: declare or attribute it. An infinite high means that "
            "nothing known limits it.",
            UNIT_RATIO,
        )
        .with_target(
            latest(
                "sort_desc(max by (project, instrument, bound) "
                '(flopledger_instrument_ratio{project=~"$project"}))',
                "{{project}} · {{instrument}} · {{bound}}",
            )
        )
        .min(0)
        .max(1)
        .thresholds(ratio_steps())
    )
    budgets = (
        bar_panel(
            "Share of each budget",
            "Used over limit for every budget that somebody set (flopledger budget set), highest "
            "first. Above 80 % raise the limit on purpose or stop the work. Empty while no "
            "budget is set.",
            UNIT_RATIO,
        )
        .with_target(
            latest(
                "sort_desc(max by (project, budget, quantity, bound) "
                '(flopledger_budget_ratio{project=~"$project"}))',
                "{{project}} · {{budget}} ({{quantity}}) · {{bound}}",
            )
        )
        .min(0)
        .max(1)
        .thresholds(ratio_steps())
    )
    halves: list[AnyPanel] = [instruments, _verdicts(), budgets, _against_thresholds()]
    return [panel.span(12).height(10) for panel in halves]


def _verdicts() -> AnyPanel:
    """The verdict of each instrument as one coloured row."""
    expr = " or ".join(
        "max by (project, instrument) (flopledger_instrument_state"
        f'{{project=~"$project",state="{verdict}"}} == 1) * {number}'
        for verdict, (number, _, _) in VERDICTS.items()
    )
    names = {float(number): (text, color) for number, text, color in VERDICTS.values()}
    return (
        state_panel(
            "Verdict of each instrument",
            "What each instrument says of each project. Undetermined is never below: a fact or "
            "a bound is missing, and the statement names it. Exceeds: the duties apply, see the "
            "statement for dates.",
            UNIT_COUNT,
        )
        .with_target(query(expr, "{{project}} · {{instrument}}"))
        .mappings(value_names(names))
        .thresholds(steps())
    )


def _against_thresholds() -> AnyPanel:
    """Central totals with dashed bounds on a logarithmic scale that also holds the thresholds."""
    panel = time_panel(
        "FLOP against thresholds ($policy)",
        "Counted FLOP of each project under the chosen policy on a logarithmic scale: central "
        "as a line, low and high dotted, legal thresholds in red. An open high bound is not "
        "drawn. A total may fall: corrections do that, and the statement itemises them.",
        UNIT_FLOP,
    )
    panel = panel.scale_distribution(logarithmic())
    panel = line_style(panel, "/ (low|high)$/", lineStyle={"fill": "dot", "dash": [2, 6]})
    panel = line_style(panel, "/ central$/", lineWidth=3)
    panel = line_style(panel, "/^threshold /", lineStyle={"fill": "dash", "dash": [10, 10]})
    panel = line_color(panel, "/^threshold /", RED)
    for ref, bound in (("A", "low"), ("B", "central"), ("C", "high")):
        expr = (
            "max by (project) (flopledger_project_flop"
            f'{{project=~"$project",policy="$policy",bound="{bound}"}}) < Inf'
        )
        panel = panel.with_target(query(expr, f"{{{{project}}}} {bound}", ref))
    return panel.with_target(
        query(
            'max by (instrument) (flopledger_instrument_threshold{quantity="flop"})',
            "threshold {{instrument}}",
            "D",
        )
    )


def _pairs(expr: str) -> str:
    return f"count(max by (project, instrument) ({expr})) or {SCRAPED_ZERO}"
