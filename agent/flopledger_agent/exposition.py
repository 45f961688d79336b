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
from flopledger_core.units import MJ_PER_JOULE, NS_PER_MS, NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from flopledger_agent.loop import View
    from flopledger_agent.meters import MeterCounts
    from flopledger_core.accelerators import AcceleratorTable

PAGE: Final = b"""<!doctype html><meta charset="utf-8"><title>flopledger-agent</title>
<h1>flopledger-agent</h1><p><a href="/metrics">metrics</a></p>
"""
TEXT: Final = "text/plain; charset=utf-8"
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
        counts: Callable[[], MeterCounts],
        shipping: Callable[[], ShippingCounts],
        ticks: Callable[[], tuple[int, float]],
        table: AcceleratorTable,
        version: str,
        simulated: bool,
    ) -> None:
        self._view = view
        self._counts = counts
        self._shipping = shipping
        self._ticks = ticks
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
        yield from self._agent_families()

    def _device_families(self, counts: MeterCounts) -> Iterator[Metric]:
        energy = CounterMetricFamily(
            "flopledger_gpu_energy_joules",
            "Energy metered from the device's own counter since the agent started.",
            labels=["gpu_uuid", "accelerator"],
        )
        for device, energy_mj in counts.energy_mj.items():
            energy.add_metric([device.key, self._accelerator(device)], energy_mj / MJ_PER_JOULE)
        yield energy
        cycles = CounterMetricFamily(
            "flopledger_gpu_pipe_cycles",
            "SM-cycles metered since the agent started, summed over SMs: elapsed, or pipe active.",
            labels=["gpu_uuid", "pipe"],
        )
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for key, value in counts.cycles.items():
            for pipe, amount in value.as_dict().items():
                if amount is not None:
                    sums[key.device.key, pipe] += amount
        for (device_key, pipe), amount in sums.items():
            cycles.add_metric([device_key, pipe], amount)
        yield cycles
        seconds = CounterMetricFamily(
            "flopledger_gpu_seconds",
            "Device time metered since the agent started, by kind of owner.",
            labels=["gpu_uuid", "owner_kind"],
        )
        for (device, kind), time_ns in counts.time_ns.items():
            seconds.add_metric([device.key, kind], time_ns / NS_PER_SECOND)
        yield seconds
        dark = CounterMetricFamily(
            "flopledger_gpu_gap_seconds",
            "Device time in which no activity counter could be read, by reason.",
            labels=["gpu_uuid", "reason"],
        )
        for (device, reason), time_ns in counts.dark_ns.items():
            dark.add_metric([device.key, reason], time_ns / NS_PER_SECOND)
        yield dark
        errors = CounterMetricFamily(
            "flopledger_gpu_sample_errors",
            "Ticks in which a device could not be sampled, by reason.",
            labels=["gpu_uuid", "reason"],
        )
        for (uuid, reason), number in counts.failures.items():
            errors.add_metric([uuid, reason], number)
        yield errors
        last = GaugeMetricFamily(
            "flopledger_gpu_last_sample_timestamp_seconds",
            "When the device last answered; a standing value means it does not.",
            labels=["gpu_uuid"],
        )
        for device, unix_ns in counts.last_sample_unix_ns.items():
            last.add_metric([device.key], unix_ns / NS_PER_SECOND)
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
