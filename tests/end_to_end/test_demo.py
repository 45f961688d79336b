"""The demo as a person runs it: it ends well, or is interrupted, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

DEMO_SECONDS = 25  # long enough for the first sealed minutes of all four agents
DEADLINE_SECONDS = 240.0  # the whole run on a busy machine with two cores


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo in a directory of its own, with its temporary files beside."""
    (directory / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "flopledger_collector", "demo", *arguments],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory / "tmp"), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def relatives(directory: Path) -> list[psutil.Process]:
    """Processes that were told of this directory: children of a demo in it."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if any(str(directory) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_demo_ends_well_and_leaves_only_its_results(tmp_path: Path) -> None:
    """Exit 0, statements of all projects, a readable ledger, no process, no temporary file."""
    demo = start(tmp_path, "--seconds", str(DEMO_SECONDS))
    told, _ = demo.communicate(timeout=DEADLINE_SECONDS)

    assert demo.returncode == 0, told
    assert relatives(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "recorded: " in told
    assert "synthetic: " in told
    results = tmp_path / "flopledger-demo"
    statement = json.loads((results / "statement-atlas.json").read_text())
    assert statement["simulated"] is True
    assert int(statement["flop"]["central"]) > 10**18
    text = (results / "statement-birch.md").read_text()
    assert "opening balance" in text
    assert "synthetic" in text
    status = subprocess.run(
        [sys.executable, "-m", "flopledger_collector", "status", "--format", "json",
         "--config", str(results / "collector.toml")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert {p["project"]["project"] for p in json.loads(status.stdout)["projects"]} >= {
        "atlas",
        "birch",
        "cedar",
    }


@pytest.mark.parametrize("after_children", [0, 1, 5])
def test_ctrl_c_at_any_time_leaves_nothing(tmp_path: Path, after_children: int) -> None:
    """Interrupted while setting up, while starting, and while running."""
    demo = start(tmp_path)
    deadline = time.monotonic() + 90
    while len(relatives(tmp_path)) < after_children and time.monotonic() < deadline:
        assert demo.poll() is None
    demo.send_signal(signal.SIGINT)
    told, _ = demo.communicate(timeout=DEADLINE_SECONDS)

    assert demo.returncode == 130 or after_children == 0, told
    assert relatives(tmp_path) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "flopledger-demo").exists()
