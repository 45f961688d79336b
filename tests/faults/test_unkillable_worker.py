"""A worker in uninterruptible sleep outlives SIGKILL: the agent stops and starts beside it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING

from flopledger_agent.config import parse_config
from flopledger_agent.daemon import Daemon
from flopledger_core.batch import decode
from flopledger_core.records import UsageRecord
from tests.agent.gpus.workers import StubbornWorker, is_running
from tests.agent.test_daemon import config_text, run_beside, wait_until

if TYPE_CHECKING:
    from pathlib import Path

STOP_SECONDS = 20.0  # TimeoutStopSec of the unit is thirty


def free_port() -> int:
    """A port nobody listens on now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_agent_stops_and_starts_beside_a_worker_that_cannot_be_killed(tmp_path: Path) -> None:
    """The same state directory, page and tag socket are free; time and energy have no hole."""
    text = config_text(tmp_path, web=f"127.0.0.1:{free_port()}")
    scenario = tmp_path / "scenario.toml"  # one driver for both lives: counters go on
    scenario.write_text(f"start_boottime_ns = 1000000000\n{scenario.read_text()}")
    made: list[StubbornWorker] = []
    pages: list[str] = []

    def launch() -> StubbornWorker:
        made.append(StubbornWorker())
        return made[-1]

    def live() -> None:
        stop = threading.Event()
        built = Daemon(parse_config(text, "test"), stop, launch)

        def act() -> None:
            wait_until(lambda: built._loop.view.sample and built._loop.view.sample.samples)
            port = built._server.server_address[1]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                pages.append(page.read().decode())
            stopped_at.append(time.monotonic())

        assert run_beside(built, act, stop) == 0

    stopped_at: list[float] = []
    try:
        for lives in (1, 2):
            live()
            assert time.monotonic() - stopped_at[-1] < STOP_SECONDS
            assert len(made) == lives
            assert all(is_running(worker.pid) for worker in made)
    finally:
        for worker in made:
            worker.bury()

    assert all("flopledger_agent_driver_workers 1.0" in page for page in pages)
    batches = [decode(path.read_bytes()) for path in sorted((tmp_path / "state/spool").iterdir())]
    records = [r for batch in batches for r in batch.records if isinstance(r, UsageRecord)]
    assert len(records) >= 2
    records.sort(key=lambda record: record.start_boot_ms)
    for earlier, later in pairwise(records):
        assert earlier.end_boot_ms == later.start_boot_ms
        assert later.energy_mj is not None
        assert later.energy_counter_mj is not None
        assert earlier.energy_counter_mj is not None
        assert later.energy_mj == later.energy_counter_mj - earlier.energy_counter_mj
