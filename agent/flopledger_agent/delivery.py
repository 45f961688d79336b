"""The wire to the collector: plain HTTP requests with one deadline each, nothing remembered.

It only moves bytes: what an answer means is the shipper's business. Whatever the far end does
(answers rubbish, drips a byte a second, says nothing), a request ends within its limit as an answer
or as `CollectorUnreachable`. Redirects are never followed; a proxy named by the usual environment
variables (`http_proxy`, `https_proxy`, `no_proxy`) is used.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

import msgspec

from flopledger_agent.errors import CollectorUnreachable
from flopledger_agent.shipper import Answers
from flopledger_core.batch import MEDIA_TYPE

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024  # answers are about 300 bytes a batch
DETAIL_BYTES_MAX: Final = 2048  # of an error page, for the log
LIMIT_SECONDS_MIN: Final = 0.05  # a limit of zero would mean "do not wait", not "do not try"


class LedgerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the collector says about its ledger."""

    ledger_id: str


class Collector(Protocol):
    """The far end, as the agent needs it."""

    def ledger_id(self, *, limit_seconds: float | None = None) -> str:
        """The ledger that batches will be posted to; raises `CollectorUnreachable`."""
        ...

    def send(self, content: bytes, *, limit_seconds: float | None = None) -> Answers:
        """Send batches and return the answers; raises `CollectorUnreachable`."""
        ...


class HttpCollector:
    """A collector behind a URL."""

    def __init__(self, url: str, timeout_seconds: float, agent: str) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds  # for a whole request, from connecting to reading
        self._agent = agent

    def ledger_id(self, *, limit_seconds: float | None = None) -> str:
        """GET /v1/ledger, within the shorter of the two limits."""
        return self._ask("/v1/ledger", None, LedgerInfo, limit_seconds).ledger_id

    def send(self, content: bytes, *, limit_seconds: float | None = None) -> Answers:
        """POST /v1/batches, within the shorter of the two limits."""
        return self._ask("/v1/batches", content, Answers, limit_seconds)

    def _ask(
        self, path: str, content: bytes | None, kind: type[T], limit_seconds: float | None
    ) -> T:
        limit = self._timeout_seconds if limit_seconds is None else limit_seconds
        limit = max(LIMIT_SECONDS_MIN, min(limit, self._timeout_seconds))
        place = self._url + path
        with _Deadline(limit) as deadline:
            try:
                body = self._exchange(place, content, deadline)
            except (OSError, ValueError, http.client.HTTPException) as error:
                if deadline.passed:
                    raise _late(place, limit) from error
                if isinstance(error, OSError):
                    reason = getattr(error, "reason", error)
                    raise CollectorUnreachable("unreachable", f"{place}: {reason}") from error
                raise CollectorUnreachable(
                    "not_a_collector", f"{place} does not speak HTTP: {error!r}"
                ) from error
            if deadline.passed:  # what was read until then is not the whole answer
                raise _late(place, limit)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CollectorUnreachable(
                "not_a_collector", f"{place} is no collector's answer: {error}"
            ) from error

    def _exchange(self, place: str, content: bytes | None, deadline: _Deadline) -> bytes:
        request = urllib.request.Request(  # noqa: S310 (the configuration allows http and https only)
            place,
            data=content,
            headers={"User-Agent": self._agent, "Content-Type": MEDIA_TYPE},
        )
        opener = urllib.request.build_opener(
            _NoRedirects, _HttpHandler(deadline), _HttpsHandler(deadline)
        )
        try:
            with opener.open(request, timeout=deadline.limit_seconds) as response:
                body: bytes = response.read(ANSWER_BYTES_MAX)
                return body
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(DETAIL_BYTES_MAX).decode("utf-8", "replace").strip()
            if deadline.passed:
                raise
            raise CollectorUnreachable(
                f"http_{error.code}", f"{place} answered {error.code}: {detail}"
            ) from error


def _late(place: str, limit_seconds: float) -> CollectorUnreachable:
    return CollectorUnreachable(
        "timeout", f"{place}: no complete answer within {limit_seconds:g} seconds"
    )


class _Deadline:
    """Ends a request when its time is up, by shutting down its connection.

    A timeout of a socket is one of each single read; this one is of all of them together.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.passed = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(limit_seconds, self._end)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        """Remember a connection, by a handle of its own: TLS takes the other one over."""
        with self._lock:
            self._sockets.append(connected.dup())
        if self.passed:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for one in self._sockets:
                one.close()
            self._sockets.clear()


class _Watched(http.client.HTTPConnection):
    """A connection that its deadline can end."""

    deadline: _Deadline

    def connect(self) -> None:
        """Connect (a TLS connection shakes hands after this)."""
        super().connect()
        self.deadline.watch(self.sock)


class _WatchedTls(http.client.HTTPSConnection, _Watched):
    """The same below TLS: the handshake counts too, because `super().connect()` comes first."""


class _HttpHandler(urllib.request.HTTPHandler):
    """Opens watched connections."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open plain HTTP."""
        return self.do_open(_maker(_Watched, self._deadline), req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    """Opens watched TLS connections, which verify the server as usual."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open HTTPS."""
        return self.do_open(_maker(_WatchedTls, self._deadline), req)


def _maker(kind: type[_Watched], deadline: _Deadline) -> Any:  # noqa: ANN401 (urllib's own protocol)
    def make(host: str, **options: Any) -> _Watched:  # noqa: ANN401
        connection = kind(host, **options)
        connection.deadline = deadline
        return connection

    return make


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry signed batches to somewhere nobody configured."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        """Refuse."""
        return
