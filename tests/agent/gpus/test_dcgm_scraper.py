"""The exporter is asked in a thread of its own; whatever it does, nobody waits for it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.clocks import SystemClock
from flopledger_agent.config import DcgmSection
from flopledger_agent.gpus.dcgm_scraper import DcgmScraper, PageUnreadable, fetch
from flopledger_agent.gpus.nvml_errors import remedy_for
from tests.agent.gpus.exporter import TENSOR, golden, page_server, render

if TYPE_CHECKING:
    from collections.abc import Callable
    from http.server import BaseHTTPRequestHandler

PATIENT_SECONDS = 30.0
IMPATIENT_SECONDS = 0.2


def scraper(url: str, *, timeout_seconds: float = PATIENT_SECONDS, **more: int) -> DcgmScraper:
    """One that asks that URL."""
    config = DcgmSection(url=url, timeout_seconds=timeout_seconds)
    return DcgmScraper(config, SystemClock(), "gpu-node-17", **more)


def wait_until(true: Callable[[], object]) -> None:
    """Poll with a deadline."""
    pause, deadline = threading.Event(), time.monotonic() + PATIENT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_peers_row_15_the_only_request_is_one_get_of_the_configured_url() -> None:
    """No profiling is ever started: nothing else is asked of anybody."""
    with page_server(golden("a100-default-fields")) as server:
        asked = scraper(f"{server.url}?node=1")
        asked.scrape_once()
        asked.scrape_once()

    assert server.requests == ["GET /metrics?node=1"] * 2
    found = asked._scrape
    assert found.page is not None
    assert (len(found.page.readings), found.sequence, found.failure) == (2, 2, None)


def test_the_thread_fetches_and_the_caller_does_not_wait() -> None:
    """The first call starts it and returns at once, even when the exporter does not answer."""
    answered = threading.Event()

    def late(handler: BaseHTTPRequestHandler) -> None:
        answered.wait(PATIENT_SECONDS)
        server.instead = None
        handler.do_GET()  # type: ignore[attr-defined]

    with page_server(golden("a100-default-fields")) as server:
        server.instead = late
        asked = scraper(server.url)
        assert asked.latest().page is None
        wait_until(lambda: server.requests)
        assert asked.latest().page is None
        answered.set()
        wait_until(lambda: asked.latest().page)
        asked.close()


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    pause = threading.Event()
    for _ in range(int(PATIENT_SECONDS / 0.02)):
        handler.wfile.write(b"#")
        handler.wfile.flush()
        pause.wait(0.02)


def silent(handler: BaseHTTPRequestHandler) -> None:
    """Nothing, until the other side gives up."""
    handler.rfile.read(1)


def failing(handler: BaseHTTPRequestHandler) -> None:
    """An error page."""
    handler.send_error(503)


def redirecting(handler: BaseHTTPRequestHandler) -> None:
    """To somewhere nobody configured."""
    handler.send_response(302)
    handler.send_header("Location", "/elsewhere")
    handler.end_headers()


def rubbish(handler: BaseHTTPRequestHandler) -> None:
    """No HTTP."""
    handler.wfile.write(b"\x00\x01 rubbish\r\n\r\n")


@pytest.mark.parametrize(
    ("instead", "reason", "limit_seconds"),
    [
        (drip, "dcgm_timeout", IMPATIENT_SECONDS),
        (silent, "dcgm_timeout", IMPATIENT_SECONDS),
        (failing, "dcgm_http_error", PATIENT_SECONDS),
        (redirecting, "dcgm_http_error", PATIENT_SECONDS),
        (rubbish, "dcgm_not_an_exporter", PATIENT_SECONDS),
    ],
)
def test_whatever_the_far_end_does_has_a_reason_and_an_end(
    instead: Callable[[BaseHTTPRequestHandler], None], reason: str, limit_seconds: float
) -> None:
    """The page before stays known with its age, and the next page is taken by itself."""
    with page_server(golden("a100-default-fields")) as server:
        asked = scraper(server.url, timeout_seconds=PATIENT_SECONDS)
        asked.scrape_once()
        good = asked._scrape
        server.instead = instead
        asked._config = DcgmSection(url=server.url, timeout_seconds=limit_seconds)
        asked.scrape_once()

        assert asked._scrape.failure == reason
        assert remedy_for(reason) is not None
        assert (asked._scrape.page, asked._scrape.page_boot_ns) == (good.page, good.page_boot_ns)

        server.instead = None
        asked._config = DcgmSection(url=server.url, timeout_seconds=PATIENT_SECONDS)
        asked.scrape_once()
        asked.close()  # so that asking what is known starts no thread
        after = asked.latest()
        assert after.failure is None
        assert after.sequence == 2
        assert "GET /elsewhere" not in server.requests


def test_an_exporter_that_is_down_is_unreachable() -> None:
    """Nobody listens: a reason, no exception."""
    with page_server() as server:
        url = server.url
    asked = scraper(url)
    asked.scrape_once()

    assert asked._scrape.failure == "dcgm_unreachable"
    assert remedy_for("dcgm_unreachable") is not None


def test_a_page_has_a_largest_size() -> None:
    """One byte more is refused, so that no page fills the memory."""
    text = golden("a100-default-fields")
    with page_server(text) as server:
        assert fetch(server.url, PATIENT_SECONDS, len(text)) == text
        with pytest.raises(PageUnreadable, match="dcgm_page_too_large"):
            fetch(server.url, PATIENT_SECONDS, len(text) - 1)


def test_a_page_of_more_gpus_than_a_node_has_is_not_read() -> None:
    """Megabytes of devices would cost seconds of CPU each time: refused before it is parsed."""
    line = 'DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{gpu="{0}",UUID="GPU-{0}",Hostname="node"}} 0.5\n'
    with page_server("# a page\n" + "".join(line.format(n) for n in range(10_001))) as server:
        asked = scraper(server.url)
        asked.scrape_once()
        assert asked._scrape.failure == "dcgm_page_too_large"
        assert asked._scrape.page is None


def test_a_page_without_any_gpu_is_no_exporter() -> None:
    """Another program's metrics are said to be that."""
    with page_server("# TYPE up gauge\nup 1\n") as server:
        asked = scraper(server.url)
        asked.scrape_once()
    assert asked._scrape.failure == "dcgm_not_an_exporter"
    assert remedy_for("dcgm_not_an_exporter") is not None


def test_the_thread_survives_whatever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours costs a page, is counted as a failure, and the next page is read."""
    with page_server(render({TENSOR: {"GPU-1": 0.5}})) as server:
        asked = DcgmScraper(
            DcgmSection(url=server.url, interval_seconds=1.0), SystemClock(), "node-1"
        )
        real = DcgmScraper.scrape_once
        calls: list[int] = []

        def broken(self: DcgmScraper) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError
            real(self)

        monkeypatch.setattr(DcgmScraper, "scrape_once", broken)
        asked.latest()
        wait_until(lambda: asked.latest().failure == "unexpected_error" or asked.latest().page)
        wait_until(lambda: asked.latest().page)
        asked.close()
    assert asked.latest().failure is None
