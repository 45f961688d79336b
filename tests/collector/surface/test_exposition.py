"""The Prometheus page: a contract with dashboards and alerts."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from flopledger_collector import exposition
from flopledger_collector.handle import LedgerHandle
from tests.collector.ledgers import budget, rich_ledger
from tests.collector.opened import opened, opening, send
from tests.collector.sealing import StreamSealer, project_owner, usage
from tests.collector.surface.served import Ticks, served
from tests.programs import require_program

# Family -> label names, as everything that queries the page expects them.
CONTRACT = {
    "flopledger_project_flop": {"project", "policy", "bound"},
    "flopledger_project_integer_operations": {"project", "policy", "bound"},
    "flopledger_project_energy_joules": {"project"},
    "flopledger_project_gpu_seconds": {"project"},
    "flopledger_project_cost": {"project", "currency"},
    "flopledger_project_pipe_flop": {"project", "pipe", "bound"},
    "flopledger_project_boundary_energy_joules": {"project", "boundary", "bound"},
    "flopledger_project_cpu_seconds": {"project", "bound"},
    "flopledger_project_stand_in_records": {"project"},
    "flopledger_instrument_threshold": {"instrument", "quantity"},
    "flopledger_instrument_ratio": {"project", "instrument", "bound"},
    "flopledger_instrument_state": {"project", "instrument", "state"},
    "flopledger_budget_limit": {"project", "budget", "quantity"},
    "flopledger_budget_ratio": {"project", "budget", "quantity", "bound"},
    "flopledger_unattributed_flop": {"bound"},
    "flopledger_idle_gpu_seconds": set[str](),
    "flopledger_idle_cpu_seconds": set[str](),
    "flopledger_gap_gpu_seconds": set[str](),
    "flopledger_disputed_records": set[str](),
    "flopledger_journal_entries": set[str](),
    "flopledger_ingest_batches_total": {"outcome"},
    "flopledger_ingest_records_total": {"standing"},
    "flopledger_fold_lag_batches": set[str](),
    "flopledger_agent_last_batch_timestamp_seconds": {"node", "stream_id"},
    "flopledger_collector_build_info": {"version"},
    "flopledger_ledger_info": {"ledger_id", "simulated"},
    "flopledger_project_info": {"project", "opened"},
    "flopledger_projects_left_out": set[str](),
}


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[LedgerHandle]:
    """The ledger with something of everything."""
    with rich_ledger(tmp_path) as found:
        yield found


def samples(client: TestClient[Any]) -> dict[str, list[Sample]]:
    """Every sample of the page, by name."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list[Sample]], name: str, **labels: str) -> float:
    """The one sample with these labels."""
    (match,) = [one for one in found[name] if one.labels.items() >= labels.items()]
    return match.value


def test_the_page_keeps_its_contract(handle: LedgerHandle) -> None:
    """Exactly the families and labels that dashboards and alerts ask for."""
    with served(handle) as client:
        found = samples(client)
    assert {name: set(one[0].labels) for name, one in found.items()} == CONTRACT
    assert "job" not in {label for one in found.values() for label in one[0].labels}


@pytest.mark.server
def test_the_page_passes_the_metric_linter(handle: LedgerHandle) -> None:
    """Every family, nodes' among them: names, units, types, help texts."""
    with served(handle) as client:
        page = client.get("/metrics").text
    done = subprocess.run(
        [require_program("promtool"), "check", "metrics"],
        input=page, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_says_what_the_ledger_says(handle: LedgerHandle) -> None:
    """Base units: joules, seconds, FLOP; shares are ratios."""
    with served(handle) as client:
        found = samples(client)
    assert value(found, "flopledger_project_energy_joules", project="stray") == 36_000
    assert value(found, "flopledger_project_gpu_seconds", project="stray") == 60
    assert value(found, "flopledger_project_cost", project="birch", currency="USD") == 1234.56
    assert value(found, "flopledger_idle_gpu_seconds") == 60
    assert value(found, "flopledger_idle_cpu_seconds") == 120
    node = {"project": "atlas", "boundary": "node"}
    assert value(found, "flopledger_project_boundary_energy_joules", **node, bound="low") == 0
    assert value(found, "flopledger_project_boundary_energy_joules", **node, bound="central") == (
        42_000
    )
    tensor = {"project": "stray", "pipe": "tensor", "bound": "central"}
    cores = {"project": "stray", "pipe": "cuda_core", "bound": "central"}
    both = [value(found, "flopledger_project_pipe_flop", **one) for one in (tensor, cores)]
    policy = {"project": "stray", "policy": "ec-cumulative", "bound": "central"}
    assert sum(both) == pytest.approx(value(found, "flopledger_project_flop", **policy))
    shown = {one.labels["project"] for one in found["flopledger_project_cpu_seconds"]}
    assert shown == {"atlas"}  # absent is not zero
    assert value(found, "flopledger_gap_gpu_seconds") == 180
    assert value(found, "flopledger_disputed_records") == 1
    assert value(found, "flopledger_journal_entries") == 15
    limit = {"project": "atlas", "budget": "power", "quantity": "energy_joules"}
    assert value(found, "flopledger_budget_limit", **limit) == 36_000_000
    share = {"project": "birch", "instrument": "eu-aia-51-2", "bound": "central"}
    assert value(found, "flopledger_instrument_ratio", **share) == 0.94
    assert value(found, "flopledger_project_info", project="stray", opened="false") == 1
    assert value(found, "flopledger_ingest_batches_total", outcome="admitted") == 7


def test_open_bounds_are_infinite_and_absent_values_are_absent(handle: LedgerHandle) -> None:
    """No sample where nothing is known; +Inf where nothing limits."""
    handle.entries.post(budget("birch", name="power", quantity="energy_mj", limit="1000"))
    handle.folder.fold()
    with served(handle) as client:
        found = samples(client)
    open_end = value(
        found, "flopledger_budget_ratio", project="birch", budget="power", bound="high"
    )
    assert open_end == float("inf")
    assert {one.labels["project"] for one in found["flopledger_project_cost"]} == {"birch"}


def test_a_page_is_made_at_most_once_a_second(handle: LedgerHandle) -> None:
    """Any number of scrapers cost one evaluation."""
    ticks = Ticks(step_ns=0)
    with served(handle, ticks) as client:
        before = client.get("/metrics").text
        handle.entries.post(opening("newcomer"))
        handle.folder.fold()
        assert client.get("/metrics").text == before
        ticks.now_ns += 1_000_000_000
        assert 'project="newcomer"' in client.get("/metrics").text


def test_invented_project_names_cannot_grow_the_page_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a limit, unopened projects are counted and not shown; opened ones always are."""
    monkeypatch.setattr(exposition, "UNOPENED_PROJECTS_MAX", 2)
    with opened(tmp_path) as handle:
        records = [usage(0, gpu, owner=project_owner(f"p{gpu}")) for gpu in range(5)]
        send(handle, StreamSealer().seal(records))
        handle.entries.post(opening("p4"))
        handle.folder.fold()
        with served(handle) as client:
            found = samples(client)
    shown = {one.labels["project"] for one in found["flopledger_project_info"]}
    assert shown == {"p0", "p1", "p4"}
    assert value(found, "flopledger_projects_left_out") == 2


def test_an_amount_beyond_floating_point_is_infinite() -> None:
    """A page is always made, whatever a person declared."""
    assert exposition.finite_or_infinite(10**400, 1) == float("inf")
