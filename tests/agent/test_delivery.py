"""Hostile collectors over real sockets: a request always ends, in time, with a named reason."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.delivery import HttpCollector
from flopledger_agent.errors import CollectorUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_SECONDS = 0.6


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server that sends bytes, then drips a byte at a time while anybody listens."""
    over = threading.Event()
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(said: bytes, drip: bytes = b"") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(10)
        listeners.append(listener)

        def run() -> None:
            try:
                with closing(listener.accept()[0]) as connection:
                    connection.settimeout(10)
                    asked = b""
                    while not asked.endswith(b"batch\n"):  # bytes left unread would reset it
                        asked += connection.recv(65536)
                    connection.sendall(said)
                    while drip and not over.wait(0.05):
                        connection.sendall(drip)
            except OSError:
                pass  # the client gave up, as it should

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    over.set()
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"hello\r\n\r\n", "not_a_collector"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "not_a_collector"),
        (b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000 + b"\r\n\r\n", "not_a_collector"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"x":' + b"[" * 50_000 + b"]" * 50_000, "not_a_collector"),
        (b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "not_a_collector"),
        (b"", "unreachable"),
    ],
)
def test_malformed_answers_are_named(serve: Callable[..., str], said: bytes, reason: str) -> None:
    """Rubbish, a cut answer, an endless header, deep nesting, silence: never another exception."""
    with pytest.raises(CollectorUnreachable) as caught:
        HttpCollector(serve(said), 5.0, "test").send(b"batch\n")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("said", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n", b"X-A: b\r\n"),
        (b"H", b"T"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 1000000\r\n\r\n", b" "),
    ],
)
@pytest.mark.parametrize("shorter", [False, True])
def test_a_dripping_answer_ends_at_the_limit(
    serve: Callable[..., str], said: bytes, drip: bytes, shorter: bool
) -> None:
    """The limit is one of the whole request, not of each read; a call may shorten it."""
    began = time.monotonic()
    limit = LIMIT_SECONDS if shorter else None
    collector = HttpCollector(serve(said, drip), 60.0 if shorter else LIMIT_SECONDS, "test")

    with pytest.raises(CollectorUnreachable, match="no complete answer within") as caught:
        collector.send(b"batch\n", limit_seconds=limit)
    assert caught.value.reason == "timeout"
    assert LIMIT_SECONDS - 0.1 < time.monotonic() - began < LIMIT_SECONDS + 3
