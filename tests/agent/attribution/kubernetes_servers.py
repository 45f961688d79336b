"""Real servers that speak kubelet's and the API server's protocols and say what a test wants."""

from __future__ import annotations

import datetime as dt
import functools
import ipaddress
import json
import socket
import socketserver
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import grpc  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOLDEN = Path(__file__).parents[2] / "golden" / "kubelet"
NODE = "node-1"
_TYPES = {"string": 9, "int64": 3, "uint64": 4}
_MESSAGE = 11


@functools.cache
def messages() -> dict[str, Any]:
    """The API's messages by name, made by the protobuf library from their description."""
    file = descriptor_pb2.FileDescriptorProto(name="api.proto", package="v1", syntax="proto3")
    told = json.loads((GOLDEN / "api.json").read_text(encoding="utf-8"))
    for name, fields in told.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            setattr(added, "type", _TYPES.get(kind, _MESSAGE))  # noqa: B010 (its stub wants an enum)
            if kind not in _TYPES:
                added.type_name = f".v1.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1.{name}"))
        for name in told
    }


def encoded(content: dict[str, Any]) -> bytes:
    """A ListPodResourcesResponse as kubelet sends it, encoded by the protobuf library."""
    message = json_format.ParseDict(content, messages()["ListPodResourcesResponse"]())
    return bytes(message.SerializeToString())


def golden(name: str) -> dict[str, Any]:
    """A recorded list, as JSON."""
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return content


class KubeletServer:
    """kubelet's service on a unix socket; `answer` may be changed, may wait and may refuse."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: bytes | grpc.StatusCode = encoded({})
        self.hold = threading.Event()  # cleared: every answer waits
        self.hold.set()
        self.calls = 0
        self.authorities: list[str] = []
        self._server: Any = None

    def start(self) -> None:
        """Listen, at a socket that may be there from before."""
        self.path.unlink(missing_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_unary_rpc_method_handler(self._list)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("v1.PodResourcesLister", {"List": handler}),)
        )
        assert self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()

    def stop(self) -> None:
        """End at once, in the middle of whatever is being answered."""
        self.hold.set()
        self._server.stop(None).wait(timeout=10)

    def _list(self, request: bytes, context: Any) -> bytes:
        assert request == b""
        self.authorities.append(context._rpc_event.call_details.host.decode())
        self.calls += 1
        self.hold.wait(timeout=20)
        if isinstance(self.answer, grpc.StatusCode):
            context.abort(self.answer, "refused by the test")
        assert isinstance(self.answer, bytes)
        return self.answer


@contextmanager
def kubelet_serving(path: Path, answer: bytes = b"") -> Iterator[KubeletServer]:
    """A kubelet for the length of a test."""
    server = KubeletServer(path)
    server.answer = answer
    server.start()
    try:
        yield server
    finally:
        server.stop()


# --- the API server -------------------------------------------------------------------------------


def pod_object(name: str, *, uid: str = "", version: int = 1, **given: Any) -> dict[str, Any]:
    """A pod as the API server tells it, with fields nobody reads and the given ones."""
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": given.get("namespace", "research"),
            "uid": uid or f"uid-of-{name}",
            "resourceVersion": str(version),
            "labels": given.get("labels"),
            "annotations": given.get("annotations"),
            "ownerReferences": given.get("owners"),
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "nodeName": given.get("node", NODE),
            "containers": [{"name": "trainer", "image": "registry.example/train:1"}],
        },
        "status": {
            "phase": given.get("phase", "Running"),
            "startTime": "2026-03-01T08:00:00Z",
            "containerStatuses": [{"name": "trainer", "restartCount": given.get("restarts", 0)}],
        },
    }


class ApiServerPlay:
    """An API server: a list, and the lines of each watch; every refusal it can make is settable."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.version = "100"
        self.pages: list[dict[str, Any]] = []  # whole list answers, when given
        self.requests: list[tuple[str, dict[str, list[str]], str | None]] = []
        self.status: dict[str, int] = {}  # "list" or "watch" -> HTTP status
        self.headers: dict[str, str] = {}
        self.drip: Callable[[socket.socket], None] | None = None
        self._lines: list[bytes | None] = []  # None: end the watch that reads it
        self._changed = threading.Condition()
        self._closed = False
        self.watching = 0
        self.watches = 0

    def tell(self, kind: str, content: dict[str, Any]) -> None:
        """Send an event to whoever watches, or to the next who does."""
        self.say(json.dumps({"type": kind, "object": content}).encode() + b"\n")

    def say(self, line: bytes | None) -> None:
        """Send bytes as they are; None ends the watch."""
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    def bookmark(self, version: int) -> None:
        """Tell only how far things are."""
        self.tell("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(version)}})

    def close(self) -> None:
        """End every watch."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def serve(self, connected: socket.socket) -> None:
        """One request on one connection."""
        received = b""
        while b"\r\n\r\n" not in received:
            piece = connected.recv(65536)
            if not piece:
                return
            received += piece
        head = received.decode("latin-1").split("\r\n")
        target = urlsplit(head[0].split(" ")[1])
        query = parse_qs(target.query)
        token = next((h[22:] for h in head if h.lower().startswith("authorization: bearer ")), None)
        self.requests.append((target.path, query, token))
        if self.drip is not None:
            self.drip(connected)
            return
        kind = "watch" if "watch" in query else "list"
        status = self.status.get(kind, 200)
        if status != 200:
            self._plain(connected, status, b'{"kind":"Status"}')
        elif kind == "list":
            self._plain(connected, 200, json.dumps(self._page(query)).encode())
        else:
            self._watch(connected)

    def _page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        if self.pages:
            return self.pages[int(query.get("continue", ["0"])[0])]
        return {"metadata": {"resourceVersion": self.version}, "items": self.items}

    def _plain(self, connected: socket.socket, status: int, body: bytes) -> None:
        extra = "".join(f"{key}: {value}\r\n" for key, value in self.headers.items())
        connected.sendall(
            f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body
        )

    def _watch(self, connected: socket.socket) -> None:
        connected.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with self._changed:
            self.watches += 1
            self.watching += 1
            ours = self.watches
            self._changed.notify_all()  # whoever served the one before lets go of it
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._lines or self._closed or ours != self.watches, timeout=30
                    )
                    if not self._lines or ours != self.watches:
                        return
                    line = self._lines.pop(0)
                if line is None:
                    connected.sendall(b"0\r\n\r\n")
                    return
                connected.sendall(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        finally:
            self.watching -= 1


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    play: ApiServerPlay
    context: ssl.SSLContext | None = None


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        with suppress(OSError):
            connected = self.request
            if server.context is not None:
                connected = server.context.wrap_socket(connected, server_side=True)
            with connected:
                server.play.serve(connected)
                connected.shutdown(socket.SHUT_RDWR)


@contextmanager
def api_serving(play: ApiServerPlay, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The API server's URL for the length of a test."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.play, server.context = play, context
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    scheme = "http" if context is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
    finally:
        play.close()
        server.shutdown()
        server.server_close()
        thread.join(10)


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate of 127.0.0.1 that is its own CA, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca_file, key_file = folder / "ca.crt", folder / "tls.key"
    ca_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key_file)
    return ca_file, context
