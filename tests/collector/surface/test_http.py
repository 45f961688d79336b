"""The HTTP API: answers, refusals, and that nothing a client sends makes it fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar.testing import TestClient

from flopledger_collector import ingest
from flopledger_collector.handle import LedgerHandle
from flopledger_collector.web import ingest_route
from tests.collector.ledgers import rich_ledger
from tests.collector.opened import amounts, opened
from tests.collector.sealing import StreamSealer
from tests.collector.surface.served import BATCHES, served


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[LedgerHandle]:
    """The ledger with something of everything."""
    with rich_ledger(tmp_path) as found:
        yield found


@pytest.fixture
def client(handle: LedgerHandle) -> Iterator[TestClient[Any]]:
    """Its HTTP surface."""
    with served(handle) as found:
        yield found


def test_batches_are_answered_one_by_one(client: TestClient[Any]) -> None:
    """Each batch of a request has its answer, in order, with what the stream expects."""
    known = StreamSealer(1)
    for _ in range(6):
        known.minute(0)  # the journal has six of this stream
    body = known.minute(20, gpus=1) + b"no batch\n"
    answer = client.post("/v1/batches", content=body, headers=BATCHES)
    assert answer.status_code == 200
    answers = answer.json()["answers"]
    assert [one["outcome"] for one in answers] == ["conflict", "refused"]
    assert set(answers[0]) == {
        "stream_id", "sequence", "batch_hash", "outcome", "expected_sequence", "message",
    }  # fmt: skip
    assert "header" in answers[1]["message"]


def test_a_resent_batch_is_a_duplicate(client: TestClient[Any], handle: LedgerHandle) -> None:
    """The same bytes twice change nothing."""
    before = amounts(handle)
    body = StreamSealer(1).minute(0, gpus=2)
    answers = client.post("/v1/batches", content=body, headers=BATCHES).json()["answers"]
    assert [one["outcome"] for one in answers] == ["duplicate"]
    assert amounts(handle) == before


@pytest.mark.parametrize("header", ingest_route.FORWARDING_HEADERS)
def test_nobody_behind_a_proxy_is_loopback(header: str) -> None:
    """A request that something forwarded is never trusted for its address."""

    class FakeRequest:
        """What is asked of a request."""

        def __init__(self, headers: dict[str, str], host: str) -> None:
            self.headers = headers
            self.client = type("Address", (), {"host": host})()

    def trusted(peer: str = "127.0.0.1", **headers: str) -> bool:
        asked = {"host": "localhost:16180"} | headers
        return ingest_route.peer_is_loopback(FakeRequest(asked, peer))  # type: ignore[arg-type]

    assert all(trusted(host=one) for one in ("127.0.0.1:16180", "127.1.2.3", "[::1]:16180"))
    assert not trusted("192.0.2.7")
    assert not trusted(**{header: "127.0.0.1"})
    assert not any(trusted(host=one) for one in ("ledger.example", "", "10.0.0.1:16180"))
    assert not trusted(origin="http://localhost:16180")


@pytest.mark.parametrize(
    ("headers", "status", "names"),
    [
        ({}, 415, "Content-Type"),
        ({"content-type": "text/plain"}, 415, "Content-Type"),
        ({**BATCHES, "content-encoding": "gzip"}, 415, "Content-Encoding"),
        ({**BATCHES, "content-length": str(ingest.REQUEST_BYTES_MAX + 1)}, 413, "body"),
        ({**BATCHES, "content-length": "9" * 40}, 400, "Content-Length"),
        ({**BATCHES, "content-length": "-5"}, 400, "Content-Length"),
    ],
)
def test_whole_requests_are_refused_with_a_sentence(
    client: TestClient[Any], headers: dict[str, str], status: int, names: str
) -> None:
    """What the headers rule out is refused before a byte of the body is read."""
    answer = client.post("/v1/batches", content=b"x", headers=headers)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith(names)


def test_a_body_that_grows_too_large_is_refused(
    client: TestClient[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body without a stated length is read only to the limit."""
    monkeypatch.setattr(ingest_route, "REQUEST_BYTES_MAX", 10)

    def chunks() -> Iterator[bytes]:
        yield from [b"x" * 8] * 4

    answer = client.post("/v1/batches", content=chunks(), headers=BATCHES)
    assert answer.status_code == 413
    assert "send at most 10 bytes" in answer.json()["error"]


def test_too_many_bodies_at_once_are_put_off(
    client: TestClient[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: a sender is told to come back."""
    monkeypatch.setattr(ingest_route, "BODY_BYTES_IN_FLIGHT_MAX", 10)
    answer = client.post("/v1/batches", content=b"x" * 11, headers=BATCHES)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert "later" in answer.json()["error"]


def test_an_empty_body_is_refused(client: TestClient[Any]) -> None:
    """A request without a batch is a mistake."""
    answer = client.post("/v1/batches", content=b"", headers=BATCHES)
    assert answer.status_code == 400
    assert "at least one batch" in answer.json()["error"]


BATCH = StreamSealer(9).minute(0, gpus=1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(BATCH) - 1).map(lambda cut: BATCH[:cut]),
        st.tuples(st.integers(0, len(BATCH) - 1), st.integers(0, 255)).map(
            lambda spoiled: BATCH[: spoiled[0]] + bytes([spoiled[1]]) + BATCH[spoiled[0] + 1 :]
        ),
    )
)
def test_no_hostile_body_makes_the_server_fail(
    client: TestClient[Any], handle: LedgerHandle, body: bytes
) -> None:
    """Any bytes are answered below 500, and the ledger is as it was."""
    before = handle.ledger.position().heads_root
    answer = client.post("/v1/batches", content=body, headers=BATCHES)
    assert answer.status_code < 500
    outcomes = {one["outcome"] for one in answer.json().get("answers", [])}
    assert "admitted" not in outcomes
    assert handle.ledger.position().heads_root == before


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/nope", "/v1/projects/a/b/c", "/.git/config", "/%00"]
)
def test_unknown_paths_are_json_404(client: TestClient[Any], path: str) -> None:
    """A program is told in JSON that nothing is there."""
    answer = client.get(path)
    assert answer.status_code == 404
    assert "nothing is there" in answer.json()["error"]


def test_a_wrong_method_is_405(client: TestClient[Any]) -> None:
    """Reading paths take no writes."""
    assert client.post("/v1/status").status_code == 405
    assert client.get("/v1/batches").status_code == 405


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("format=html", "format"),
        ("policy=nope", "policy is 'nope'"),
        ("from=yesterday", "from is 'yesterday'"),
        ("from=1969-12-31", "from is '1969-12-31'"),
        ("from=2026-01-01&to=2025-01-01", "end_unix_ms"),
        ("&".join(["policy=ec-cumulative"] * 40), "policy is 40"),
    ],
)
def test_wrong_questions_are_400(client: TestClient[Any], query: str, names: str) -> None:
    """A parameter that cannot be meant is named."""
    answer = client.get(f"/v1/projects/atlas/statement?{query}")
    assert answer.status_code == 400
    assert names in answer.json()["error"]


def _node_amounts(document: dict[str, Any]) -> dict[str, Any]:
    """CPU time and the energy at every boundary."""
    return {"cpu_time_ms": document["cpu_time_ms"], **document["energy_by_boundary_mj"]}


def _host_only(amounts: dict[str, Any]) -> dict[str, Any]:
    return {name: amounts[name] for name in ("cpu_package", "node")}


def test_peers_row_16_the_api_and_the_command_line_say_the_same(client: TestClient[Any]) -> None:
    """Every exact amount is a decimal string, and the total is the sum of the items."""
    document = client.get("/v1/projects/atlas/statement").json()
    for bound in ("low", "central", "high"):
        items = sum(int(item["flop"][bound]) for item in document["items"])
        assert items == int(document["own"]["flop"][bound])
    assert client.get("/v1/status").json()["projects"][0] == client.get("/v1/projects/atlas").json()
    projects = client.get("/v1/projects").json()["projects"]
    assert [one["project"] for one in projects] == ["atlas", "birch", "empty", "stray"]
    node = _node_amounts(document["own"])
    for status in (client.get("/v1/status").json()["projects"][0], document):
        assert _node_amounts(status["own"]) == node
    (item,) = document["host_items"]
    assert _node_amounts(item) == {"cpu_time_ms": node["cpu_time_ms"], **_host_only(node)}
    page = client.get("/projects/atlas/statement").text
    markdown = client.get("/v1/projects/atlas/statement?format=markdown").text
    for amount in ("120", "0.0117 [0, 0.0233] (node)", "model 1, table old"):
        assert amount in page
        assert amount in markdown
    metrics = client.get("/metrics").text
    assert 'flopledger_project_cpu_seconds{bound="central",project="atlas"} 120.0' in metrics
    joules = int(node["node"]["central"]) / 1000
    labels = 'bound="central",boundary="node",project="atlas"'
    assert f"flopledger_project_boundary_energy_joules{{{labels}}} {joules}" in metrics
    text = client.get("/v1/projects/atlas/statement?format=markdown")
    assert text.headers["content-type"] == "text/markdown; charset=utf-8"
    assert text.text.startswith("# Statement: atlas")


def test_a_period_is_whole_days(client: TestClient[Any]) -> None:
    """A statement of a period without usage has no items, and still its instruments."""
    document = client.get("/v1/projects/atlas/statement?from=2025-11-25&to=2025-11-26").json()
    assert document["items"] == []
    assert document["instruments"][0]["value"]["central"] != "0"


def test_an_unknown_project_is_404_with_the_remedy(client: TestClient[Any]) -> None:
    """A program gets the same sentence as a person."""
    answer = client.get("/v1/projects/nope")
    assert answer.status_code == 404
    assert "flopledger project create" in answer.json()["error"]


def test_the_ledger_and_its_health_are_told(client: TestClient[Any], handle: LedgerHandle) -> None:
    """Position, streams, what waits and what failed."""
    ledger = client.get("/v1/ledger").json()
    assert ledger["position"]["ledger_id"] == handle.ledger_id
    assert {one["author"] for one in ledger["streams"]} == {"agent", "collector"}
    assert client.get("/healthz").json() == {
        "status": "ok", "journal_entries": 15, "fold_lag_entries": 0, "fold_error": None,
    }  # fmt: skip
    handle.folder.failure = RuntimeError("the disk is full")
    sick = client.get("/healthz")
    assert (sick.status_code, sick.json()["fold_error"]) == (503, "the disk is full")


def test_the_schema_describes_every_path(client: TestClient[Any]) -> None:
    """OpenAPI is served as JSON and names the API, not the pages."""
    schema = json.loads(client.get("/schema/openapi.json").content)
    assert set(schema["paths"]) == {
        "/v1/batches", "/v1/ledger", "/v1/status", "/v1/projects", "/v1/projects/{project_id}",
        "/v1/projects/{project_id}/statement", "/metrics", "/healthz",
    }  # fmt: skip


def test_a_stopped_writer_asks_to_send_again(tmp_path: Path) -> None:
    """While the collector stops, nothing is promised."""
    with opened(tmp_path) as handle, served(handle) as client:
        handle.writer.close()
        answer = client.post("/v1/batches", content=BATCH, headers=BATCHES)
        assert answer.status_code == 503
        assert "send the batches again" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_probes_may_ask_with_head(client: TestClient[Any], path: str) -> None:
    """A load balancer that asks for headers only is answered."""
    assert client.head(path).status_code == 200
    assert client.get(path).status_code == 200
