"""Fetches the page of a running dcgm-exporter, in a thread of its own; nobody ever waits for it.

It asks one URL with GET and nothing else: collection is the exporter's business, and profiling is
never started from here. Whatever the far end does (drips a byte a second, never ends, says
rubbish), a request ends at its deadline and within its size, and the next one is made all the same.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import urllib.parse
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from flopledger_agent.gpus.dcgm import Page, parse_page
from flopledger_core.errors import FlopLedgerError

if TYPE_CHECKING:
    from flopledger_agent.clocks import Clock
    from flopledger_agent.config import DcgmSection

# 16 GPUs in 7 instances each, 50 fields, 300 bytes a series: under 2 MiB, more with job labels.
# Sixteen GPUs in seven parts with ninety fields each; reading more would take longer than a tick.
SERIES_MAX: Final = 10_000
SERIES_MARK: Final = "\nDCGM_FI_"
PAGE_BYTES_MAX: Final = 8 * 1024 * 1024
OK: Final = 200

log = logging.getLogger("flopledger.agent")


class Scrape(msgspec.Struct, frozen=True, kw_only=True):
    """The newest page that could be read, and why the newest attempt failed, if it did."""

    page: Page | None = None
    page_boot_ns: int = 0  # when the page was fetched
    sequence: int = 0  # counts pages: another number is another page
    failure: str | None = None


class Exporter(Protocol):
    """Something that has the newest page of an exporter at hand."""

    def latest(self) -> Scrape:
        """What is known now; returns at once."""
        ...

    def close(self) -> None:
        """Fetch nothing more."""
        ...


class PageUnreadable(FlopLedgerError):
    """The exporter's page could not be fetched; `reason` is a stable word."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class DcgmScraper:
    """The page behind one URL."""

    def __init__(
        self, config: DcgmSection, clock: Clock, node_name: str, *, bytes_max: int = PAGE_BYTES_MAX
    ) -> None:
        self._config = config
        self._clock = clock
        self._host = config.hostname or node_name
        self._bytes_max = bytes_max
        self._scrape = Scrape()
        self._text = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def latest(self) -> Scrape:
        """What is known now; the first call begins to fetch, in a thread."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._work, name="dcgm", daemon=True)
            self._thread.start()
        return self._scrape

    def close(self) -> None:
        """Fetch nothing more; a request under way ends at its own deadline, unwaited for."""
        self._stop.set()

    def scrape_once(self) -> None:
        """Fetch the page now, in this thread."""
        last = self._scrape
        try:
            text = fetch(self._config.url, self._config.timeout_seconds, self._bytes_max)
            _require_few_series(text)
        except PageUnreadable as error:
            if error.reason != last.failure:
                log.warning("dcgm-exporter: %s", error, extra={"action": "dcgm_unreadable"})
            self._scrape = msgspec.structs.replace(last, failure=error.reason)
            return
        boot_ns = self._clock.boottime_ns()
        page = last.page
        if page is None or text != self._text:
            page, self._text = parse_page(text, self._host), text
        failure = None if page.readings or page.elsewhere else "dcgm_not_an_exporter"
        if failure is None and last.failure is not None:
            log.info("dcgm-exporter answers again", extra={"action": "dcgm_readable"})
        self._scrape = Scrape(
            page=page, page_boot_ns=boot_ns, sequence=last.sequence + 1, failure=failure
        )

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self.scrape_once()
            except Exception:  # nothing may end this thread
                if self._scrape.failure != "unexpected_error":
                    log.exception("dcgm-exporter", extra={"action": "unexpected_error"})
                self._scrape = msgspec.structs.replace(self._scrape, failure="unexpected_error")
            self._stop.wait(self._clock.sleep_seconds(self._config.interval_seconds))


def _require_few_series(text: str) -> None:
    if text.count(SERIES_MARK) > SERIES_MAX:
        raise PageUnreadable("dcgm_page_too_large", f"more than {SERIES_MAX} series")


def fetch(url: str, limit_seconds: float, bytes_max: int) -> str:
    """The text behind a URL, by one GET without redirects or proxies. Errors: PageUnreadable."""
    place = urllib.parse.urlsplit(url)
    kind = _Tls if place.scheme == "https" else _Plain
    connection = kind(place.hostname or "", place.port, timeout=limit_seconds)
    connection.cut = _Cut(limit_seconds)
    target = (place.path or "/") + (f"?{place.query}" if place.query else "")
    try:
        with connection.cut, contextlib.closing(connection):
            connection.request("GET", target, headers={"Accept": "text/plain"})
            response = connection.getresponse()
            if response.status != OK:
                raise PageUnreadable("dcgm_http_error", f"{url} answered {response.status}")
            body = response.read(bytes_max + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if connection.cut.fell or isinstance(error, TimeoutError):
            raise _late(url, limit_seconds) from error
        reason = "dcgm_unreachable" if isinstance(error, OSError) else "dcgm_not_an_exporter"
        raise PageUnreadable(reason, f"{url}: {error!r}") from error
    if connection.cut.fell:  # what was read until then is not the whole page
        raise _late(url, limit_seconds)
    if len(body) > bytes_max:
        raise PageUnreadable("dcgm_page_too_large", f"{url}: more than {bytes_max} bytes")
    return body.decode("utf-8", "replace")


def _late(url: str, limit_seconds: float) -> PageUnreadable:
    return PageUnreadable("dcgm_timeout", f"{url}: no complete page within {limit_seconds:g} s")


class _Cut:
    """Ends a whole request at its deadline, by shutting its connection down.

    A timeout of a socket is one of each single read; this one is of all of them together.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.fell = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(limit_seconds, self._fall)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        """Remember the connection, by a handle of its own: TLS takes the other one over."""
        with self._lock:
            self._socket = connected.dup()
        if self.fell:
            self._fall()

    def _fall(self) -> None:
        with self._lock:
            self.fell = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class _Plain(http.client.HTTPConnection):
    """A connection that its deadline can cut."""

    cut: _Cut

    def connect(self) -> None:
        """Connect (a TLS connection shakes hands after this)."""
        super().connect()
        self.cut.watch(self.sock)


class _Tls(http.client.HTTPSConnection, _Plain):
    """The same below TLS, which verifies the server as usual."""
