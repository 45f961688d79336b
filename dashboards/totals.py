"""Rows about totals: FLOP, energy, GPU time and cost per project, and what no project owns.

Amounts are ledger totals, which corrections may lower; that is why they are read as gauges and
never through rate().
"""

from __future__ import annotations

from dashboards.panels import (
    UNIT_COUNT,
    UNIT_ENERGY,
    UNIT_FLOP,
    UNIT_GPU_HOURS,
    UNIT_GPUS,
    WALL_WIDTH,
    AnyPanel,
    column,
    line_style,
    query,
    rows,
    stacked,
    table_panel,
    time_panel,
)

BOUNDS = ("low", "central", "high")


def totals() -> list[AnyPanel]:
    """Totals per project and policy, then the resources behind them."""
    by_policy = table_panel(
        "Totals by project and policy",
        "Every policy side by side, whatever the policy variable says: what counts differs, the "
        "work does not. Operations add integer work to FLOP nowhere; US texts count both. An "
        "infinite high bound is open: nothing known limits it.",
        UNIT_FLOP,
        {
            "project": "Project",
            "policy": "Policy",
            "Value #A": "FLOP low",
            "Value #B": "FLOP central",
            "Value #C": "FLOP high",
            "Value #D": "Integer operations",
        },
    ).decimals(2)
    for ref, bound in zip("ABC", BOUNDS, strict=True):
        by_policy.with_target(rows(_by_policy("flopledger_project_flop", bound), ref))
    by_policy.with_target(rows(_by_policy("flopledger_project_integer_operations", "central"), "D"))
    energy = time_panel(
        "Energy by project",
        "Metered energy of the GPUs alone: no host, no cooling. Compare projects by it only on "
        "the same accelerators.",
        UNIT_ENERGY,
    ).with_target(
        query(
            'max by (project) (flopledger_project_energy_joules{project=~"$project"}) / 3600',
            "{{project}}",
        )
    )
    hours = time_panel(
        "GPU-hours by project",
        "Device time that each project owned, imported hours included. Time without FLOP is a "
        "job that waits: look at its data loading and its check-pointing.",
        UNIT_GPU_HOURS,
    ).with_target(
        query(
            'max by (project) (flopledger_project_gpu_seconds{project=~"$project"}) / 3600',
            "{{project}}",
        )
    )
    cost = column(
        table_panel(
            "Declared cost by project",
            "What people declared (flopledger declare usage --cost), never converted between "
            "currencies. Empty while nobody declared anything.",
            UNIT_COUNT,
            {"project": "Project", "currency": "Currency", "Value": "Cost"},
        ).with_target(
            rows('max by (project, currency) (flopledger_project_cost{project=~"$project"})')
        ),
        "Cost",
        unit="locale",
    )
    thirds: list[AnyPanel] = [energy, hours, cost]
    halves: list[AnyPanel] = [*_metered()]
    return [
        by_policy.span(WALL_WIDTH).height(8),
        *(panel.span(8).height(8) for panel in thirds),
        *(panel.span(12).height(8) for panel in halves),
    ]


def _metered() -> list[AnyPanel]:
    """What meters tell apart: pipes, and the boundaries of energy."""
    pipes = time_panel(
        "Central FLOP by pipe",
        "Tensor pipes and CUDA cores apart, before any policy. CUDA-core FLOP is at most what the "
        "busy pipe could have done, so it is an upper figure.",
        UNIT_FLOP,
    ).with_target(
        query(
            "max by (project, pipe) "
            '(flopledger_project_pipe_flop{project=~"$project",bound="central"})',
            "{{project}} {{pipe}}",
        )
    )
    boundaries = time_panel(
        "Energy by boundary",
        "GPU, module, CPU packages, memory and node, each by its own meter. Boundaries contain "
        "each other: compare them, never add them. A boundary that nobody read has no line.",
        UNIT_ENERGY,
    ).with_target(
        query(
            "max by (project, boundary) (flopledger_project_boundary_energy_joules"
            '{project=~"$project",bound="central"}) / 3600',
            "{{project}} {{boundary}}",
        )
    )
    return [pipes, boundaries]


def unowned() -> list[AnyPanel]:
    """What no project owns, and what nobody metered."""
    unattributed = time_panel(
        "Unattributed FLOP",
        "Work on enrolled GPUs that no project claimed. It enters the high bound of every project "
        "that could own it: tag the jobs (flopledger-agent tag), or ask the agent why not "
        "(flopledger-agent check).",
        UNIT_FLOP,
    ).with_target(query("max by (bound) (flopledger_unattributed_flop) < Inf", "{{bound}}"))
    lost = (
        time_panel(
            "Idle and gap GPU-hours",
            "Idle: nobody held the device. Gap: nobody metered it, and the high bounds assume it "
            "ran at its peak. Find the node in the gap panel below and see its agent's log.",
            UNIT_GPU_HOURS,
        )
        .with_target(query("max(flopledger_idle_gpu_seconds) / 3600", "idle", "A"))
        .with_target(query("max(flopledger_gap_gpu_seconds) / 3600", "gap", "B"))
    )
    owners = stacked(
        time_panel(
            "GPUs by kind of owner",
            "How many GPUs the agents see as attributed, idle or unattributed, from their own "
            "pages. Unattributed rising after a change to job scripts means that tags got lost.",
            UNIT_GPUS,
        )
    ).with_target(
        query(
            "sum by (owner_kind) (rate(flopledger_gpu_seconds_total[$__rate_interval]))",
            "{{owner_kind}}",
        )
    )
    thirds: list[AnyPanel] = [unattributed, lost, owners]
    return [panel.span(8).height(8) for panel in thirds]


def one_project() -> list[AnyPanel]:
    """The panels of one project, repeated for each chosen one: bounds drawn as a filled band."""
    band = time_panel(
        "FLOP with bounds: $project ($policy)",
        "The band from low to high holds the true value. It narrows with declared precision and "
        "attributed work, and widens with gaps.",
        UNIT_FLOP,
    )
    band = line_style(band, "high", fillBelowTo="low", fillOpacity=20, lineWidth=0)
    band = line_style(band, "low", lineWidth=0)
    band = line_style(band, "central", lineWidth=2)
    band.with_target(
        query(
            'max by (bound) (flopledger_project_flop{project=~"$project",policy="$policy"}) < Inf',
            "{{bound}}",
        )
    )
    policies = time_panel(
        "Central FLOP by policy: $project",
        "The same work under every policy. The distance between lines is what the policies "
        "count differently; the statement itemises it.",
        UNIT_FLOP,
    ).with_target(
        query(
            'max by (policy) (flopledger_project_flop{project=~"$project",bound="central"})',
            "{{policy}}",
        )
    )
    halves: list[AnyPanel] = [band, policies]
    return [panel.span(12).height(9) for panel in halves]


def _by_policy(metric: str, bound: str) -> str:
    return f'max by (project, policy) ({metric}{{project=~"$project",bound="{bound}"}})'
