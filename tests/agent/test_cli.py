"""The agent's command line: what it does with what it cannot read, and which tags it passes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from flopledger_agent.attribution import tag_client
from flopledger_agent.cli import main
from flopledger_agent.spool import file_name
from tests.agent.sealing import sealed
from tests.agent.test_daemon import config_text, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flopledger_agent.attribution.tag_values import Tags

STREAM = "ab" * 16


def command(*arguments: str) -> tuple[int, str]:
    """Run a command: its exit status and everything it said."""
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration file whose state directory is not there yet."""
    path = tmp_path / "agent.toml"
    path.write_text(config_text(tmp_path))
    return str(path)


def test_an_absent_spool_is_no_empty_spool(config: str) -> None:
    """A wrong path must not look like a spool that is delivered."""
    status, said = command("spool", "--config", config)

    assert status == 2
    assert "state.directory" in said
    assert "0 batches" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_an_unreadable_spool_is_no_empty_spool(config: str, tmp_path: Path) -> None:
    """The same for another user's directory."""
    (tmp_path / "state").mkdir(mode=0)

    assert command("spool", "--config", config)[0] == 2


def test_the_spool_tells_depth_age_and_quarantine(config: str, tmp_path: Path) -> None:
    """What an operator asks: how much, since when, whose, and what is odd."""
    state = tmp_path / "state"
    for name in ("spool", "quarantine"):
        (state / name).mkdir(parents=True)
    for sequence in (3, 4):
        (state / file_name(STREAM, sequence)).write_bytes(sealed(STREAM, sequence))
    status, empty = command("spool", "--config", config, "--format", "json")
    (state / "quarantine" / "odd").write_bytes(b"?")
    found, said = command("spool", "--config", config)

    assert (status, found) == (0, 1)
    assert json.loads(empty)["streams"] == [
        {"stream_id": STREAM, "batches": 2, "first_sequence": 3, "last_sequence": 4}
    ]
    assert json.loads(empty)["oldest_age_seconds"] is not None
    assert "2 batches wait" in said
    assert "odd" in said


def test_time_may_not_stand_still(tmp_path: Path) -> None:
    """A speed of zero is refused with its key, not divided by."""
    path = tmp_path / "agent.toml"
    path.write_text(config_text(tmp_path, speed="0"))
    status, said = command("run", "--check-config", "--config", str(path))

    assert status == 2
    assert "clock.speed" in said


def test_check_tells_of_the_socket_and_the_state_directory(config: str, tmp_path: Path) -> None:
    """Whether an agent runs here, and what only that agent knows; nothing is made."""
    silent = command("check", "--config", config)[1]
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(f"{tmp_path}/tags.sock")
        listener.listen(1)
        spoken = command("check", "--config", config)[1]

    assert f"nobody answers at {tmp_path}/tags.sock" in silent
    assert "known to that agent alone" in spoken
    assert f"state directory: {tmp_path}/state" in spoken
    assert not (tmp_path / "state").exists()


class Job:
    """The command that `tag` became, as the two ways of attribution see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registered: Tags | None = None
        self.environ: dict[str, str] = {}
        monkeypatch.setattr(tag_client, "register", self._register)
        monkeypatch.setattr(os, "execvpe", self._execute)

    def _register(self, _path: Path, tags: Tags) -> None:
        self.registered = tags

    def _execute(self, _file: str, _arguments: Sequence[str], environ: dict[str, str]) -> None:
        ours = {name: value for name, value in environ.items() if name.startswith("FLOPLEDGER_")}
        self.environ = ours


def test_inherited_tags_go_both_ways_and_options_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attribution is the same by socket and by environment."""
    job = Job(monkeypatch)
    for name, value in {"PROJECT": "old", "RUN": "r1", "ACTIVITY": "pretrain", "JOB": "7"}.items():
        monkeypatch.setenv(f"FLOPLEDGER_{name}", value)
    command("tag", "--project", "atlas", "--activity", "sft", "--", "true")

    assert job.registered is not None
    assert job.registered.environment() == job.environ
    assert job.environ == {
        "FLOPLEDGER_PROJECT": "atlas",
        "FLOPLEDGER_RUN": "r1",
        "FLOPLEDGER_ACTIVITY": "sft",
        "FLOPLEDGER_JOB": "7",
    }


def test_an_inherited_tag_that_is_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job does not fail because of somebody else's variable."""
    job = Job(monkeypatch)
    monkeypatch.setenv("FLOPLEDGER_ACTIVITY", "nonsense")
    said = command("tag", "--project", "atlas", "--", "true")[1]

    assert "FLOPLEDGER_ACTIVITY of the environment is left out" in said
    assert job.environ == {"FLOPLEDGER_PROJECT": "atlas"}


def test_a_job_runs_without_the_agents_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file is a warning; a project that is none stays misuse."""
    job = Job(monkeypatch)
    said = command("tag", "--config", "/nonexistent.toml", "--project", "atlas", "--", "true")[1]
    status, _ = command("tag", "--project", "not an id", "--", "true")

    assert "using the default socket" in said
    assert job.environ == {"FLOPLEDGER_PROJECT": "atlas"}
    assert status == 2


def opened_for_writing(gate: Path) -> int:
    """A descriptor of a fifo, once somebody reads from it; fails when nobody does in time."""
    found: list[int] = []

    def opened() -> bool:
        try:
            found.append(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads yet
                raise
        return bool(found)

    wait_until(opened)
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_is_a_clean_end(
    config: str, tmp_path: Path, number: signal.Signals
) -> None:
    """From the first moment of the command on, a signal ends the agent with status 0."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = Path(config).read_text()
    with subprocess.Popen(
        [sys.executable, "-m", "flopledger_agent", "run", "--config", str(gate)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as agent:
        with os.fdopen(opened_for_writing(gate), "w") as file:  # the agent is starting
            agent.send_signal(number)
            threading.Event().wait(0.1)
            file.write(text)
        _, said = agent.communicate(timeout=60)

    assert agent.returncode == 0, said
    assert "Aborted" not in said
