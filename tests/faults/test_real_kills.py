"""Real processes killed at seeded moments: every sealed record arrives once, time has no hole."""

from __future__ import annotations

import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import pytest

from flopledger_core.batch import decode
from flopledger_core.records import GapRecord, UsageRecord
from flopledger_core.signing import verify

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from flopledger_core.batch import SealedBatch

pytestmark = pytest.mark.slow

SCENARIO = """driver_version = "595.71.05"
start_boottime_ns = 1000000000
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 86400
sm_clock_mhz = 1755
power_watts = 600
sm_active = 0.9
pipes = { hmma = 0.5 }
processes = ["train"]
[[gpus]]
model = "NVIDIA H200"
[processes.train]
pid = 10000001
environ = { FLOPLEDGER_PROJECT = "atlas", FLOPLEDGER_PRECISION = "bf16" }
"""
SPEED = 60
DEADLINE_SECONDS = 60.0


def free_port() -> int:
    """A port nobody listens on now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """One collector and one agent as real processes in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        clock = (
            f"[clock]\nspeed = {SPEED}\nreal_origin_unix_ns = {time.time_ns()}\n"
            "origin_unix_ns = 1764000000000000000\n"
        )
        (root / "scenario.toml").write_text(SCENARIO)
        (root / "collector.toml").write_text(
            f'[web]\nlisten_address = "127.0.0.1:{self.port}"\n'
            f'[state]\ndirectory = "{root}/ledger"\n[ledger]\nsimulated = true\n{clock}'
        )
        (root / "agent.toml").write_text(
            f'[collector]\nurl = "http://127.0.0.1:{self.port}"\njitter_seconds = 0\n'
            f'[node]\nname = "n1"\n[state]\ndirectory = "{root}/agent"\n'
            f'[tags]\nsocket = "{root}/tags.sock"\n[web]\nlisten_address = "127.0.0.1:0"\n'
            f'[gpus]\ndriver = "simulated"\nscenario = "{root}/scenario.toml"\n{clock}'
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.start("collector")
        self.start("agent")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE_SECONDS)

    def start(self, name: str) -> None:
        """Start one of the two."""
        module = f"flopledger_{name}"
        verb = "serve" if name == "collector" else "run"
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, verb, "--config", str(self.root / f"{name}.toml")],
                stdout=log,
                stderr=log,
            )

    def kill(self, name: str) -> None:
        """SIGKILL and start again."""
        self.processes[name].kill()
        self.processes[name].wait(DEADLINE_SECONDS)
        self.start(name)

    def stop(self, name: str) -> None:
        """SIGTERM; it must end by itself with status 0."""
        self.processes[name].send_signal(signal.SIGTERM)
        assert self.processes[name].wait(DEADLINE_SECONDS) == 0

    def journal(self) -> list[SealedBatch]:
        """Every agent batch in the journal, by stream and sequence."""
        database = self.root / "ledger" / "ledger.sqlite3"
        if not database.exists():
            return []
        with closing(
            sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
        ) as connection:
            try:
                rows = connection.execute(
                    "SELECT content FROM journal ORDER BY stream_id, sequence"
                ).fetchall()
            except sqlite3.OperationalError:
                return []  # not founded yet
        batches = [decode(row[0]) for row in rows]
        return [batch for batch in batches if batch.header.author == "agent"]

    def spooled(self) -> int:
        """Batches that the collector has not confirmed."""
        return len(list((self.root / "agent" / "spool").glob("*.batch")))

    def wait_for(self, what: str, pause: threading.Event, *, more_than: int) -> None:
        """Poll until the journal has more entries than this."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(self.journal()) <= more_than:
            assert time.monotonic() < deadline, f"{what}: {(self.root / 'agent.log').read_text()}"
            pause.wait(0.1)


def check_time_and_energy(batches: list[SealedBatch]) -> None:
    """Per device, records follow each other without hole or overlap; energy equals the counter."""
    spans: dict[str, dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    energy: dict[str, int] = defaultdict(int)
    counters: dict[str, list[int]] = defaultdict(list)
    first: dict[str, int] = {}
    for batch in batches:
        for record in batch.records:
            assert not isinstance(record, GapRecord), record
            assert isinstance(record, UsageRecord)
            span = (record.start_boot_ms, record.end_boot_ms)
            spans[record.device.key][span] += record.gpu_time_ms
            assert record.energy_mj is not None
            assert record.energy_counter_mj is not None
            energy[record.device.key] += record.energy_mj
            counters[record.device.key].append(record.energy_counter_mj)
            first.setdefault(record.device.key, record.energy_counter_mj - record.energy_mj)
    assert set(spans) == set(energy)
    assert len(spans) == 2
    for device, found in spans.items():
        ordered = sorted(found)
        assert all(left[1] == right[0] for left, right in pairwise(ordered)), device
        assert all(time_ms == end - start for (start, end), time_ms in found.items())
        assert energy[device] == max(counters[device]) - first[device]


def kill_at_random(root: Path, seed: int) -> None:
    """Eight kills at random moments, then a clean stop: one unbroken stream, exact energy."""
    chance = random.Random(seed)
    pause = threading.Event()
    with Cluster(root) as cluster:
        cluster.wait_for("first minute", pause, more_than=0)
        for _ in range(8):
            pause.wait(chance.uniform(0.05, 1.5))
            cluster.kill(chance.choice(["agent", "agent", "collector"]))
        cluster.wait_for("after the kills", pause, more_than=len(cluster.journal()) + 1)
        cluster.stop("agent")
        batches = cluster.journal()
        assert cluster.spooled() == 0
        with urllib.request.urlopen(
            f"http://127.0.0.1:{cluster.port}/healthz", timeout=10
        ) as response:
            assert response.status == 200
        cluster.stop("collector")
    for batch in batches:
        verify(batch.header.public_key, batch.signature, batch.header_bytes)

    assert len({batch.header.stream_id for batch in batches}) == 1
    assert [batch.header.sequence for batch in batches] == list(range(len(batches)))
    check_time_and_energy(batches)


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_of_agent_and_collector_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    """Two seeds that every run repeats."""
    kill_at_random(tmp_path, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 125))
def test_kills_at_two_hundred_moments(tmp_path: Path, seed: int) -> None:
    """Twenty-five seeds, eight kills each."""
    kill_at_random(tmp_path, seed)
