"""The agent's Prometheus page: served from memory, never from the driver.

Names and labels are a contract (docs/reference/metrics.md). Identity of jobs is an info metric to
join with, never a label on device series. A device that cannot be read keeps its last values, its
timestamp stands still, and its errors count up; it never reads zero.
"""

from __future__ import annotations

from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from flopledger_core.flop import basis_of_cycles, total_work, work
from flopledger_core.units import MJ_PER_JOULE, MS_PER_SECOND, NS_PER_MS, NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

    from flopledger_agent.attribution.schedulers import SchedulerFindings
    from flopledger_agent.gpus.supervisor import WorkerCounts
    from flopledger_agent.host.counters import HostCounts
    from flopledger_agent.loop import View
    from flopledger_agent.meters import MeterCounts
    from flopledger_core.accelerators import AcceleratorTable

PAGE: Final = b"""<!doctype html><meta charset="utf-8"><title>flopledger-agent</title>
<h1>flopledger-agent</h1><p><a href="/metrics">metrics</a></p>
"""
TEXT: Final = "text/plain; charset=utf-8"
UJ_PER_JOULE: Final = 1_000_000
REQUEST_TIMEOUT_SECONDS: Final = 10  # a scraper that stops reading holds a thread this long


class ShippingCounts:
    """What the page shows of the spool and the shipper, copied under their lock."""

    def __init__(  # noqa: PLR0913 (one figure an argument, named at the call)
        self,
        *,
        batches: int,
        size_bytes: int,
        oldest_age_seconds: float,
        quarantined: int,
        shipped: int,
        failures: dict[str, int],
        blocked_streams: int,
    ) -> None:
        self.batches = batches
        self.size_bytes = size_bytes
        self.oldest_age_seconds = oldest_age_seconds
        self.quarantined = quarantined
        self.shipped = shipped
        self.failures = failures
        self.blocked_streams = blocked_streams


class AgentExposition:
    """Turns the loop's view and counters into metric families (a prometheus_client collector)."""

    def __init__(  # noqa: PLR0913 (one source of figures an argument, named at the call)
        self,
        *,
        view: Callable[[], View],
        host: Callable[[], HostCounts | None],
        counts: Callable[[], MeterCounts],
        shipping: Callable[[], ShippingCounts],
        ticks: Callable[[], tuple[int, float]],
        workers: Callable[[], WorkerCounts],
        allocations: Callable[[], SchedulerFindings],
        table: AcceleratorTable,
        version: str,
        simulated: bool,
    ) -> None:
        self._view = view
        self._host = host
        self._counts = counts
        self._shipping = shipping
        self._ticks = ticks
        self._workers = workers
        self._allocations = allocations
        self._table = table
        self._version = version
        self._simulated = simulated
        self._shown_flop: dict[tuple[str, str], int] = {}

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape; naming none keeps registration free of I/O."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every family of the page."""
        counts = self._counts()
        yield from self._device_families(counts)
        yield self._flop_family(counts)
        yield from self._view_families()
        yield from self._host_families()
        yield from self._agent_families()

    def _device_families(self, counts: MeterCounts) -> Iterator[Metric]:
        energy = CounterMetricFamily(
            "flopledger_gpu_energy_joules",
            "Energy since the agent started: the device's counter, else integrated power.",
            labels=["gpu_uuid", "accelerator"],
        )
        joules = (
            ((device.key, self._accelerator(device)), amount)
            for device, amount in counts.energy_mj.items()
        )
        _add_sums(energy, joules, MJ_PER_JOULE)
        yield energy
        yield _energy_check_family(counts)
        cycles = CounterMetricFamily(
            "flopledger_gpu_pipe_cycles",
            "SM-cycles metered since the agent started, summed over SMs: elapsed, or pipe active.",
            labels=["gpu_uuid", "pipe"],
        )
        pipes = (
            ((key.device.key, pipe), amount)
            for key, value in counts.cycles.items()
            for pipe, amount in value.as_dict().items()
            if amount is not None
        )
        _add_sums(cycles, pipes)
        yield cycles
        seconds = CounterMetricFamily(
            "flopledger_gpu_seconds",
            "Device time metered since the agent started, by kind of owner.",
            labels=["gpu_uuid", "owner_kind"],
        )
        times = (((device.key, kind), ns) for (device, kind), ns in counts.time_ns.items())
        _add_sums(seconds, times, NS_PER_SECOND)
        yield seconds
        dark = CounterMetricFamily(
            "flopledger_gpu_gap_seconds",
            "Device time in which no activity counter could be read, by reason.",
            labels=["gpu_uuid", "reason"],
        )
        gaps = (((device.key, reason), ns) for (device, reason), ns in counts.dark_ns.items())
        _add_sums(dark, gaps, NS_PER_SECOND)
        yield dark
        errors = CounterMetricFamily(
            "flopledger_gpu_sample_errors",
            "Ticks in which a device could not be sampled, by reason.",
            labels=["gpu_uuid", "reason"],
        )
        for (uuid, reason), number in counts.failures.items():
            errors.add_metric([uuid, reason], number)
        yield errors
        xids = CounterMetricFamily(
            "flopledger_agent_gpu_xid_errors",
            "XID errors the driver reported of a device since the agent started.",
            labels=["gpu_uuid", "xid"],
        )
        for (device_key, xid), number in counts.xids.items():
            xids.add_metric([device_key, xid], number)
        yield xids
        last = GaugeMetricFamily(
            "flopledger_gpu_last_sample_timestamp_seconds",
            "When the device last answered; a standing value means it does not.",
            labels=["gpu_uuid"],
        )
        newest = sorted(counts.last_sample_unix_ns.items(), key=lambda item: item[1])
        for device_key, unix_ns in {device.key: ns for device, ns in newest}.items():
            last.add_metric([device_key], unix_ns / NS_PER_SECOND)
        yield last

    def _flop_family(self, counts: MeterCounts) -> Metric:
        family = CounterMetricFamily(
            "flopledger_gpu_executed_flop",
            "Executed FLOP since the agent started: an estimate from pipe cycles, with bounds.",
            labels=["gpu_uuid", "accelerator", "bound"],
        )
        by_device: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for key, cycles in counts.cycles.items():
            row = self._table.find(key.device.name, key.device.pci_device_id)
            done = work(
                basis_of_cycles(cycles, key.tier, counts.counted_ns[key] // NS_PER_MS),
                table=self._table,
                accelerator=row,
                device_name=key.device.name,
                precision=key.precision,
            )
            by_device[key.device.key, self._accelerator(key.device)].append(done)
        for (device_key, accelerator), parts in by_device.items():
            flop = total_work(parts).flop
            for bound in ("low", "central", "high"):
                amount: int | None = getattr(flop, bound)
                if amount is not None:
                    shown = max(amount, self._shown_flop.get((device_key, bound), 0))
                    self._shown_flop[device_key, bound] = shown
                    family.add_metric([device_key, accelerator, bound], shown)
        return family

    def _view_families(self) -> Iterator[Metric]:
        view = self._view()
        info = GaugeMetricFamily(
            "flopledger_gpu_info",
            "Each device now seen, with the tier of its counters.",
            labels=["gpu_uuid", "accelerator", "tier"],
        )
        jobs = GaugeMetricFamily(
            "flopledger_job_info",
            "Who holds each device now; join it to device series by gpu_uuid.",
            labels=["gpu_uuid", "project", "activity", "run", "job_id"],
        )
        samples = () if view.sample is None else view.sample.samples
        for sample in samples:
            device = sample.device
            info.add_metric([device.key, self._accelerator(device), sample.tier], 1)
            seen: set[tuple[str, ...]] = set()
            for claim in view.claims.get(device.key, ()):
                owner = claim.owner
                labels = (owner.account, owner.activity, owner.run or "", owner.job or "")
                if labels not in seen:
                    seen.add(labels)
                    jobs.add_metric([device.key, *labels], 1)
        yield info
        yield jobs
        sealed = CounterMetricFamily(
            "flopledger_agent_sealed_batches", "Batches sealed since the agent started."
        )
        sealed.add_metric([], view.sealed_batches)
        yield sealed
        window = GaugeMetricFamily(
            "flopledger_agent_window_seconds",
            "Width of measurement windows; it grows when the spool fills.",
        )
        window.add_metric([], view.window_minutes * 60)
        yield window
        blocked = GaugeMetricFamily(
            "flopledger_agent_sealing_blocked",
            "1 while windows cannot be sealed: the spool or the disk is full; the log says why.",
        )
        blocked.add_metric([], float(view.last_error is not None))
        yield blocked
        yield from _pause_families(view)

    def _host_families(self) -> Iterator[Metric]:
        """The node itself; nothing where it is not metered."""
        counts = self._host()
        if counts is None:
            return
        cpu = CounterMetricFamily(
            "flopledger_agent_host_cpu_seconds",
            "CPU time of the node metered since the agent started, by kind of owner.",
            labels=["owner_kind"],
        )
        for kind, cpu_ns in counts.cpu_ns.items():
            cpu.add_metric([kind], cpu_ns / NS_PER_SECOND)
        yield cpu
        energy = CounterMetricFamily(
            "flopledger_agent_host_energy_joules",
            "Energy of the node metered since the agent started; boundaries contain each other.",
            labels=["boundary"],
        )
        for boundary, energy_uj in counts.energy_uj.items():
            energy.add_metric([boundary], energy_uj / UJ_PER_JOULE)
        yield energy
        absent = GaugeMetricFamily(
            "flopledger_agent_host_absent",
            "1 for each quantity of the node that is not metered now, with the reason.",
            labels=["quantity", "reason"],
        )
        for quantity, reason in counts.absent.items():
            absent.add_metric([quantity, reason], 1)
        yield absent
        last = GaugeMetricFamily(
            "flopledger_agent_host_last_sample_timestamp_seconds",
            "When the node itself was sampled last.",
        )
        if counts.last_sample_unix_ns is not None:
            last.add_metric([], counts.last_sample_unix_ns / NS_PER_SECOND)
        yield last

    def _agent_families(self) -> Iterator[Metric]:
        shipping = self._shipping()
        gauges = (
            ("flopledger_agent_spool_batches", "Sealed batches waiting.", shipping.batches),
            (
                "flopledger_agent_spool_bytes",
                "Bytes of sealed batches waiting.",
                shipping.size_bytes,
            ),
            (
                "flopledger_agent_spool_oldest_age_seconds",
                "Age of the oldest batch waiting.",
                shipping.oldest_age_seconds,
            ),
            (
                "flopledger_agent_spool_quarantined_files",
                "Files moved aside because they are no batches.",
                shipping.quarantined,
            ),
            (
                "flopledger_agent_blocked_streams",
                "Streams the collector does not take; the log says why.",
                shipping.blocked_streams,
            ),
            ("flopledger_agent_simulated", "1 when GPUs or time are simulated.", self._simulated),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], float(value))
            yield gauge
        shipped = CounterMetricFamily(
            "flopledger_agent_shipped_batches", "Batches the collector confirmed as durable."
        )
        shipped.add_metric([], shipping.shipped)
        yield shipped
        failures = CounterMetricFamily(
            "flopledger_agent_ship_failures",
            "Requests or batches without a durable answer, by reason.",
            labels=["reason"],
        )
        for reason, number in {"unreachable": 0, **shipping.failures}.items():
            failures.add_metric([reason], number)
        yield failures
        yield from _worker_families(self._workers())
        yield from _allocation_families(self._allocations())
        number, seconds = self._ticks()
        yield SummaryMetricFamily(
            "flopledger_agent_tick_duration_seconds",
            "Real time one tick takes, driver included.",
            count_value=number,
            sum_value=seconds,
        )
        build = GaugeMetricFamily(
            "flopledger_agent_build_info", "The running version.", labels=["version"]
        )
        build.add_metric([self._version], 1)
        yield build

    def _accelerator(self, device: Any) -> str:  # noqa: ANN401 (core Device; avoids a runtime import)
        row = self._table.find(device.name, device.pci_device_id)
        return device.name if row is None else row.key


def _energy_check_family(counts: MeterCounts) -> Metric:
    """What counter and sampled power said of the same time."""
    check = CounterMetricFamily(
        "flopledger_agent_energy_cross_check_joules",
        "Energy of the same time by the device's counter and by integrated power.",
        labels=["gpu_uuid", "method"],
    )
    checks = (((device.key, how), mj) for (device, how), mj in counts.energy_check_mj.items())
    _add_sums(check, checks, MJ_PER_JOULE)
    return check


def _pause_families(view: View) -> Iterator[Metric]:
    """Whether somebody paused the metering, who, and for how long still."""
    paused = GaugeMetricFamily(
        "flopledger_agent_paused", "1 while metering is paused and its time becomes gaps."
    )
    paused.add_metric([], float(view.pause is not None))
    yield paused
    left = GaugeMetricFamily(
        "flopledger_agent_pause_remaining_seconds", "How long the pause goes on; 0 without one."
    )
    left.add_metric([], view.pause_left_ms / MS_PER_SECOND)
    yield left
    info = GaugeMetricFamily(
        "flopledger_agent_pause_info",
        "1 while metering is paused, with who did it.",
        labels=["user"],
    )
    if view.pause is not None:
        info.add_metric([view.pause.by], 1)
    yield info


def _worker_families(workers: WorkerCounts) -> Iterator[Metric]:
    """The processes that talk to the driver."""
    for name, text, value in (
        (
            "flopledger_agent_driver_workers",
            "Processes that read the driver now; more than one while a GPU is read apart.",
            workers.running_workers,
        ),
        (
            "flopledger_agent_driver_workers_abandoned",
            "Processes that were ended and still sleep in the driver.",
            workers.abandoned_workers,
        ),
    ):
        gauge = GaugeMetricFamily(name, text)
        gauge.add_metric([], float(value))
        yield gauge
    restarts = CounterMetricFamily(
        "flopledger_agent_driver_worker_restarts",
        "Driver workers that were replaced, by reason.",
        labels=["reason"],
    )
    for reason, number in {"died": 0, "hung": 0, **workers.restarts}.items():
        restarts.add_metric([reason], number)
    yield restarts


def _allocation_families(findings: SchedulerFindings) -> Iterator[Metric]:
    """What `check` would say of the schedulers, counted."""
    for name, text, told in (
        (
            "flopledger_agent_allocation_troubles",
            "What keeps schedulers from being heard now; flopledger-agent check names each.",
            findings.troubles,
        ),
        (
            "flopledger_agent_allocation_ghosts",
            "Allocations left behind, which hold nothing; flopledger-agent check names each.",
            findings.ghosts,
        ),
    ):
        gauge = GaugeMetricFamily(name, text)
        gauge.add_metric([], len(told))
        yield gauge


def _add_sums(
    family: CounterMetricFamily, amounts: Iterable[tuple[tuple[str, ...], int]], divisor: int = 1
) -> None:
    """One series for each set of labels: a GPU that was divided anew is one key, then and now."""
    sums: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, amount in amounts:
        sums[labels] += amount
    for labels, amount in sums.items():
        family.add_metric(list(labels), amount if divisor == 1 else amount / divisor)


def make_server(
    exposition: AgentExposition, address: tuple[str, int], trouble: Callable[[], str | None]
) -> ThreadingHTTPServer:
    """A bound but not yet serving HTTP server; `trouble` says why the agent is not well, or None.

    Raises OSError when the address cannot be bound.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(exposition)

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            """Serve the page, or say what there is."""
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path == "/healthz":
                sentence = trouble()
                status = 200 if sentence is None else 503
                self._answer(status, TEXT, f"{sentence or 'ok'}\n".encode())
            elif path == "/":
                self._answer(200, "text/html; charset=utf-8", PAGE)
            else:
                self._answer(404, TEXT, b"not here: see /metrics\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (base class)
            """Scrapes are not news."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    return Server(address, Handler)
