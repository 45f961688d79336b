"""The demo's stage: configurations, an opened ledger with its opening entries, free ports.

Everything lies in one temporary directory; nothing outside it is touched.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_collector.clocks import ScaledClockConfig
from flopledger_collector.config import parse_config
from flopledger_collector.demo.cluster import build_cluster
from flopledger_collector.demo.recorded import PROVENANCE
from flopledger_collector.handle import open_ledger
from flopledger_core.records import BudgetSet, Declaration, ProjectOpened
from flopledger_core.units import MS_PER_DAY, NS_PER_MS, NS_PER_SECOND

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_collector.config import CollectorConfig
    from flopledger_collector.demo.cluster import DemoCluster
    from flopledger_core.records import PersonRecord

SPEED: Final = 60
TICK_SECONDS: Final = 5  # of scaled time; twelve a second really
MARGIN_SECONDS: Final = 900  # of schedule beyond the end, so that the last minute is as busy
COLLECTOR_PORT: Final = 16180
AUTHOR: Final = "demo"
BUDGET_FLOP: Final = 10**20
OPENING_FLOP: Final = (
    78 * 10**23,
    94 * 10**23,
    99 * 10**23,
)  # low, central, high of the declaration


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything is."""

    directory: Path
    cluster: DemoCluster
    config: CollectorConfig
    clock: ScaledClockConfig
    url: str
    agent_urls: tuple[str, ...]

    @property
    def collector_file(self) -> Path:
        """The collector's configuration."""
        return self.directory / "collector.toml"

    def agent_file(self, node: str) -> Path:
        """An agent's configuration."""
        return self.directory / node / "agent.toml"

    def virtual_unix_ns(self) -> int:
        """The time on the demo's clock."""
        return self.clock.origin_unix_ns + self.virtual_elapsed_ns()

    def virtual_elapsed_ns(self) -> int:
        """Scaled time since the clock's origin."""
        return (time.time_ns() - self.clock.real_origin_unix_ns) * self.clock.speed


def set_stage(directory: Path, nodes: int, seconds: int, seed: int) -> Stage:
    """Write the collector's configuration and build the cluster; agents come later."""
    now_ns = time.time_ns()
    minute_ns = 60 * NS_PER_SECOND
    clock = ScaledClockConfig(
        speed=SPEED,
        real_origin_unix_ns=now_ns,
        origin_unix_ns=now_ns // minute_ns * minute_ns,
    )
    ports = free_ports(nodes + 1)
    text = (
        f'[web]\nlisten_address = "127.0.0.1:{ports[0]}"\n'
        f'[state]\ndirectory = "{directory}/collector"\n'
        "[ledger]\nsimulated = true\n"
        f"provenance = {provenance_toml()}\n" + clock_table(clock)
    )
    (directory / "collector.toml").write_text(text, encoding="utf-8")
    cluster = build_cluster(
        nodes,
        seed,
        virtual_seconds=seconds * SPEED + MARGIN_SECONDS,
        start_unix_seconds=clock.origin_unix_ns // NS_PER_SECOND,
    )
    return Stage(
        directory=directory,
        cluster=cluster,
        config=parse_config(text),
        clock=clock,
        url=f"http://127.0.0.1:{ports[0]}",
        agent_urls=tuple(f"http://127.0.0.1:{port}" for port in ports[1:]),
    )


def write_agents(stage: Stage) -> None:
    """Write each node's scenario and configuration; the schedule begins now."""
    start_ns = stage.virtual_elapsed_ns() + NS_PER_SECOND
    for index, (node, url) in enumerate(zip(stage.cluster.nodes, stage.agent_urls, strict=True)):
        directory = stage.directory / node.name
        directory.mkdir()
        (directory / "scenario.toml").write_text(
            f"start_boottime_ns = {start_ns}\n{node.scenario}", encoding="utf-8"
        )
        stage.agent_file(node.name).write_text(
            f'[collector]\nurl = "{stage.url}"\njitter_seconds = 5\n'
            f'[node]\nname = "{node.name}"\ncluster = "{node.cluster}"\n'
            f'[state]\ndirectory = "{directory}/state"\n'
            f'[tags]\nsocket = "{stage.directory}/{index}"\n'
            f'[web]\nlisten_address = "{url.removeprefix("http://")}"\n'
            f"[sampling]\ninterval_seconds = {TICK_SECONDS}\n"
            f'[gpus]\ndriver = "simulated"\nscenario = "{directory}/scenario.toml"\n'
            + clock_table(stage.clock),
            encoding="utf-8",
        )


def provenance_toml() -> str:
    """The demo's inputs as sentences for every statement, as a TOML array."""
    sentences = [
        f"{item.kind}: {item.what}. Source: {item.source} ({item.licence}). Here: {item.changes}."
        for item in PROVENANCE
    ]
    return json.dumps(sentences)  # a JSON array of strings is a TOML one


def clock_table(clock: ScaledClockConfig) -> str:
    """The `[clock]` table that every process of the demo shares."""
    return (
        f"[clock]\nspeed = {clock.speed}\nreal_origin_unix_ns = {clock.real_origin_unix_ns}\n"
        f"origin_unix_ns = {clock.origin_unix_ns}\n"
    )


def post_opening_entries(stage: Stage) -> None:
    """Open the projects, set the budgets, declare birch's opening balance."""
    at_ms = stage.virtual_unix_ns() // NS_PER_MS
    with open_ledger(stage.config) as handle:
        for project, title in (
            ("atlas", "pre-training of a new model"),
            ("birch", "continued development of an existing model"),
            ("cedar", "evaluation"),
        ):
            handle.entries.post(
                ProjectOpened(
                    project=project, entity="demo", title=title, at_unix_ms=at_ms, author=AUTHOR
                )
            )
        for entry in opening_entries(at_ms):
            handle.entries.post(entry)


def opening_entries(at_ms: int) -> tuple[PersonRecord, ...]:
    """The entries a person would have made before the meters ran."""
    low, central, high = (str(amount) for amount in OPENING_FLOP)
    return (
        BudgetSet(
            project="atlas", name="compute", quantity="flop", currency=None,
            limit=str(BUDGET_FLOP), at_unix_ms=at_ms, author=AUTHOR,
        ),
        BudgetSet(
            project="atlas", name="energy", quantity="energy_mj", currency=None,
            limit=str(60 * 3_600_000_000), at_unix_ms=at_ms, author=AUTHOR,
        ),
        Declaration(
            project="birch", model=None, run=None, activity="pretrain",
            start_unix_ms=at_ms - 365 * MS_PER_DAY, end_unix_ms=at_ms,
            flop_low=low, flop_central=central, flop_high=high, flop_basis="executed",
            integer_operations="0",
            energy_mj=None, gpu_time_ms=None, cost_cents=None, currency=None,
            method="opening balance: an invented figure for this demonstration",
            evidence=None, at_unix_ms=at_ms, author=AUTHOR,
        ),
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """The collector's own port if it is free, then any free ones, all on loopback."""
    ports: list[int] = []
    with closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", COLLECTOR_PORT)) != 0:
            ports.append(COLLECTOR_PORT)
    held: list[socket.socket] = []
    while len(ports) < count:
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        held.append(taken)
        ports.append(int(taken.getsockname()[1]))
    for taken in held:
        taken.close()
    return ports
