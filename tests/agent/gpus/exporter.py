"""A dcgm-exporter for tests: pages in the exporter's own form, and a real HTTP server of them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from flopledger_agent.gpus.dcgm import parse_page
from flopledger_agent.gpus.dcgm_scraper import Scrape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.agent.sampling import TestClock

PAGES = Path(__file__).parents[2] / "golden" / "dcgm"
TENSOR = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"
ENGINE = "DCGM_FI_PROF_GR_ENGINE_ACTIVE"
SM_ACTIVE = "DCGM_FI_PROF_SM_ACTIVE"
UTIL = "DCGM_FI_DEV_GPU_UTIL"
ENERGY = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"


def golden(name: str) -> str:
    """One of the pages under tests/golden/dcgm."""
    return (PAGES / f"{name}.txt").read_text(encoding="utf-8")


def render(values: Mapping[str, Mapping[str, object]], host: str = "node-1") -> str:
    """A page: metric -> UUID (with `/instance` for a GPU instance) -> value.

    Floats have six digits and integers none, as the exporter prints them.
    """
    lines: list[str] = []
    for metric, series in values.items():
        lines += [f"# HELP {metric} .", f"# TYPE {metric} gauge"]
        for gpu, (device, value) in enumerate(series.items()):
            uuid, _, instance = device.partition("/")
            mig = f',GPU_I_PROFILE="1g.10gb",GPU_I_ID="{instance}"' if instance else ""
            text = f"{value:f}" if isinstance(value, float) else str(value)
            lines.append(
                f'{metric}{{gpu="{gpu}",UUID="{uuid}",pci_bus_id="00000000:07:00.0",'
                f'device="nvidia{gpu}",modelName="NVIDIA A100-SXM4-80GB"{mig},'
                f'Hostname="{host}",DCGM_FI_DRIVER_VERSION="580.65.06"}} {text}'
            )
    return "\n".join(lines) + "\n"


class ScriptedExporter:
    """Has the page it is given, as of the clock's now."""

    def __init__(self, clock: TestClock) -> None:
        self._clock = clock
        self._scrape = Scrape()
        self.closed = False

    def show(self, text: str, host: str = "node-1") -> None:
        """A page was fetched."""
        self._scrape = Scrape(
            page=parse_page(text, host),
            page_boot_ns=self._clock.boottime_ns(),
            sequence=self._scrape.sequence + 1,
        )

    def fail(self, reason: str) -> None:
        """The newest attempt failed; the page before stays known."""
        last = self._scrape
        self._scrape = Scrape(
            page=last.page, page_boot_ns=last.page_boot_ns, sequence=last.sequence, failure=reason
        )

    def latest(self) -> Scrape:
        """What is known."""
        return self._scrape

    def close(self) -> None:
        """Nothing more."""
        self.closed = True


class PageServer:
    """Serves whatever `answer` says on loopback, and remembers what was asked."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.text = ""
        self.instead: Callable[[BaseHTTPRequestHandler], None] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def do_GET(self) -> None:
                outer.requests.append(f"{self.command} {self.path}")
                if outer.instead is not None:
                    outer.instead(self)
                    return
                body = outer.text.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/metrics"


@contextmanager
def page_server(text: str = "") -> Iterator[PageServer]:
    """A server that is gone at the end."""
    served = PageServer()
    served.text = text
    thread = threading.Thread(target=served.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        served.server.server_close()
        thread.join(10)
