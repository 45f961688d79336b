"""Pods are kept current by one watch, through every way in which an API server fails or lies."""

from __future__ import annotations

import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from flopledger_agent.attribution.api_server import ApiServer, ApiTrouble, Cut, get
from flopledger_agent.attribution.pod_watch import (
    BACKOFF_SECONDS_MAX,
    WATCH_SECONDS_MAX,
    WATCH_SECONDS_MIN,
    Watch,
    WatchTarget,
)
from flopledger_agent.attribution.pods import Pod, pods_of
from flopledger_agent.clocks import SystemClock
from tests.agent.attribution.kubernetes_servers import (
    NODE,
    ApiServerPlay,
    api_serving,
    certificate,
    pod_object,
)
from tests.agent.attribution.people import until

PATIENCE_SECONDS = 20.0


def watching(url: str, **given: Any) -> Watch[Pod]:
    """A watch of this node's pods that fails fast and tries again soon."""
    entries_max = given.pop("entries_max", 100)
    fields: dict[str, Any] = {"timeout_seconds": 5.0, "backoff_seconds": 0.02, **given}
    server = ApiServer(url=url, **fields)
    target = pods_of(NODE, ("app.kubernetes.io/name",))
    target = WatchTarget(
        path=target.path,
        field_selector=target.field_selector,
        read=target.read,
        entries_max=entries_max,
    )
    return Watch(server, target, SystemClock(), chance=random.Random(1))


def started(url: str, **given: Any) -> Watch[Pod]:
    """The same, at work in its thread."""
    watch = watching(url, **given)
    watch.latest()
    return watch


def names(watch: Watch[Pod]) -> set[str]:
    """The pods that are known now."""
    return set(watch.latest().objects)


# --- the ordinary way -----------------------------------------------------------------------------


def test_pods_are_listed_and_then_watched() -> None:
    """One list from the server's memory, one watch from there on, both for this node only."""
    play = ApiServerPlay()
    play.items = [pod_object("a")]
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: names(watch) == {"research/a"}, "the list")
        play.tell("ADDED", pod_object("b", version=101))
        until(lambda: names(watch) == {"research/a", "research/b"}, "the addition")
        play.tell("MODIFIED", pod_object("a", version=102, phase="Failed"))
        until(lambda: watch.latest().objects["research/a"].ended, "the change")
        play.tell("DELETED", pod_object("a", version=103))
        until(lambda: names(watch) == {"research/b"}, "the deletion")
        assert watch.latest().failure is None
        watch.close()
    (_, listed, _), (path, watched, _) = play.requests
    assert listed["fieldSelector"] == watched["fieldSelector"] == [f"spec.nodeName={NODE}"]
    assert listed["resourceVersion"] == ["0"]
    assert path == "/api/v1/pods"
    assert watched["resourceVersion"] == ["100"]
    assert watched["allowWatchBookmarks"] == ["true"]
    assert WATCH_SECONDS_MIN <= int(watched["timeoutSeconds"][0]) <= WATCH_SECONDS_MAX


def test_a_watch_that_ends_is_resumed_where_it_was() -> None:
    """No second list: bookmarks tell how far things are, although nothing happened here."""
    play = ApiServerPlay()
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: watch.latest().synced and play.watching, "the watch")
        play.bookmark(900)
        play.say(None)
        until(lambda: play.watches == 2, "the second watch")
        play.tell("ADDED", pod_object("b", version=901))
        until(lambda: names(watch) == {"research/b"}, "the event")
        watch.close()
    assert [("watch" in query, query.get("resourceVersion")) for _, query, _ in play.requests] == [
        (False, ["0"]),
        (True, ["100"]),
        (True, ["900"]),
    ]


def test_a_list_comes_in_pages() -> None:
    """All of them make one list."""
    play = ApiServerPlay()
    play.pages = [
        {"metadata": {"resourceVersion": "7", "continue": "1"}, "items": [pod_object("a")]},
        {"metadata": {"resourceVersion": "7"}, "items": [pod_object("b")]},
    ]
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: len(names(watch)) == 2, "both pages")
        watch.close()


@pytest.mark.parametrize("how", ["status", "event"])
def test_a_place_that_is_gone_is_listed_anew(how: str) -> None:
    """410, as an answer and inside a watch: a new list, not from a memory that may lag."""
    play = ApiServerPlay()
    play.items = [pod_object("a")]
    with api_serving(play) as url:
        if how == "status":
            play.status["watch"] = 410
        watch = started(url)
        until(lambda: watch.latest().synced, "the list")
        play.items, play.version = [pod_object("b")], "500"
        if how == "event":
            gone = {"kind": "Status", "code": 410, "reason": "Expired"}
            play.say(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        until(lambda: names(watch) == {"research/b"}, "the new list")
        play.status.clear()
        until(lambda: play.watching, "the watch")
        watch.close()
    lists = [query for _, query, _ in play.requests if "watch" not in query]
    assert "resourceVersion" not in lists[1]


# --- TLS and tokens -------------------------------------------------------------------------------


def test_tls_is_verified_by_the_given_ca_and_tokens_are_read_anew(tmp_path: Path) -> None:
    """The token of each request is the file's of that moment: it is rotated every hour."""
    ca_file, context = certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text("first\n")
    play = ApiServerPlay()
    with api_serving(play, context) as url:
        watch = started(url, ca_file=str(ca_file), token_file=str(token))
        until(lambda: play.watching, "the watch")
        token.write_text("second\n")
        play.bookmark(5)
        play.say(None)
        until(lambda: play.watches == 2, "the second watch")
        watch.close()
    assert [held for *_, held in play.requests] == ["first", "first", "second"]


def test_a_server_with_another_ca_gets_no_token(tmp_path: Path) -> None:
    """Nothing is sent to who cannot prove to be the API server; the remedy is said."""
    other = tmp_path / "other"
    other.mkdir()
    _, context = certificate(tmp_path)
    ca_file, _ = certificate(other)
    (tmp_path / "token").write_text("secret")
    play = ApiServerPlay()
    with api_serving(play, context) as url:
        watch = started(url, ca_file=str(ca_file), token_file=str(tmp_path / "token"))
        until(lambda: watch.latest().failure, "the failure")
        watch.close()
    assert "kubernetes.ca_file" in str(watch.latest().failure)
    assert play.requests == []


def test_a_token_never_crosses_the_network_in_the_clear(tmp_path: Path) -> None:
    """Without TLS it goes to this machine only."""
    token = tmp_path / "token"
    token.write_text("secret")
    server = ApiServer(url="http://192.0.2.1:8080", token_file=str(token))
    with pytest.raises(ApiTrouble, match="unencrypted"), get(server, "/", 1, Cut()):
        pass


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"token_file": "/nonexistent/token"}, "token_file"),
        ({"ca_file": "/nonexistent/ca.crt"}, "ca_file"),
    ],
)
def test_missing_files_are_said(files: dict[str, str], words: str) -> None:
    """With the key that names them."""
    server = ApiServer(url="https://127.0.0.1:1", **files)  # type: ignore[arg-type]
    with pytest.raises(ApiTrouble, match=words), get(server, "/", 1, Cut()):
        pass


@pytest.mark.parametrize("content", [b"", b"a\nb", b"\xff"])
def test_a_file_that_is_no_token_is_not_sent(tmp_path: Path, content: bytes) -> None:
    """Nothing in it can become another header."""
    token = tmp_path / "token"
    token.write_bytes(content)
    server = ApiServer(url="http://127.0.0.1:1", token_file=str(token))
    with pytest.raises(ApiTrouble, match="token"), get(server, "/", 1, Cut()):
        pass


# --- slow, dying and lying servers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "not valid"), (403, "rbac.yaml"), (404, "no such API"), (500, "500")],
)
def test_refusals_are_said_and_end(status: int, words: str) -> None:
    """Each with its remedy; afterwards everything is as if nothing had been."""
    play = ApiServerPlay()
    play.items = [pod_object("a")]
    play.status["list"] = status
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: watch.latest().failure, "the failure")
        assert words in str(watch.latest().failure)
        play.status.clear()
        until(lambda: watch.latest().synced and watch.latest().failure is None, "recovery")
        assert names(watch) == {"research/a"}
        watch.close()


def test_a_busy_server_is_left_alone_as_long_as_it_asks() -> None:
    """Retry-After counts, up to five minutes."""
    play = ApiServerPlay()
    play.status["list"] = 429
    play.headers["Retry-After"] = "9999"
    with api_serving(play) as url:
        watch = watching(url)
        with pytest.raises(ApiTrouble) as caught:
            watch.run_once()
        watch.close()
    assert watch._failed(caught.value) == 300


def test_pods_stay_while_the_server_is_away() -> None:
    """The last known ones, with the reason; and they are corrected when it is back."""
    play = ApiServerPlay()
    play.items = [pod_object("a"), pod_object("b")]
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: len(names(watch)) == 2 and play.watching, "the list")
    until(lambda: watch.latest().failure, "the failure")
    assert len(names(watch)) == 2
    assert "network policy" in str(watch.latest().failure)
    watch.close()


def test_a_server_that_drips_is_cut_at_the_deadline() -> None:
    """A byte now and then is no answer: the whole request has one deadline."""
    play = ApiServerPlay()

    def drip(connected: socket.socket) -> None:
        connected.settimeout(PATIENCE_SECONDS)
        connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            connected.sendall(b" ")
            time.sleep(0.01)

    play.drip = drip
    began = time.monotonic()
    with api_serving(play) as url:
        server = ApiServer(url=url, timeout_seconds=5.0)
        with pytest.raises(ApiTrouble, match="in time"), get(server, "/", 0.3, Cut()) as answer:
            answer.body(2_000_000)
    assert time.monotonic() - began < PATIENCE_SECONDS / 2


def test_a_server_that_never_answers_is_left_at_the_deadline() -> None:
    """Connected, and not a word."""
    play = ApiServerPlay()

    def wait(connected: socket.socket) -> None:
        connected.settimeout(PATIENCE_SECONDS)
        connected.recv(1)

    play.drip = wait
    with api_serving(play) as url:
        server = ApiServer(url=url, timeout_seconds=0.2)
        with pytest.raises(ApiTrouble, match="in time"), get(server, "/", 5, Cut()):
            pass


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":{"metadata":{}}}\n',
        b'{"type":"ADDED","object":5}\n',
        b'{"type":"WHATEVER","object":{"metadata":{"resourceVersion":"2"}}}\n',
        b'{"type":"ERROR","object":[]}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\n",
    ],
)
def test_lines_that_are_no_events_end_the_watch_and_not_the_thread(line: bytes) -> None:
    """The list is read again: after rubbish nobody knows what was missed."""
    play = ApiServerPlay()
    play.items = [pod_object("a")]
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: play.watching, "the watch")
        play.say(line)
        until(lambda: play.watches >= 2, "the second watch")
        play.tell("ADDED", pod_object("b", version=101))
        until(lambda: len(names(watch)) == 2, "the event")
        assert watch.latest().failure is None
        watch.close()
    assert sum("watch" not in query for _, query, _ in play.requests) >= 2


@pytest.mark.parametrize("body", [b"[]", b"", b"<html>", b'{"metadata":{},"items":[]}', b"\xff"])
def test_answers_that_are_no_list_are_said(body: bytes) -> None:
    """Somebody else listens there."""
    play = ApiServerPlay()
    play.drip = lambda connected: connected.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    with api_serving(play) as url:
        watch = watching(url)
        with pytest.raises(ApiTrouble, match="api_url"):
            watch.run_once()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\n", b""])
def test_other_protocols_are_said(answer: bytes) -> None:
    """What is no HTTP, and what ends within its head."""
    play = ApiServerPlay()
    play.drip = lambda connected: connected.sendall(answer)
    with api_serving(play) as url, pytest.raises(ApiTrouble, match="api_url"):
        watching(url).run_once()


def test_a_redirect_is_not_followed() -> None:
    """It would carry the token elsewhere."""
    play = ApiServerPlay()
    play.status["list"] = 302
    play.headers["Location"] = "http://192.0.2.1/"
    with api_serving(play) as url, pytest.raises(ApiTrouble, match="302"):
        watching(url).run_once()


def test_a_server_that_ends_every_watch_at_once_is_asked_less_often() -> None:
    """Ten thousand agents in a tight circle would be an attack; people are told."""
    play = ApiServerPlay()
    play._closed = True
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: watch.latest().failure, "the failure")
        assert "ends every watch" in str(watch.latest().failure)
        assert watch._backoff(20) <= BACKOFF_SECONDS_MAX
        play._closed = False
        until(lambda: play.watching, "a watch that stays")
        play.tell("ADDED", pod_object("b", version=101))
        until(lambda: watch.latest().failure is None, "recovery")
        watch.close()


def test_another_nodes_pods_are_not_kept() -> None:
    """A server that ignores the selector fills nothing and attributes nothing."""
    play = ApiServerPlay()
    play.items = [pod_object("a"), pod_object("x", node="node-2")]
    with api_serving(play) as url:
        watch = started(url)
        until(lambda: play.watching, "the watch")
        play.tell("ADDED", pod_object("y", node="node-2", version=101))
        play.tell("ADDED", pod_object("b", version=102))
        until(lambda: names(watch) == {"research/a", "research/b"}, "ours")
        watch.close()


def test_memory_is_bounded() -> None:
    """More objects than are kept are said."""
    play = ApiServerPlay()
    play.items = [pod_object(f"p{number}") for number in range(9)]
    with api_serving(play) as url:
        watch = started(url, entries_max=4)
        until(lambda: play.watching, "the watch")
        play.tell("ADDED", pod_object("late", version=101))
        play.bookmark(102)
        until(lambda: watch._version == "102", "the bookmark")
        assert len(names(watch)) == 4
        assert watch.latest().overfull
        watch.close()


def test_closing_cuts_a_watch() -> None:
    """Nobody waits for the server, and the thread ends."""
    play = ApiServerPlay()
    with api_serving(play) as url:
        watch = started(url)
        watch.latest()
        until(lambda: play.watching, "the watch")
        watch.close()
        thread = watch._thread
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()
        assert watch.latest().failure is None


def test_jitter_spreads_a_fleet() -> None:
    """A thousand agents that lose the server at once come back over the whole span."""
    waits = []
    for seed in range(1000):
        watch = Watch(
            ApiServer(url="http://127.0.0.1:1"),
            pods_of(NODE, ()),
            SystemClock(),
            chance=random.Random(seed),
        )
        waits.append(watch._failed(ApiTrouble("away")))
    assert min(waits) >= 0.4
    assert max(waits) <= 8.0
    assert max(sum(second <= wait < second + 1 for wait in waits) for second in range(8)) < 200
