"""The composition root of the collector's server: what is built, in which order, and let go again.

Agents post batches; people and programs read. Every answer that is no page is JSON or Prometheus
text, every refusal one sentence with its remedy, and nothing a client sends makes the server
fail. It listens on one address, keeps no session and trusts no header about who is calling.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import msgspec
import uvicorn
from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.types import ASGIApp, Receive, Scope, Send

from flopledger_collector.config import CollectorConfig
from flopledger_collector.errors import (
    CollectorError,
    ConfigInvalid,
    RequestRefused,
)
from flopledger_collector.handle import LedgerHandle, open_ledger
from flopledger_collector.status import load_rules
from flopledger_collector.web import api, page_routes
from flopledger_collector.web.ingest_route import post_batches
from flopledger_collector.web.surface import Surface
from flopledger_core import __version__
from flopledger_core.errors import InvalidInput, UnknownName

LOGGER: Final = logging.getLogger("flopledger_collector")
CONNECTIONS_MAX: Final = 4096  # agents send once a minute; a relay keeps one connection
BACKLOG: Final = 2048  # connections the kernel holds while a commit runs
HEADER_BYTES_MAX: Final = 64 * 1024  # of one request's line and headers
KEEP_ALIVE_SECONDS: Final = 75  # above an agent's minute, so that its connection is found open
SHUTDOWN_SECONDS: Final = 20  # what is being answered when the signal comes may finish
RETRY_AFTER_SECONDS: Final = "5"
REFUSAL_STATUS: Final[dict[str, int]] = {
    "too_large": 413,
    "unsupported_encoding": 415,
    "malformed": 400,
}
SHUTDOWN_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

AnyRequest = Request[Any, Any, Any]


def create_app(
    handle: LedgerHandle, *, monotonic_ns: Callable[[], int] = time.monotonic_ns
) -> ASGIApp:
    """The ASGI application over an open ledger; whoever opened the ledger closes it."""
    config = handle.config
    rules = load_rules(
        config.policies.adopted,
        policy_directory=config.policies.path,
        instrument_directory=config.instruments.path,
    )
    surface = Surface(handle, rules, monotonic_ns=monotonic_ns)

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        try:
            yield
        finally:
            surface.close()

    app = Litestar(
        route_handlers=[post_batches, *api.HANDLERS, *page_routes.HANDLERS],
        lifespan=[lifespan],
        exception_handlers={
            HTTPException: _http_refusal,
            InvalidInput: _invalid,
            CollectorError: _unavailable,
            Exception: _unexpected,
        },
        openapi_config=OpenAPIConfig(
            title="FlopLedger collector",
            version=__version__,
            path="/schema",
            render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"])],
        ),
        request_max_body_size=None,  # the ingest route has limits of its own; no other reads bodies
        logging_config=None,
        debug=False,
    )
    app.state.surface = surface
    return whole_segments(app)


def whole_segments(app: ASGIApp) -> ASGIApp:
    """Route on the path as it was sent, so that `%2F` inside a project id stays in its segment."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope["type"]) == "http":
            raw_path: bytes = scope["raw_path"]
            scope["path"] = raw_path.partition(b"?")[0].decode("ascii", "replace")
        await app(scope, receive, send)

    return routed


def _sentence(request: AnyRequest, status_code: int, sentence: str) -> Response[bytes]:
    """A refusal: a page where a person was looking at pages, JSON everywhere else."""
    surface: Surface = request.app.state.surface
    if request.scope["path"].startswith("/projects/"):
        return page_routes.html(surface.pages.problem(sentence), status_code)
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if status_code == 503 else {}
    return Response(
        msgspec.json.encode({"error": sentence}),
        status_code=status_code,
        media_type="application/json",
        headers=headers,
    )


def _http_refusal(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    path = request.scope["path"]
    if error.status_code == 404:
        return _sentence(request, 404, f"path is {path!r}: nothing is there; see /schema")
    if error.status_code == 405:
        sentence = f"method is {request.method}: this path answers another one; see /schema"
        return _sentence(request, 405, sentence)
    if isinstance(error, ValidationException):
        return _sentence(request, 400, _invalid_parameters(error))
    return _sentence(request, error.status_code, str(error.detail))


def _invalid_parameters(error: ValidationException) -> str:
    """The parameters that are wrong, each with what is wrong about it."""
    found = error.extra if isinstance(error.extra, list) else []
    parts = [f"{one.get('key', 'request')}: {one.get('message', 'invalid')}" for one in found]
    return "; ".join(parts) or str(error.detail)


def _invalid(request: AnyRequest, error: InvalidInput) -> Response[bytes]:
    if isinstance(error, RequestRefused):
        return _sentence(request, REFUSAL_STATUS[error.kind], str(error))
    is_missing = isinstance(error, UnknownName) and error.field == "project"
    return _sentence(request, 404 if is_missing else 400, str(error))


def _unavailable(request: AnyRequest, error: CollectorError) -> Response[bytes]:
    LOGGER.warning("%s", error, extra={"action": "request_unavailable"})
    return _sentence(request, 503, str(error))


def _unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    LOGGER.error(
        "a request failed unexpectedly", exc_info=error, extra={"action": "request_failed"}
    )
    return _sentence(request, 500, "the collector failed; its log says why")


# --- the server -----------------------------------------------------------------------------------


def serve(config: CollectorConfig, ready: Callable[[str, LedgerHandle], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is being answered and close the ledger.

    `ready` is called with the URL once the address is bound and the ledger is open. Raises
    `ConfigInvalid` when the address cannot be had.
    """
    listener = bind(config.web.listen_address)
    with listener, open_ledger(config) as handle, _quiet_signals():
        handle.folder.start()
        ready(url_of(listener), handle)
        uvicorn.Server(server_config(create_app(handle))).run(sockets=[listener])


def server_config(app: ASGIApp) -> uvicorn.Config:
    """The server with explicit limits; it changes no logging and believes no proxy."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="on",
        ws="none",
        http="h11",
        limit_concurrency=CONNECTIONS_MAX,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
    )


def bind(address: str) -> socket.socket:
    """A listening socket on `host:port`; port 0 takes a free one."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigInvalid(
            "web.listen_address", address, f"it cannot be listened on ({error.strerror or error})"
        ) from error


def url_of(listener: socket.socket) -> str:
    """Where people reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _quiet_signals() -> Iterator[None]:
    """A stop signal ends the server and then nothing more.

    uvicorn raises the signal again once it has stopped; without a handler of ours that would kill
    the process before the ledger is closed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _ignored) for number in SHUTDOWN_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignored(_number: int, _frame: object) -> None:
    """Nothing: uvicorn's own handler does the work while the server runs."""
