"""Honest agents, killed and started again, are never disputed for what they sealed."""

from __future__ import annotations

import random
import sqlite3
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.faults.test_real_kills import Cluster

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_no_record_of_a_killed_agent_is_disputed(tmp_path: Path) -> None:
    """Recovered windows follow the sealed ones: restarting in one boot repeats no time."""
    chance = random.Random(11)
    pause = threading.Event()
    with Cluster(tmp_path) as cluster:
        cluster.wait_for("first minute", pause, more_than=0)
        for _ in range(5):
            pause.wait(chance.uniform(0.1, 1.5))
            cluster.kill(chance.choice(["agent", "agent", "collector"]))
        cluster.wait_for("after the kills", pause, more_than=len(cluster.journal()) + 1)
        cluster.stop("agent")
        cluster.stop("collector")
        assert len(cluster.journal()) > 2
    path = f"file:{tmp_path}/ledger/ledger.sqlite3?mode=ro"
    with closing(sqlite3.connect(path, uri=True, timeout=10)) as connection:
        found = {row[0] for row in connection.execute("SELECT findings FROM journal")}
        reached = connection.execute("SELECT count(*) FROM device_reach").fetchone()
    assert found == {"[]"}
    assert reached == (2,)
