"""A tiny web server for golden pages, whose counters count: each scrape finds them one higher."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

PAGES: Final = Path(__file__).parent / "pages"
_COUNTER: Final = re.compile(r"(?m)^(\w+_(?:total|count|sum)(?:\{[^}]*\})?) (\S+)$")
_STOP_SECONDS: Final = 10.0


def page(name: str, scrapes: int = 0) -> str:
    """A golden page as a scraper finds it after so many scrapes."""
    text = (PAGES / f"{name}.prom").read_text(encoding="utf-8")
    return _COUNTER.sub(lambda line: f"{line[1]} {float(line[2]) + scrapes!r}", text)


@contextmanager
def serving(name: str) -> Iterator[str]:
    """Serve one golden page under /metrics; yields `host:port`."""
    scrapes = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal scrapes
            scrapes += 1
            body = page(name, scrapes).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (base class)
            """Scrapes are not news."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=_STOP_SECONDS)
