"""Schedulers end to end: a prolog or kubelet says whose a device is, until it no longer does.

The agent is the real daemon on simulated GPUs; the job files are written by the shipped prolog, and
the kubelet is a real gRPC server.
"""

from __future__ import annotations

import subprocess
import threading
import time
import urllib.request
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec
import pytest

from flopledger_agent.config import parse_config
from flopledger_agent.daemon import Daemon
from flopledger_agent.errors import ConfigError
from flopledger_agent.inspection import as_lines, inspect
from flopledger_core.batch import decode
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.attribution.kubernetes_servers import encoded, kubelet_serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.interface import Claim
    from flopledger_agent.config import AgentConfig

DEPLOY = Path(__file__).parents[2] / "deploy" / "slurm"
HELD, BUSY = "GPU-11111111-1111-4111-8111-111111111111", "GPU-22222222-2222-4222-8222-222222222222"
DEADLINE_SECONDS = 20.0
SCENARIO = f"""driver_version = "595.71.05"
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
uuid = "{HELD}"
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
uuid = "{BUSY}"
[[gpus.phases]]
seconds = 86400
sm_clock_mhz = 1755
power_watts = 600
sm_active = 0.9
pipes = {{ hmma = 0.5 }}
processes = ["train"]
[processes.train]
pid = 10000001
user = "alice"
environ = {{ FLOPLEDGER_PROJECT = "atlas" }}
"""
GRANTED = encoded(
    {"pod_resources": [{"name": "trainer-0", "namespace": "research", "containers": [
        {"name": "main", "devices": [
            {"resource_name": "nvidia.com/gpu", "device_ids": [HELD]}]}]}]}
)  # fmt: skip


def configured(root: Path, more: str) -> AgentConfig:
    """An agent on two simulated GPUs in real time, whose collector is not at home."""
    (root / "scenario.toml").write_text(SCENARIO)
    text = (
        f'[collector]\nurl = "http://127.0.0.1:9"\ntimeout_seconds = 1\n[node]\nname = "n1"\n'
        f'[state]\ndirectory = "{root}/state"\n[tags]\nsocket = "{root}/tags.sock"\n'
        f'[web]\nlisten_address = "127.0.0.1:0"\n[sampling]\ninterval_seconds = 0.5\n'
        f'[gpus]\ndriver = "simulated"\nscenario = "{root}/scenario.toml"\n{more}'
    )
    return parse_config(text, "test")


def slurm(root: Path, script: str, job_id: int) -> None:
    """Run the shipped prolog or epilog as slurmd does, for a job with both GPUs."""
    ran = subprocess.run(
        [str(DEPLOY / script)],
        env={
            "FLOPLEDGER_SLURM_FOLDER": str(root / "jobs"), "FLOPLEDGER_GPU_MINORS": "0 1",
            "SLURM_JOB_ID": str(job_id), "SLURM_JOB_USER": "alice", "SLURMD_NODENAME": "n1",
            "SLURM_JOB_GPUS": "0,1", "SLURM_JOB_ACCOUNT": "acc",
        },
        timeout=30, check=True, capture_output=True,
    )  # fmt: skip
    assert ran.stderr == b""


class Running:
    """A daemon in a thread, for the length of a `with` block."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._stop = threading.Event()
        self.daemon = Daemon(config, self._stop)
        self._status: list[int] = []
        self._thread = threading.Thread(target=lambda: self._status.append(self.daemon.run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert self._status == [0]

    def claims(self, device: str) -> tuple[Claim, ...]:
        """Whose a device is at the last tick."""
        return self.daemon._loop.view.claims.get(device, ())

    def until(self, device: str, job: str | None, project: str) -> Claim:
        """Wait until a device is one owner's."""
        wait_until(lambda: [(c.owner.job, c.owner.account) for c in self.claims(device)]
                   == [(job, project)])  # fmt: skip
        return self.claims(device)[0]

    def page(self) -> str:
        """The metrics now."""
        port = self.daemon._server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def records(self) -> list[UsageRecord | GapRecord]:
        """What was sealed of devices, once the daemon ended."""
        spool = Path(self.config.state.directory) / "spool"
        batches = [decode(path.read_bytes()) for path in sorted(spool.glob("*.batch"))]
        return [
            record
            for batch in batches
            for record in batch.records
            if isinstance(record, UsageRecord | GapRecord)
        ]


def wait_until(true: Callable[[], object]) -> None:
    """Poll with a deadline."""
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def test_a_job_of_slurm_holds_its_idle_gpu_from_prolog_to_epilog(tmp_path: Path) -> None:
    """The GPU it leaves idle is its own, under the project that its process on the other named."""
    agent = Running(configured(tmp_path, f'[slurm]\nfolder = "{tmp_path}/jobs"\n'))
    with agent:
        agent.until(HELD, None, "idle")
        agent.until(BUSY, None, "atlas")
        slurm(tmp_path, "prolog.sh", 41)
        held = agent.until(HELD, "41", "atlas")
        busy = agent.until(BUSY, "41", "atlas")
        wait_until(lambda: "flopledger_agent_allocation_ghosts 0.0" in agent.page())
        assert 'job_id="41"' in agent.page()
        slurm(tmp_path, "epilog.sh", 41)
        agent.until(HELD, None, "idle")
        agent.until(BUSY, None, "atlas")

    assert (held.source, held.user, held.allocated) == ("environment", "alice", True)
    assert (busy.source, busy.user, busy.allocated) == ("environment", "alice", True)
    assert held.evidence is not None
    assert "41.n1.job" in held.evidence
    # On a machine that is busy with other tests the agent may be late, which makes a gap.
    timed = sorted(
        (one for one in agent.records() if one.device.key == HELD),
        key=lambda one: one.start_boot_ms or 0,
    )
    mine = [one for one in timed if isinstance(one, UsageRecord)]
    if len(mine) == len(timed):
        assert [one.end_boot_ms for one in mine[:-1]] == [one.start_boot_ms for one in mine[1:]]
    assert [job for job, _ in groupby(one.owner.job for one in mine)] == [None, "41", None]
    # Until the reading that found the tagged process, nobody had named a project.
    its = [one for one in mine if one.owner.job == "41"]
    accounts = [account for account, _ in groupby(one.owner.account for one in its)]
    assert accounts in (["atlas"], ["unattributed", "atlas"])
    for one in its:
        assert one.allocated_time_ms == one.end_boot_ms - one.start_boot_ms


def test_a_job_that_ran_before_the_agent_holds_its_gpu_from_the_first_reading(
    tmp_path: Path,
) -> None:
    """No reading says `idle` of a GPU that was held all the time."""
    slurm(tmp_path, "prolog.sh", 42)
    agent = Running(configured(tmp_path, f'[slurm]\nfolder = "{tmp_path}/jobs"\n'))
    with agent:
        agent.until(HELD, "42", "atlas")

    owners = {one.owner.job for one in agent.records() if isinstance(one, UsageRecord)}
    assert owners == {"42"}


def test_a_pod_holds_its_idle_gpu_while_kubelet_lists_it(tmp_path: Path) -> None:
    """From the list that names it to the first that does not."""
    path = tmp_path / "kubelet.sock"
    section = f'[kubernetes]\nkubelet_socket = "{path}"\napi = false\ninterval_seconds = 1\n'
    with kubelet_serving(path, GRANTED) as kubelet, Running(configured(tmp_path, section)) as agent:
        claim = agent.until(HELD, "research/trainer-0", "unattributed")
        assert (claim.source, claim.allocated) == ("scheduler", True)
        agent.until(BUSY, None, "atlas")  # nobody granted it: its process tells
        kubelet.answer = encoded({})
        agent.until(HELD, None, "idle")
        kubelet.stop()
        wait_until(lambda: "flopledger_agent_allocation_troubles 1.0" in agent.page())


def test_a_kubelet_that_hangs_stops_no_reading(tmp_path: Path) -> None:
    """The agent reads on without its word, and believes it when it comes."""
    path = tmp_path / "kubelet.sock"
    section = f'[kubernetes]\nkubelet_socket = "{path}"\napi = false\ntimeout_seconds = 60\n'
    with kubelet_serving(path, GRANTED) as kubelet:
        kubelet.hold.clear()
        with Running(configured(tmp_path, section)) as agent:
            agent.until(HELD, None, "idle")
            ticks = agent.daemon._ticks
            wait_until(lambda: agent.daemon._ticks > ticks + 3)
            kubelet.hold.set()
            agent.until(HELD, "research/trainer-0", "unattributed")


def test_check_names_the_job_of_each_gpu_and_what_is_wrong(tmp_path: Path) -> None:
    """The owner comes with the job file; a folder open to others comes with its remedy."""
    slurm(tmp_path, "prolog.sh", 43)
    config = configured(tmp_path, f'[slurm]\nfolder = "{tmp_path}/jobs"\n')

    owners = {one.uuid: " ".join(one.owners) for one in inspect(config).owners}
    assert "43.n1.job" in owners[HELD]
    assert "43.n1.job" in owners[BUSY]

    (tmp_path / "jobs").chmod(0o777)
    lines = as_lines(inspect(config))
    assert [line for line in lines if line.startswith("scheduler: ") and "mode 755" in line]


def test_nothing_is_asked_without_a_table() -> None:
    """Off by default; a table switches a scheduler on, and paths in it are absolute."""
    config = parse_config("", "test")
    assert config.slurm is None
    assert config.kubernetes is None

    config = parse_config("[slurm]\n[kubernetes]\n", "test")
    assert config.slurm is not None
    assert config.slurm.folder == "/run/flopledger-agent/slurm"
    assert config.kubernetes is not None
    with pytest.raises(ConfigError, match="folder"):
        parse_config('[slurm]\nfolder = "jobs"\n', "test")


def test_a_pod_knows_its_node_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """NODE_NAME is the node's name unless the file says another one."""
    monkeypatch.setenv("NODE_NAME", "worker-7")
    assert parse_config("", "test").node.name == "worker-7"
    assert parse_config('[node]\nname = "n1"\n', "test").node.name == "n1"


def test_a_source_that_cannot_be_built_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a pod nobody says where the API server is; nothing was locked or started by then."""
    for name in ("NODE_NAME", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    config = configured(tmp_path, "[kubernetes]\n")
    with pytest.raises(ConfigError, match="kubernetes"):
        Daemon(config, threading.Event())
    config = msgspec.structs.replace(config, kubernetes=None)
    with Running(config) as agent:
        agent.until(HELD, None, "idle")
