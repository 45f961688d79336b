"""A pause frees the driver, leaves an auditable gap, and outlives whatever happens to the agent."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent import daemon, inspection
from flopledger_agent.control import Control, ControlAnswer, ControlRequest, NotCarriedOut, tell
from flopledger_agent.disk import MemoryDisk
from flopledger_agent.pauses import PAUSE_FILE, PAUSE_MAX_MS, PauseDesk, parse_duration
from flopledger_core.errors import InvalidInput
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.sampling import SECOND_NS, TestClock
from tests.agent.test_daemon import DEADLINE_SECONDS, config_text, make, run_beside, wait_until
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT_UID = 4242
H100 = "NVIDIA H100 80GB HBM3"
TRAIN: dict[str, object] = {
    "driver_version": "595.71.05",
    "processes": {"train": {"pid": 10_000_001, "create_time_unix": 1,
                            "environ": {"FLOPLEDGER_PROJECT": "atlas"}}},
    "gpus": [{"model": H100, "phases": [
        {"seconds": 2000, "sm_clock_mhz": 1700, "power_watts": 600, "sm_active": 0.9,
         "pipes": {"hmma": 0.5}, "processes": ["train"]}]}],
}  # fmt: skip


class Desk:
    """A desk whose clock the test moves, and agents that start again on its disk."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.clock = TestClock()
        self.desk = PauseDesk(self.disk, self.clock, "boot-1")

    def restart(self, boot_id: str = "boot-1") -> PauseDesk:
        """Another process of the agent."""
        self.desk = PauseDesk(self.disk, self.clock, boot_id)
        return self.desk


# --- the desk ---------------------------------------------------------------------------------


def test_durations_are_written_as_people_write_them() -> None:
    """Seconds, minutes, hours; anything else names the remedy."""
    assert [parse_duration(text) for text in ("30s", "10m", "2h")] == [30_000, 600_000, 7_200_000]
    for text in ("", "0s", "10", "1d", "-5m", "1.5h", "10m ", "99999999h", "٣s"):
        with pytest.raises(InvalidInput, match="duration"):
            parse_duration(text)
    with pytest.raises(InvalidInput, match="at most 8h"):
        parse_duration("9h")
    assert parse_duration("8h") == PAUSE_MAX_MS


def test_a_pause_ends_by_itself_and_is_forgotten() -> None:
    """By boot time, whatever the calendar does meanwhile."""
    it = Desk()
    pause = it.desk.begin(60_000, "alice")
    it.clock.step_ns = -3600 * SECOND_NS
    it.clock.now_ns += 59 * SECOND_NS
    assert it.desk.current() == pause
    assert it.desk.left_ms(pause) == 1000
    it.clock.now_ns += SECOND_NS
    assert it.desk.current() is None
    it.desk.settle(paused=False)
    assert it.disk.read(PAUSE_FILE) is None


def test_a_pause_survives_a_restart_and_a_crash() -> None:
    """It is durable before anybody is told that it is in force."""
    it = Desk()
    it.desk.begin(60_000, "alice")
    it.disk.crash()
    it.clock.now_ns += 20 * SECOND_NS
    pause = it.restart().current()
    assert pause is not None
    assert (pause.by, it.desk.left_ms(pause)) == ("alice", 40_000)


@given(
    st.integers(1, PAUSE_MAX_MS), st.integers(0, 10**6), st.integers(-(10**6), 10**6),
    st.sampled_from(["boot-1", "boot-2", "unknown"]),
)  # fmt: skip
def test_no_boot_and_no_calendar_make_a_pause_longer(
    duration_ms: int, away_s: int, step_s: int, boot_id: str
) -> None:
    """After a reboot wall time says what is left, but never more than was asked for."""
    it = Desk()
    it.desk.begin(duration_ms, "alice")
    it.clock.now_ns += away_s * SECOND_NS
    it.clock.step_ns = step_s * SECOND_NS
    desk = it.restart(boot_id)
    pause = desk.current()
    left_ms = 0 if pause is None else desk.left_ms(pause)
    assert 0 <= left_ms <= duration_ms
    stepped_s = 0 if boot_id == "boot-1" else step_s
    if stepped_s >= 0:
        assert left_ms == max(0, duration_ms - (away_s + stepped_s) * 1000)


def test_a_file_that_is_no_pause_pauses_nothing() -> None:
    """Metering goes on."""
    it = Desk()
    it.disk.write(PAUSE_FILE, b'{"by":7}', durable=True)
    assert it.restart().current() is None


# --- who may ------------------------------------------------------------------------------------


def asked(it: Desk, uid: int, **request: Any) -> ControlAnswer:
    """What a user's request leads to, without a loop that carries it out."""
    control = Control(it.desk, AGENT_UID, lambda: None, effect_seconds=0.0)
    answer = control.answer(msgspec.json.encode(ControlRequest(**request)), uid)
    assert answer is not None
    return msgspec.json.decode(answer, type=ControlAnswer)


@pytest.mark.parametrize(("uid", "may"), [(0, True), (AGENT_UID, True), (AGENT_UID + 1, False)])
def test_only_root_and_the_agents_own_user_may_pause(uid: int, *, may: bool) -> None:
    """Others are told why not and whom to ask; anybody may look."""
    it = Desk()
    answer = asked(it, uid, command="pause", duration_ms=1000)
    assert answer.paused == may
    assert (it.desk.current() is not None) == may
    if not may:
        assert "may not pause" in (answer.error or "")
        assert "everybody's ledger" in (answer.error or "")
        assert "root" in (answer.error or "")
    it.desk.begin(5000, "root")
    assert asked(it, uid, command="status").by == "root"
    assert (asked(it, uid, command="resume").error is None) == may
    assert (it.desk.current() is None) == may


def test_a_bad_request_changes_nothing() -> None:
    """And every answer is a sentence."""
    it = Desk()
    control = Control(it.desk, AGENT_UID, lambda: None, effect_seconds=0.0)
    for line in (b'{"command":"stop"}', b'{"command":7}', b'{"command":"pause","x":1}'):
        assert b"update the client" in (control.answer(line, 0) or b"")
    for line in (b'{"tags":{"project":"a"}}', b"[]", b"nonsense", b'"command"'):
        assert control.answer(line, 0) is None  # for whoever knows tags
    assert "duration" in (asked(it, 0, command="pause", duration_ms=0).error or "")
    assert it.desk.current() is None


# --- what it leaves -----------------------------------------------------------------------------


@pytest.fixture
def training() -> Iterator[VirtualNode]:
    """A node that trains for ever."""
    with VirtualNode(TRAIN) as node:
        yield node


def gaps_of(node: VirtualNode) -> list[GapRecord]:
    """The gaps sealed so far."""
    return [record for record in node.records() if isinstance(record, GapRecord)]


def test_peers_row_15_a_pause_frees_the_driver_and_is_an_auditable_gap(
    training: VirtualNode,
) -> None:
    """Time is conserved, the gap grows minute by minute, and counters do not bridge it."""
    training.run(30)
    training.agent.pauses.begin(200_000, "alice")
    training.run(125)
    seen = gaps_of(training)
    view = training.agent.view
    training.run(100)
    training.stop()
    records = training.records()
    gaps = gaps_of(training)
    usage = [record for record in records if isinstance(record, UsageRecord)]
    spans = sorted(
        (r.start_boot_ms, r.end_boot_ms if isinstance(r, UsageRecord) else
         r.start_boot_ms + r.gap_ms)
        for r in records
    )  # fmt: skip
    truth = training.truth_of(usage).owner("train")

    assert [gap.gap_ms for gap in seen] == [30_000, 60_000]
    assert view.pause is not None
    assert (view.pause.by, view.sample and view.sample.samples) == ("alice", ())
    assert {gap.owner.project for gap in gaps} == {"atlas"}
    assert {gap.reason for gap in gaps} <= {"paused", "warming_up"}  # then counters begin anew
    assert 200_000 <= sum(gap.gap_ms for gap in gaps) <= 205_000
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert spans[-1][1] == 50_000 + 255_000  # the clock's boot time, and what was run since
    metered_ms = sum(record.gpu_time_ms for record in usage)
    assert sum(record.energy_mj or 0 for record in usage) == 600 * metered_ms
    assert sum(record.energy_mj or 0 for record in usage) < truth.energy_mj
    assert training.agent.view.pause is None


def test_a_restart_does_not_end_a_pause(training: VirtualNode) -> None:
    """The new agent does not touch the driver, and the gap goes on under the same owner."""
    training.run(30)
    training.agent.pauses.begin(120_000, "alice")
    training.run(20)
    training.kill_agent(dark_seconds=30)
    training.run(40)
    assert training.agent.view.pause is not None
    training.run(60)
    training.stop()
    gaps = gaps_of(training)

    assert {gap.owner.project for gap in gaps} == {"atlas"}
    assert {gap.reason for gap in gaps} <= {"paused", "warming_up"}  # then counters begin anew
    assert 120_000 <= sum(gap.gap_ms for gap in gaps) <= 125_000
    assert not [r for r in training.records() if "recovered" in r.flags]


def test_resuming_early_ends_the_gap(training: VirtualNode) -> None:
    """From the next tick on the device is metered again."""
    training.run(10)
    training.agent.pauses.begin(PAUSE_MAX_MS, "root")
    training.run(10)
    training.agent.pauses.end()
    training.run(10)
    training.stop()
    assert 10_000 <= sum(gap.gap_ms for gap in gaps_of(training)) <= 15_000


# --- the command --------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the agent as a program of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flopledger_agent", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def _not_now(*_arguments: object) -> NoReturn:
    raise AssertionError("the driver was opened while metering was paused")


def test_the_command_pauses_a_running_agent_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns when the driver is free; the socket, `check` and the page say who and how long."""
    built, stop = make(tmp_path, speed="1")
    told: list[subprocess.CompletedProcess[str]] = []

    def act() -> None:
        wait_until(lambda: (sample := built._loop.view.sample) and sample.samples)
        path = str(tmp_path / "tags.sock")
        told.append(command("pause", "10m", "--socket", path))
        wait_until(lambda: built._loop.view.pause)
        status = tell(Path(path), ControlRequest(command="status"))
        assert status.paused
        assert 590_000 < status.left_ms <= 600_000
        assert built._loop.view.sample is not None
        assert {failure.reason for failure in built._loop.view.sample.failures} == {"paused"}
        port = built._server.server_address[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            page = response.read().decode()
        assert "flopledger_agent_paused 1.0" in page
        assert f'flopledger_agent_pause_info{{user="{status.by}"}} 1.0' in page
        assert 'reason="paused"' in page
        (left,) = re.findall(
            r"^flopledger_agent_pause_remaining_seconds (\S+)$", page, re.MULTILINE
        )
        assert 590 < float(left) <= 600
        with monkeypatch.context() as patch:
            patch.setattr(daemon, "gpu_source", _not_now)
            looked = inspection._inspected(built._config, built._clock, None)
        assert f"paused by {status.by} until" in looked.metering
        assert "the driver was left alone" in inspection.as_lines(looked)[1]
        assert looked.can_meter
        told.append(command("resume", "--socket", path))
        wait_until(lambda: (sample := built._loop.view.sample) and sample.samples)

    assert run_beside(built, act, stop) == 0
    paused, resumed = told
    assert (paused.returncode, paused.stderr) == (0, "")
    assert "paused by" in paused.stdout
    assert (resumed.returncode, resumed.stdout) == (0, "metering goes on\n")


def test_without_an_agent_there_is_nothing_to_pause(tmp_path: Path) -> None:
    """One sentence with the remedy."""
    done = command("pause", "30s", "--socket", str(tmp_path / "none.sock"))
    assert done.returncode == 2
    assert "does not answer" in done.stderr
    done = command("pause", "soon", "--socket", str(tmp_path / "none.sock"))
    assert done.returncode == 2
    assert "30s, 10m or 2h" in done.stderr


def test_an_agent_that_says_nonsense_is_named(tmp_path: Path) -> None:
    """The client neither waits for ever nor believes it."""
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as odd:
        odd.bind(str(path))
        odd.listen()

        def reply() -> None:
            connection, _ = odd.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"?\n")

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(NotCarriedOut, match="no answer"):
            tell(path, ControlRequest(command="status"))
        thread.join(DEADLINE_SECONDS)


def test_the_configuration_of_these_tests_is_simulated(tmp_path: Path) -> None:
    """No test of a pause touches a real driver."""
    assert 'driver = "simulated"' in config_text(tmp_path)
