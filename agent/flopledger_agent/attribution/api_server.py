"""Requests to a Kubernetes API server: GET only, with a deadline each, token and CA read anew.

Service account tokens live for an hour and CAs are rotated, so both files are read for every
request. The token goes nowhere but to the configured server: redirects are errors, proxies are not
used, and without TLS it is sent to this machine only. A connection can be cut from another thread.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.errors import FlopLedgerError

if TYPE_CHECKING:
    from collections.abc import Iterator

OK: Final = 200
UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
GONE: Final = 410
TOKEN_BYTES_MAX: Final = 64 * 1024
RETRY_AFTER_SECONDS_MAX: Final = 300
# A peer that vanished without a word is noticed after a minute, in a watch on which nothing moves.
KEEPALIVE_IDLE_SECONDS: Final = 30
KEEPALIVE_INTERVAL_SECONDS: Final = 10
KEEPALIVE_COUNT: Final = 3


class ApiTrouble(FlopLedgerError):
    """A request failed; the sentence names the server and the remedy."""

    def __init__(
        self, sentence: str, *, status: int | None = None, retry_after_seconds: int | None = None
    ) -> None:
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        super().__init__(sentence)


class ApiServer(msgspec.Struct, frozen=True, kw_only=True):
    """Where the API server is and how the agent shows who it is."""

    url: str  # scheme, host, port
    token_file: str | None = None
    ca_file: str | None = None
    timeout_seconds: float = 10.0  # of connecting, and of an answer's first line
    backoff_seconds: float = 4.0  # about the first pause after a failure; later ones double


class Answer:
    """An answer whose body is still to be read."""

    def __init__(self, response: http.client.HTTPResponse, cut: Cut, url: str) -> None:
        self._response = response
        self._cut = cut
        self._url = url

    def body(self, bytes_max: int) -> bytes:
        """The whole body. Errors: ApiTrouble when it is larger, or ends early."""
        try:
            content = self._response.read(bytes_max + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _broken(self._url, error, self._cut) from error
        if self._cut.fell:
            raise _broken(self._url, TimeoutError(), self._cut)
        if len(content) > bytes_max:
            raise ApiTrouble(
                f"the API server {self._url} answers with more than {bytes_max} bytes: is "
                "kubernetes.node_name one node's name?"
            )
        return content

    def lines(self, bytes_max: int) -> Iterator[bytes]:
        """Whole lines as they come, without an end that was cut off. Errors: ApiTrouble."""
        while True:
            try:
                line = self._response.readline(bytes_max + 1)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise _broken(self._url, error, self._cut) from error
            if not line.endswith(b"\n"):
                if len(line) > bytes_max:
                    raise ApiTrouble(
                        f"the API server {self._url} sent a line of more than {bytes_max} bytes"
                    )
                return
            if line.strip():
                yield line


class Cut:
    """Ends a request at its deadline or on demand, by shutting its connection down.

    A timeout of a socket is one of each single read; this one is of all of them together.
    """

    def __init__(self) -> None:
        self.fell = False
        self._closed = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None

    def begin(self, limit_seconds: float) -> None:
        """Let the time run for one request."""
        with self._lock:
            self.fell = self._closed
            self._timer = threading.Timer(limit_seconds, self.fall)
            self._timer.daemon = True
            self._timer.start()

    def watch(self, connected: socket.socket) -> None:
        """Remember the connection, by a handle of its own: TLS takes the other one over."""
        with self._lock:
            self._socket = connected.dup()
            fell = self.fell
        if fell:
            self.fall()

    def fall(self) -> None:
        """End the request under way, if there is one."""
        with self._lock:
            self.fell = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the request under way, and every later one as soon as it connects."""
        with self._lock:
            self._closed = True
        self.fall()

    def end(self) -> None:
        """Forget the request."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._socket is not None:
                self._socket.close()
                self._socket = None


@contextlib.contextmanager
def get(server: ApiServer, target: str, limit_seconds: float, cut: Cut) -> Iterator[Answer]:
    """The answer to one GET, which ends after `limit_seconds` altogether. Errors: ApiTrouble."""
    headers = {"Accept": "application/json", **_credentials(server)}
    connection = _connection(server)
    connection.cut = cut
    cut.begin(limit_seconds)
    try:
        with contextlib.closing(connection):
            try:
                connection.request("GET", target, headers=headers)
                connected = connection.sock
                response = connection.getresponse()
                # From here on only the deadline and the kernel's keepalive end the waiting.
                connected.settimeout(limit_seconds)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise _broken(server.url, error, cut) from error
            if response.status != OK:
                raise _refused(server, target, response)
            yield Answer(response, cut, server.url)
    finally:
        cut.end()


def _connection(server: ApiServer) -> _Plain | _Tls:
    place = urllib.parse.urlsplit(server.url)
    host = place.hostname or ""
    if place.scheme != "https":
        return _Plain(host, place.port, timeout=server.timeout_seconds)
    try:
        context = ssl.create_default_context(cafile=server.ca_file)
    except OSError as error:
        raise ApiTrouble(
            f"the CA file {server.ca_file} cannot be used ({error.strerror or error}): mount the "
            "service account, or set kubernetes.ca_file"
        ) from error
    return _Tls(host, place.port, timeout=server.timeout_seconds, context=context)


def _credentials(server: ApiServer) -> dict[str, str]:
    if server.token_file is None:
        return {}
    place = urllib.parse.urlsplit(server.url)
    if place.scheme != "https" and not _is_here(place.hostname or ""):
        raise ApiTrouble(
            f"the API server {server.url} is not asked, because the token would cross the network "
            "unencrypted: set an https kubernetes.api_url"
        )
    try:
        with Path(server.token_file).open("rb") as file:
            token = file.read(TOKEN_BYTES_MAX).strip().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ApiTrouble(
            f"the token file {server.token_file} cannot be read ({error}): mount the service "
            "account, or set kubernetes.token_file"
        ) from error
    if not token or not token.isprintable():
        raise ApiTrouble(f"the token file {server.token_file} holds no token: mount it anew")
    return {"Authorization": f"Bearer {token}"}


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(server: ApiServer, target: str, response: http.client.HTTPResponse) -> ApiTrouble:
    path, status = target.partition("?")[0], response.status
    remedies = {
        UNAUTHORIZED: f"the token of {server.token_file} is not valid (any more); mount it anew",
        FORBIDDEN: "its account may not list and watch there; apply deploy/kubernetes/rbac.yaml",
        NOT_FOUND: "this server has no such API; switch the source of it off",
    }
    after = response.getheader("Retry-After") or ""
    retry = min(int(after), RETRY_AFTER_SECONDS_MAX) if _is_count(after) else None
    remedy = remedies.get(status)
    return ApiTrouble(
        f"the API server {server.url} answers {status} to {path}"
        + (f": {remedy}" if remedy else ""),
        status=status,
        retry_after_seconds=retry,
    )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _broken(url: str, error: Exception, cut: Cut) -> ApiTrouble:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message or "unknown reason"
        return ApiTrouble(
            f"the certificate of the API server {url} is not trusted ({reason}): name its CA in "
            "kubernetes.ca_file"
        )
    what = (
        "does not answer in time"
        if cut.fell or isinstance(error, TimeoutError)
        else (f"cannot be read ({type(error).__name__})")
    )
    return ApiTrouble(
        f"the API server {url} {what}: check the network policy and kubernetes.api_url"
    )


class _Plain(http.client.HTTPConnection):
    """A connection that can be cut, and that notices a peer that vanished."""

    cut: Cut

    def connect(self) -> None:
        """Connect (a TLS connection shakes hands after this)."""
        super().connect()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS),
            (socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS),
            (socket.TCP_KEEPCNT, KEEPALIVE_COUNT),
        ):
            self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.cut.watch(self.sock)


class _Tls(http.client.HTTPSConnection, _Plain):
    """The same below TLS, which verifies the server as usual."""
