"""Rows about the metering itself: whether the figures above are complete and fresh.

Counters of processes are read through rate() over Grafana's own interval, so restarts draw no
spikes. Job identity is joined from the info metric, never carried on device series.
"""

from __future__ import annotations

from dashboards.panels import (
    ORANGE,
    RED,
    SILENCE_SECONDS,
    UNIT_COUNT,
    UNIT_FLOP_RATE,
    UNIT_GPUS,
    UNIT_PER_SECOND,
    UNIT_SECONDS,
    AnyPanel,
    column,
    latest,
    query,
    rows,
    stacked,
    stat_panel,
    steps,
    table_panel,
    time_panel,
)


def ledger() -> list[AnyPanel]:
    """The collector's side: journal, fold, disputes, ingest."""
    lag = stat_panel(
        "Fold lag",
        "Batches journaled but not yet in the totals above. A lag that grows means that the "
        "folder cannot keep up or has stopped: see the collector's log.",
        UNIT_COUNT,
    ).thresholds(steps((1000, ORANGE), (10_000, RED)))
    disputed = stat_panel(
        "Disputed records",
        "Authentic records that cannot be true as they stand; out of low and central, in high. "
        "flopledger status names the check that failed.",
        UNIT_COUNT,
    ).thresholds(steps((1, ORANGE)))
    entries = stat_panel(
        "Journal entries", "Entries in the append-only journal. It never falls.", UNIT_COUNT
    )
    ingest = time_panel(
        "Batches by outcome of ingest",
        "Admitted and duplicate are normal; out_of_order heals itself. Refused or conflict "
        "needs a person: the collector's log says which node and why.",
        UNIT_PER_SECOND,
    ).with_target(
        query(
            "sum by (outcome) (rate(flopledger_ingest_batches_total[$__rate_interval]))",
            "{{outcome}}",
        )
    )
    records = time_panel(
        "Records by standing",
        "Records taken in, clear or disputed. A disputed share after a driver update points at "
        "changed counters: run flopledger-agent check on one node.",
        UNIT_PER_SECOND,
    ).with_target(
        query(
            "sum by (standing) (rate(flopledger_ingest_records_total[$__rate_interval]))",
            "{{standing}}",
        )
    )
    numbers: list[tuple[AnyPanel, str]] = [
        (lag, "max(flopledger_fold_lag_batches)"),
        (disputed, "max(flopledger_disputed_records)"),
        (entries, "max(flopledger_journal_entries)"),
    ]
    halves: list[AnyPanel] = [ingest, records]
    return [
        *(panel.with_target(latest(expr)).span(8).height(4) for panel, expr in numbers),
        *(panel.span(12).height(8) for panel in halves),
    ]


def delivery() -> list[AnyPanel]:
    """From agent to collector: silence, spools, failures."""
    ages = column(
        table_panel(
            "Age of each node's last batch",
            "Time since the collector last took a batch from the node; one a minute is normal. "
            "Above five minutes FlopLedgerAgentSilent fires: see its runbook. Under a scaled "
            "clock (a demonstration) ages mean nothing.",
            UNIT_SECONDS,
            {"node": "Node", "Value": "Age"},
        )
        .with_target(
            rows(
                "sort_desc(clamp_min("
                "time() - max by (node) (flopledger_agent_last_batch_timestamp_seconds), 0))"
            )
        )
        .thresholds(steps((SILENCE_SECONDS / 2, ORANGE), (SILENCE_SECONDS, RED))),
        "Age",
        unit=UNIT_SECONDS,
        colored=True,
    )
    spool = time_panel(
        "Batches waiting in spools",
        "Sealed batches that the collector has not confirmed. A spool that grows on one node is "
        "that node's network; on all nodes it is the collector.",
        UNIT_COUNT,
    ).with_target(query("flopledger_agent_spool_batches", "{{instance}}"))
    failures = time_panel(
        "Failed deliveries by reason",
        "Requests or batches without a durable answer. Retries lose nothing; a reason that "
        "stays is to be found in the agent's log.",
        UNIT_PER_SECOND,
    ).with_target(
        query(
            "sum by (reason) (rate(flopledger_agent_ship_failures_total[$__rate_interval]))",
            "{{reason}}",
        )
    )
    blocked = time_panel(
        "Streams that the collector refuses",
        "Not zero means that a node's records pile up in its spool until a person acts: an "
        "untrusted key, or a conflict. Both logs say which.",
        UNIT_COUNT,
    ).with_target(query("flopledger_agent_blocked_streams", "{{instance}}"))
    quarters: list[AnyPanel] = [ages, spool, failures, blocked]
    return [panel.span(6).height(8) for panel in quarters]


def devices() -> list[AnyPanel]:
    """What the agents see: executed FLOP, and how well."""
    executed = time_panel(
        "Executed FLOP/s of each GPU that holds a chosen project",
        "Central estimate from pipe activity, for GPUs that a chosen project holds at the time. A "
        "GPU far below its peers slows every rank: look at its clocks and its neighbours.",
        UNIT_FLOP_RATE,
    ).with_target(
        query(
            "sum by (gpu_uuid, accelerator) (rate("
            'flopledger_gpu_executed_flop_total{bound="central"}[$__rate_interval]))'
            ' and on (gpu_uuid) flopledger_job_info{project=~"$project"}',
            "{{accelerator}} {{gpu_uuid}}",
        )
    )
    tiers = table_panel(
        "GPUs by quality of their counters",
        "How many GPUs are metered at which tier; gpm_cycles is best, gpu_util only an upper "
        "bound. flopledger-agent check names the remedy for a weak tier.",
        UNIT_GPUS,
        {"accelerator": "Accelerator", "tier": "Tier", "Value": "GPUs"},
    ).with_target(
        rows(
            "count by (accelerator, tier) (max by (gpu_uuid, accelerator, tier) "
            "(flopledger_gpu_info))"
        )
    )
    halves: list[AnyPanel] = [executed, tiers]
    return [panel.span(12).height(9) for panel in halves]


def sampling() -> list[AnyPanel]:
    """Where the agents cannot see, and what looking costs them."""
    gaps = time_panel(
        "GPUs without activity counters, by reason",
        "Share of time, summed over GPUs, in which no activity counter could be read. Empty while "
        "every device answers. Each such second widens a high bound.",
        UNIT_GPUS,
    ).with_target(
        query(
            "sum by (reason) (rate(flopledger_gpu_gap_seconds_total[$__rate_interval]))",
            "{{reason}}",
        )
    )
    errors = time_panel(
        "Failed samples by reason",
        "Ticks in which a device could not be sampled. Two or three warming_up at an agent's start "
        "are normal. A reason that stays is a fault of driver or device: drain the node.",
        UNIT_PER_SECOND,
    ).with_target(
        query(
            "sum by (reason) (rate(flopledger_gpu_sample_errors_total[$__rate_interval]))",
            "{{reason}}",
        )
    )
    stale = time_panel(
        "Age of the oldest GPU sample of each agent",
        "A tick is a second; an age that climbs is a device or driver that stopped answering. "
        "Under a scaled clock (a demonstration) ages mean nothing.",
        UNIT_SECONDS,
    ).with_target(
        query(
            "clamp_min(time() - "
            "min by (instance) (flopledger_gpu_last_sample_timestamp_seconds), 0)",
            "{{instance}}",
        )
    )
    ticks = time_panel(
        "Duration of a sampling tick",
        "Mean real time of a tick, driver included. Above a second ticks are skipped: the driver "
        "is slow, see which call in the agent's log.",
        UNIT_SECONDS,
    ).with_target(
        query(
            "sum by (instance) "
            "(rate(flopledger_agent_tick_duration_seconds_sum[$__rate_interval]))"
            " / sum by (instance) "
            "(rate(flopledger_agent_tick_duration_seconds_count[$__rate_interval]))",
            "{{instance}}",
        )
    )
    quarters: list[AnyPanel] = [stacked(gaps), errors, stale, ticks]
    return [panel.span(6).height(8) for panel in quarters]
