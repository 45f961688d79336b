"""`flopledger serve` as a process: it comes up, answers, and goes down without debris."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flopledger_collector.app import bind, url_of
from flopledger_collector.errors import ConfigInvalid
from tests.collector.cli.commands import shell

START_SECONDS = 60.0
STOP_SECONDS = 60.0


@contextmanager
def serving(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A collector on a free port, and its URL."""
    ledger = shell(directory, '[web]\nlisten_address = "127.0.0.1:0"\n')
    with subprocess.Popen(
        [sys.executable, "-m", "flopledger_collector", "serve", "--config",
         str(ledger.config_file)],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert ", serving http://127.0.0.1:" in line, line
            url = line.split("serving ")[1].strip()
            _await(f"{url}/healthz")
            yield process, url
        finally:
            if process.poll() is None:
                process.kill()


def _await(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < deadline, "the collector does not answer"
            time.sleep(0.05)
        else:
            return


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_it_well(tmp_path: Path, stop: signal.Signals) -> None:
    """SIGTERM and Ctrl-C close the ledger and exit 0, quietly."""
    with serving(tmp_path) as (process, url):
        assert urllib.request.urlopen(f"{url}/metrics", timeout=10).status == 200
        process.send_signal(stop)
        assert process.wait(timeout=STOP_SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_an_address_in_use_is_a_sentence() -> None:
    """Whoever holds the port already, the person is told which setting to change."""
    with bind("127.0.0.1:0") as held:
        port = held.getsockname()[1]
        assert url_of(held) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigInvalid, match=r"web\.listen_address.*cannot be listened on"):
            bind(f"127.0.0.1:{port}")
