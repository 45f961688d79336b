"""A real agent on a node without a GPU meters a real job's CPU time."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest

from flopledger_agent.config import parse_config
from flopledger_agent.daemon import Daemon
from flopledger_agent.inspection import as_lines, inspect
from flopledger_core.batch import decode
from flopledger_core.records import HostRecord
from tests.agent.attribution.people import running

PATIENT_SECONDS = 40.0
BURN = (sys.executable, "-c", "print('on', flush=True)\nwhile True: pass")
ENOUGH_NS = 1_500_000_000

pytestmark = pytest.mark.skipif(
    os.path.exists("/dev/nvidiactl"),  # noqa: PTH110 (a device, not a file of ours)
    reason="this node has a GPU",
)


def config_text(root: Path, host: str = "") -> str:
    """An agent of the real driver, whose collector is not at home."""
    return (
        f'[collector]\nurl = "http://127.0.0.1:9"\n[node]\nname = "n1"\n'
        f'[state]\ndirectory = "{root}/state"\n[tags]\nsocket = "{root}/tags.sock"\n'
        f'[web]\nlisten_address = "127.0.0.1:0"\n[sampling]\ninterval_seconds = 0.5\n'
        f"[host]\ninterval_seconds = 1\n{host}"
    )


def used_ms(pid: int) -> int:
    """CPU time of a process, by its own account."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1_000 // os.sysconf("SC_CLK_TCK")


def page_of(built: Daemon) -> str:
    """The agent's page."""
    port = built._server.server_address[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return str(response.read().decode())


def sealed(root: Path) -> list[HostRecord]:
    """Host records waiting in the spool."""
    return [
        record
        for path in sorted((root / "state" / "spool").glob("*.batch"))
        for record in decode(path.read_bytes()).records
        if isinstance(record, HostRecord)
    ]


def test_a_node_without_a_gpu_meters_its_jobs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tagged process that burns a CPU has about its own CPU time; all time is somebody's."""
    caplog.set_level(logging.INFO)
    stop = threading.Event()
    built = Daemon(parse_config(config_text(tmp_path), "test"), stop)
    runner = threading.Thread(target=built.run)
    runner.start()
    page, spent_ms = "", 0
    try:
        pause, deadline = threading.Event(), time.monotonic() + PATIENT_SECONDS
        with running({"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_RUN": "r1"}, BURN) as child:
            while attributed_ns(built) < ENOUGH_NS:
                assert time.monotonic() < deadline, "the job was never metered"
                pause.wait(0.05)
            page = page_of(built)
            stop.set()
            runner.join(PATIENT_SECONDS)
            spent_ms = used_ms(child.pid)
    finally:
        stop.set()
        runner.join(PATIENT_SECONDS)

    found = sealed(tmp_path)
    mine = [record for record in found if record.owner.project == "atlas"]
    metered_ms = sum(record.cpu_time_ms or 0 for record in mine)
    assert 0.5 * spent_ms <= metered_ms <= 1.1 * spent_ms + 20
    assert {record.owner.run for record in mine} == {"r1"}
    assert {record.attribution.source for record in mine} == {"environment"}
    check_whole(found)
    assert all(record.absent["flop"] == "cpu_flop_not_counted" for record in found)
    said = [one.message for one in caplog.records if getattr(one, "action", "") == "no_gpu"]
    assert len(said) == 1
    assert re.search(r'flopledger_agent_host_cpu_seconds_total\{owner_kind="attributed"\} \d', page)
    assert 'flopledger_agent_host_absent{quantity="flop",reason="cpu_flop_not_counted"} 1.0' in page


def attributed_ns(built: Daemon) -> int:
    """What the page would show of jobs."""
    counts = built._loop.host_counts()
    return 0 if counts is None else counts.cpu_ns.get("attributed", 0)


def check_whole(found: list[HostRecord]) -> None:
    """Over the owners of each window CPU time is the CPUs times the window, and windows join."""
    windows: dict[tuple[int | None, int], list[HostRecord]] = {}
    for record in found:
        windows.setdefault((record.start_boot_ms, record.window_ms), []).append(record)
    reached: int | None = None
    for (start_ms, window_ms), members in sorted(windows.items()):
        assert start_ms is not None
        assert reached in {None, start_ms}
        reached = start_ms + window_ms
        cpus = members[0].cpu_count
        assert sum(member.cpu_time_ms or 0 for member in members) == cpus * window_ms


def test_check_says_what_host_meters_are_seen(tmp_path: Path) -> None:
    """Each boundary with its source, or with the reason and the remedy."""
    report = inspect(parse_config(config_text(tmp_path), "test"))
    told = as_lines(report)

    assert report.can_meter
    assert report.host is not None
    assert report.host.cpu_count == os.cpu_count()
    assert {one.boundary for one in report.host.boundaries} == {
        "cpu_package", "dram", "node", "platform",
    }  # fmt: skip
    assert any(
        "energy node: absent (not_configured): set host.redfish.url" in line for line in told
    )
    assert all(one.source is not None or one.remedy for one in report.host.boundaries)
    assert msgspec.json.encode(report)


def test_a_host_can_be_left_alone(tmp_path: Path) -> None:
    """Switched off, nothing of it is read."""
    config = parse_config(config_text(tmp_path, "enabled = false\n"), "test")
    report = inspect(config)
    assert report.host is None
    assert not report.can_meter
    assert "host: not metered" in as_lines(report)
