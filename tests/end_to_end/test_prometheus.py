"""A real Prometheus scrapes a real collector and a real agent, and every query must find data.

The agent meters simulated GPUs at sixty times real time, one of which is lost for a while, so that
gaps and failures have something to show. A budget small enough to be exceeded proves the way from
GPU counter to firing alert. Nothing is waited for blindly: each query is asked again until it
answers, or until so much was scraped that it should have; a slow machine only takes longer.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.dashboards.page_server import page
from tests.dashboards.prometheus_server import (
    Prometheus,
    answers,
    free_port,
    running_prometheus,
    wait_for,
)
from tests.dashboards.queries import Query, Variable, panel_queries, rule_queries, variables
from tests.programs import require_program

pytestmark = [pytest.mark.server, pytest.mark.slow]

# With nothing done at all: no scrape and no batch. What has to happen is counted, not timed.
DATA_SECONDS: Final = 60.0
# Virtual minutes, a batch each: past the dark time of the scenario, which ends in the ninth.
BATCHES_LEAST: Final = 12
COMMAND_SECONDS: Final = 60.0
SPEED: Final = 60
_Answer = TypeVar("_Answer")
NS_PER_SECOND: Final = 1_000_000_000
# The virtual calendar starts in the past, so that to Prometheus the node looks long silent.
BEHIND_SECONDS: Final = 86_400

DECLARED_COST: Final = (
    *("--cost", "1250.50", "--currency", "EUR", "--method", "invoice"),
    *("--from", "2026-01-01", "--to", "2026-02-01"),
)

SCENARIO: Final = """
driver_version = "595.71.05"
nvml_version = "13.595.71"

[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 1000000.0
sm_clock_mhz = 1755
power_watts = 612.5
sm_active = 0.98
pipes = { hmma = 0.55, any_tensor = 0.55, fp32 = 0.02, integer = 0.03 }
processes = ["atlas"]

[[gpus]]
model = "NVIDIA H100 80GB HBM3"
gpm = "util"   # percentages cannot bridge the dark time below: it becomes a gap
[[gpus.phases]]
seconds = 1000000.0
sm_clock_mhz = 1755
power_watts = 500.0
sm_active = 0.9
pipes = { hmma = 0.4, any_tensor = 0.4 }
processes = ["untagged"]
[[gpus.faults]]
at_seconds = 200.0
kind = "lost"
for_seconds = 300.0

[[gpus]]
model = "NVIDIA A100-SXM4-80GB"
[[gpus.phases]]
seconds = 600.0   # then idle
sm_clock_mhz = 1410
power_watts = 380.0
sm_active = 0.9
pipes = { hmma = 0.5, any_tensor = 0.5 }
processes = ["borealis"]

[processes.atlas]
pid = 4242
create_time_unix = 1764000000.0
user = "alice"
command = "python train.py"
environ = { FLOPLEDGER_PROJECT = "atlas", FLOPLEDGER_PRECISION = "bf16" }

[processes.untagged]
pid = 4243
create_time_unix = 1764000000.0
user = "bob"
command = "python other.py"

[processes.borealis]
pid = 4244
create_time_unix = 1764000000.0
user = "carol"
command = "python tune.py"
environ = { FLOPLEDGER_PROJECT = "borealis" }
"""

CONFIGURATION: Final = """
[web]
listen_address = "{address}"
[state]
directory = "{folder}/{name}"
[clock]
speed = {speed}
real_origin_unix_ns = {now_ns}
origin_unix_ns = {origin_ns}
"""

COLLECTOR: Final = """
[ledger]
simulated = true
"""

AGENT: Final = """
[collector]
url = "http://{collector}"
jitter_seconds = 0
[node]
name = "node-1"
cluster = "test"
[tags]
socket = "{folder}/tags.sock"
[gpus]
driver = "simulated"
scenario = "{folder}/scenario.toml"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The running daemons and the Prometheus that scrapes them."""

    prometheus: Prometheus
    addresses: Mapping[str, str]  # of the daemons' web servers, by name

    def page(self, name: str) -> str:
        """A daemon's page as it is now."""
        return _metrics(self.addresses[name]).raise_for_status().text

    def folded(self) -> int:
        """Batches that the totals of the collector's page hold."""
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(self.page("collector"))
            for sample in family.samples
        }
        return int(values["flopledger_journal_entries"] - values["flopledger_fold_lag_batches"])

    def wait_for(self, what: str, attempt: Callable[[], _Answer | None]) -> _Answer:
        """The answer, as soon as Prometheus has scraped what it is made of."""
        return wait_for(what, attempt, DATA_SECONDS, self.prometheus.scrapes)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FLOPLEDGER_")}


@contextmanager
def _daemon(command: list[str], address: str, log: Path) -> Iterator[None]:
    """Run until the block ends, from when it shows its page; it must stop when asked."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )

    def up() -> bool:
        assert process.poll() is None, f"ended: {log.read_text(encoding='utf-8')}"
        try:
            return _metrics(address).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    try:
        wait_for(f"{address} (see {log})", up, DATA_SECONDS)
        yield
        assert process.poll() is None, f"ended: {log.read_text(encoding='utf-8')}"
        process.terminate()
        process.wait(timeout=COMMAND_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(timeout=COMMAND_SECONDS)


def _metrics(address: str) -> httpx.Response:
    return httpx.get(f"http://{address}/metrics", timeout=COMMAND_SECONDS, trust_env=False)


def _flopledger(config: Path, *arguments: str) -> None:
    done = subprocess.run(
        [_program("flopledger"), *arguments, "--config", str(config)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"


def _configure(folder: Path, addresses: Mapping[str, str]) -> dict[str, Path]:
    now_ns = time.time_ns()
    (folder / "scenario.toml").write_text(SCENARIO, encoding="utf-8")
    paths: dict[str, Path] = {}
    for name, own in (("collector", COLLECTOR), ("agent", AGENT)):
        paths[name] = folder / f"{name}.toml"
        values = {
            "address": addresses[name],
            "collector": addresses["collector"],
            "folder": folder,
            "name": name,
            "speed": SPEED,
            "now_ns": now_ns,
            "origin_ns": now_ns - BEHIND_SECONDS * NS_PER_SECOND,
        }
        paths[name].write_text((CONFIGURATION + own).format(**values), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A collector with one opened project and its budget, an agent, and a Prometheus."""
    require_program("prometheus")
    folder = tmp_path_factory.mktemp("system")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("collector", "agent")}
    paths = _configure(folder, addresses)
    with ExitStack() as stack:
        collect = [_program("flopledger"), "serve", "--config", str(paths["collector"])]
        stack.enter_context(_daemon(collect, addresses["collector"], folder / "collector.log"))
        _flopledger(paths["collector"], "project", "create", "atlas")
        _flopledger(paths["collector"], "budget", "set", "atlas", "--flop", "1e15")
        _flopledger(paths["collector"], "declare", "usage", "atlas", *DECLARED_COST)
        meter = [_program("flopledger-agent"), "run", "--config", str(paths["agent"])]
        stack.enter_context(_daemon(meter, addresses["agent"], folder / "agent.log"))
        targets = {f"flopledger-{name}": [address] for name, address in addresses.items()}
        server = stack.enter_context(running_prometheus(folder, targets))
        found = System(prometheus=server, addresses=addresses)
        # The entries of people are folded too, so there are a few more than batches.
        wait_for(
            "batches of the agent",
            lambda: found.folded() > BATCHES_LEAST,
            DATA_SECONDS,
            found.folded,
        )
        found.wait_for("targets and rules up", lambda: not server.unhealthy())
        yield found


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: str(query.place))
def test_panel_query_returns_data(system: System, query: Query) -> None:
    """No query is exempt: the system has gaps, failures, a budget and a declared cost to show."""
    system.wait_for(
        query.place,
        lambda: answers(system.prometheus, query, project=".+", policy="ec-cumulative"),
    )


@pytest.mark.parametrize("variable", variables(), ids=lambda variable: str(variable.name))
def test_variable_offers_choices(system: System, variable: Variable) -> None:
    """Projects seen in usage and the adopted policies can be chosen."""
    expected = {"project": {"atlas", "borealis"}, "policy": {"ec-cumulative"}}[variable.name]
    metric = variable.metric.replace("$project", ".+")
    system.wait_for(
        variable.name,
        lambda: expected <= set(system.prometheus.label_values(variable, metric)),
    )


@pytest.mark.parametrize("query", rule_queries(), ids=lambda query: str(query.place))
def test_rule_raises_its_alert(system: System, query: Query) -> None:
    """An exceeded budget and a node that looks silent become alerts in Prometheus itself."""
    raised = system.wait_for(
        query.place,
        lambda: [
            alert
            for alert in system.prometheus.alerts()
            if alert["labels"]["alertname"] == query.place
        ],
    )
    assert {alert["state"] for alert in raised} <= {"pending", "firing"}
    assert all("<no value>" not in text for one in raised for text in one["annotations"].values())


@pytest.mark.parametrize("name", ["agent", "collector"])
def test_real_page_passes_the_metric_linter(system: System, name: str) -> None:
    """What the daemon really shows follows Prometheus' naming rules."""
    done = subprocess.run(
        [require_program("promtool"), "check", "metrics"],
        input=system.page(name),
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["agent", "collector"])
def test_golden_page_is_true_to_the_daemon(system: System, name: str) -> None:
    """Each sample of the golden page has, on the real page, one of its name, type and labels."""

    def shapes(text: str) -> set[tuple[str, str, frozenset[str]]]:
        return {
            (sample.name, family.type, frozenset(sample.labels))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    golden = shapes(page(name))
    system.wait_for(
        f"{name}: everything of the golden page", lambda: not golden - shapes(system.page(name))
    )
