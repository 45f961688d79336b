"""The collector's Prometheus page: the ledger's folded state, read when somebody asks.

A page is made at most once a second, however many scrapers ask. Amounts become floating-point
numbers here and nowhere earlier; the ledger keeps the exact ones. An open high bound is +Inf, an
absent value has no sample. Names and labels are a contract with dashboards and alerts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flopledger_collector.status import LedgerStatus, ProjectStatus
from flopledger_core import __version__
from flopledger_core.units import (
    MJ_PER_JOULE,
    MS_PER_SECOND,
    NS_PER_SECOND,
)

if TYPE_CHECKING:
    from flopledger_collector.ledger.totals import Health
    from flopledger_collector.writer import IngestCounts
    from flopledger_core.bounds import Bounds

CONTENT_TYPE: Final = "text/plain; version=0.0.4"  # the server adds the character set
PAGE_AGE_MAX_NS: Final = NS_PER_SECOND  # scrapers ask every few seconds; evaluating costs more
# Opened projects are always shown. Names that only usage brought could be made without end by a
# broken tag, and each costs some forty series, so beyond this many they are only counted.
UNOPENED_PROJECTS_MAX: Final = 1_000
CENTS_PER_UNIT: Final = 100


class Snapshot:
    """What one page is made from."""

    __slots__ = ("counts", "health", "simulated", "status")

    def __init__(
        self, *, status: LedgerStatus, health: Health, counts: IngestCounts, simulated: bool
    ) -> None:
        self.status = status
        self.health = health
        self.counts = counts
        self.simulated = simulated


class Exposition:
    """Renders the page, at most once in `PAGE_AGE_MAX_NS` of real time."""

    def __init__(self, read: Callable[[], Snapshot], monotonic_ns: Callable[[], int]) -> None:
        self._read = read
        self._monotonic_ns = monotonic_ns
        self._lock = threading.Lock()
        self._page = b""
        self._made_ns: int | None = None

    def page(self) -> bytes:
        """The page in Prometheus's text format."""
        with self._lock:
            now_ns = self._monotonic_ns()
            if self._made_ns is None or now_ns - self._made_ns >= PAGE_AGE_MAX_NS:
                registry = CollectorRegistry(auto_describe=False)
                registry.register(LedgerCollector(self._read()))
                self._page = generate_latest(registry)
                self._made_ns = now_ns
            return self._page


class LedgerCollector(Collector):
    """One snapshot as metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        projects = snapshot.status.projects
        unopened = [project for project in projects if not project.info.opened]
        left_out = {project.info.project for project in unopened[UNOPENED_PROJECTS_MAX:]}
        self._left_out_count = len(left_out)
        self._projects = [one for one in projects if one.info.project not in left_out]

    def collect(self) -> Iterator[Metric]:
        """Every family of the page."""
        yield from self._totals()
        yield from self._metered()
        yield from self._instruments()
        yield from self._budgets()
        yield from self._accounts()
        yield from self._ingest()
        yield from self._about()

    def _totals(self) -> Iterator[Metric]:
        flop = _gauge(
            "flopledger_project_flop",
            "Executed FLOP of a project under a policy.",
            ("project", "policy", "bound"),
        )
        integer = _gauge(
            "flopledger_project_integer_operations",
            "Integer operations of a project under a policy; never part of FLOP.",
            ("project", "policy", "bound"),
        )
        energy = _gauge(
            "flopledger_project_energy_joules", "Energy at the GPU, what is known.", ("project",)
        )
        time = _gauge("flopledger_project_gpu_seconds", "GPU time, what is known.", ("project",))
        cost = _gauge(
            "flopledger_project_cost", "Declared cost in the currency.", ("project", "currency")
        )
        for one in self._projects:
            project = one.info.project
            for found in one.policies:
                labels = (project, found.view.policy_id)
                _add_bounds(flop, labels, found.view.total)
                _add_bounds(integer, labels, found.integer_operations)
            for family, quantity, amount, divisor in (
                (energy, "energy_mj", one.usage.energy_mj, MJ_PER_JOULE),
                (time, "gpu_time_ms", one.usage.gpu_time_ms, MS_PER_SECOND),
            ):
                if not one.usage.records or one.usage.known(quantity, amount) is not None:
                    family.add_metric((project,), finite_or_infinite(amount.central, divisor))
            for currency, cents in one.usage.cost_cents.items():
                known = finite_or_infinite(cents.central, CENTS_PER_UNIT)
                cost.add_metric((project, currency), known)
        yield from (flop, integer, energy, time, cost)

    def _metered(self) -> Iterator[Metric]:
        """What meters of pipes, nodes and modules say of each project, before any policy."""
        pipes = _gauge(
            "flopledger_project_pipe_flop",
            "Executed FLOP of a project by tensor pipes and by CUDA cores, before any policy.",
            ("project", "pipe", "bound"),
        )
        energy = _gauge(
            "flopledger_project_boundary_energy_joules",
            "Energy of a project at each boundary; boundaries contain each other.",
            ("project", "boundary", "bound"),
        )
        cpu = _gauge(
            "flopledger_project_cpu_seconds",
            "CPU time of nodes that a project used.",
            ("project", "bound"),
        )
        stand_ins = _gauge(
            "flopledger_project_stand_in_records",
            "Records of devices that the hardware table lacks and an architecture stands in for.",
            ("project",),
        )
        for one in self._projects:
            project, usage = one.info.project, one.usage
            if usage.known("flop", usage.work.flop) is not None:
                _add_bounds(pipes, (project, "tensor"), usage.work.flop_tensor)
                _add_bounds(pipes, (project, "cuda_core"), usage.work.flop_cores)
            for boundary, joules in one.energy_by_boundary.items():
                _add_bounds(energy, (project, boundary), joules, MJ_PER_JOULE)
            if one.known_cpu_time is not None:
                _add_bounds(cpu, (project,), one.known_cpu_time, MS_PER_SECOND)
            stand_ins.add_metric((project,), usage.stand_in_records)
        yield from (pipes, energy, cpu, stand_ins)

    def _instruments(self) -> Iterator[Metric]:
        threshold = _gauge(
            "flopledger_instrument_threshold",
            "Threshold of a legal instrument in its quantity.",
            ("instrument", "quantity"),
        )
        share = _gauge(
            "flopledger_instrument_ratio",
            "Value over threshold.",
            ("project", "instrument", "bound"),
        )
        state = _gauge(
            "flopledger_instrument_state",
            "1 for the verdict of an instrument on a project.",
            ("project", "instrument", "state"),
        )
        seen: dict[str, tuple[str, int]] = {}
        for one in self._projects:
            for found in one.assessments:
                instrument = found.instrument
                seen[instrument.id] = (instrument.quantity, instrument.threshold)
                labels = (one.info.project, instrument.id)
                reached = found.evaluation.threshold.ratio
                if reached is not None:
                    _add_ratios(share, labels, reached.low, reached.central, reached.high)
                state.add_metric((*labels, found.evaluation.verdict), 1)
        for instrument_id, (quantity, amount) in seen.items():
            threshold.add_metric((instrument_id, quantity), _number(amount))
        yield from (threshold, share, state)

    def _budgets(self) -> Iterator[Metric]:
        limit = _gauge(
            "flopledger_budget_limit",
            "Limit of a budget in the base unit of its quantity.",
            ("project", "budget", "quantity"),
        )
        share = _gauge(
            "flopledger_budget_ratio",
            "Used over limit.",
            ("project", "budget", "quantity", "bound"),
        )
        for one in self._projects:
            for found in one.budgets:
                quantity, divisor = BASE_QUANTITIES[found.quantity]
                labels = (one.info.project, found.name, quantity)
                limit.add_metric(labels, finite_or_infinite(found.limit, divisor))
                reached = found.reached
                if reached is not None:
                    _add_ratios(share, labels, reached.low, reached.central, reached.high)
        yield from (limit, share)

    def _accounts(self) -> Iterator[Metric]:
        status, health = self._snapshot.status, self._snapshot.health
        unattributed = _gauge(
            "flopledger_unattributed_flop", "Executed FLOP whose owner is not known.", ("bound",)
        )
        _add_bounds(unattributed, (), status.unattributed.work.flop)
        yield unattributed
        yield _single(
            "flopledger_idle_gpu_seconds",
            "Time of enrolled devices that no job held.",
            finite_or_infinite(status.idle.gpu_time_ms.central, MS_PER_SECOND),
        )
        if status.idle.known_cpu_time is not None:
            yield _single(
                "flopledger_idle_cpu_seconds",
                "CPU time of enrolled nodes that no process used.",
                finite_or_infinite(status.idle.cpu_time_ms.central, MS_PER_SECOND),
            )
        yield _single(
            "flopledger_gap_gpu_seconds",
            "Device time that nobody metered, whoever owned it.",
            finite_or_infinite(health.gap_time_ms, MS_PER_SECOND),
        )
        yield _single(
            "flopledger_disputed_records",
            "Folded records that are disputed.",
            health.disputed_records,
        )

    def _ingest(self) -> Iterator[Metric]:
        health, counts = self._snapshot.health, self._snapshot.counts
        yield _single(
            "flopledger_journal_entries", "Batches in the journal.", health.journal_entries
        )
        yield _single(
            "flopledger_fold_lag_batches",
            "Journaled batches that no total holds yet.",
            health.fold_lag_entries,
        )
        batches = CounterMetricFamily(
            "flopledger_ingest_batches",
            "Batches answered since the collector started, by outcome.",
            labels=("outcome",),
        )
        for outcome, count in sorted(counts.batches.items()):
            batches.add_metric((outcome,), count)
        records = CounterMetricFamily(
            "flopledger_ingest_records",
            "Records of admitted batches since the collector started, by standing.",
            labels=("standing",),
        )
        for standing, count in sorted(counts.records.items()):
            records.add_metric((standing,), count)
        last = _gauge(
            "flopledger_agent_last_batch_timestamp_seconds",
            "When the last batch of an agent's stream was received.",
            ("node", "stream_id"),
        )
        for stream in health.streams:
            if stream.author == "agent":
                received = finite_or_infinite(stream.last_received_unix_ms, MS_PER_SECOND)
                last.add_metric((stream.node, stream.stream_id), received)
        yield from (batches, records, last)

    def _about(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        simulated = "true" if snapshot.simulated else "false"
        yield _info("flopledger_collector_build_info", "1.", {"version": __version__})
        yield _info(
            "flopledger_ledger_info",
            "1 for the ledger that is kept.",
            {"ledger_id": snapshot.health.ledger_id, "simulated": simulated},
        )
        project = _gauge(
            "flopledger_project_info",
            "1 for each project; opened is false until a person opened it.",
            ("project", "opened"),
        )
        for one in self._projects:
            project.add_metric((one.info.project, _opened(one)), 1)
        yield project
        yield _single(
            "flopledger_projects_left_out",
            "Projects that only usage named and that this page has no room for.",
            self._left_out_count,
        )


# A budget's own quantity -> what the page calls it, and what its unit is divided by.
BASE_QUANTITIES: Final[dict[str, tuple[str, int]]] = {
    "flop": ("flop", 1),
    "energy_mj": ("energy_joules", MJ_PER_JOULE),
    "gpu_time_ms": ("gpu_seconds", MS_PER_SECOND),
    "cost_cents": ("cost", CENTS_PER_UNIT),
}


def _opened(status: ProjectStatus) -> str:
    return "true" if status.info.opened else "false"


def _gauge(name: str, documentation: str, labels: Iterable[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=tuple(labels))


def _single(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)


def _info(name: str, documentation: str, labels: dict[str, str]) -> GaugeMetricFamily:
    family = _gauge(name, documentation, labels)
    family.add_metric(tuple(labels.values()), 1)
    return family


def _add_bounds(
    family: GaugeMetricFamily, labels: tuple[str, ...], bounds: Bounds, divisor: int = 1
) -> None:
    family.add_metric((*labels, "low"), finite_or_infinite(bounds.low, divisor))
    family.add_metric((*labels, "central"), finite_or_infinite(bounds.central, divisor))
    high = float("inf") if bounds.high is None else finite_or_infinite(bounds.high, divisor)
    family.add_metric((*labels, "high"), high)


def _add_ratios(
    family: GaugeMetricFamily,
    labels: tuple[str, ...],
    low: Fraction,
    central: Fraction,
    high: Fraction | None,
) -> None:
    for bound, share in (("low", low), ("central", central)):
        family.add_metric((*labels, bound), finite_or_infinite(share.numerator, share.denominator))
    top = float("inf") if high is None else finite_or_infinite(high.numerator, high.denominator)
    family.add_metric((*labels, "high"), top)


def _number(amount: int) -> float:
    return finite_or_infinite(amount, 1)


def finite_or_infinite(numerator: int, denominator: int) -> float:
    """The nearest floating-point number; beyond its range, infinity."""
    try:
        return numerator / denominator
    except OverflowError:
        return float("inf")
