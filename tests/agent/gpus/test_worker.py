"""The worker process: exact answers through pipes, small, and gone when the agent is."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.interface import GpuSample, NodeSample
from flopledger_agent.gpus.selection import EVERYTHING, Selection
from flopledger_agent.gpus.worker_messages import (
    MESSAGE_BYTES_MAX,
    Answer,
    Ask,
    BrokenMessage,
    Hello,
    Inbox,
    answer_of,
    framed,
    request_of,
)
from flopledger_agent.gpus.worker_process import PipeWorker, WorkerGone, wait_for_any
from flopledger_core.records import Device
from tests.agent.gpus.nodes import scenario
from tests.agent.gpus.workers import descriptors, is_running, supervised

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_SECONDS = 60.0
WORKER_PSS_KIB_MAX = 24 * 1024  # of 64 MiB for the whole agent (design, limits)


def wait_until(true: Callable[[], object]) -> None:
    """Poll with a deadline."""
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def answer(number: int, ratio: Fraction = Fraction(1, 3)) -> Answer:
    """One tick as a worker tells it."""
    sample = GpuSample(
        device=Device(uuid="GPU-1", name="NVIDIA H100 80GB HBM3"), boot_ns=2**62, tier="gpm_util",
        cycles=None, utilization={"hmma": ratio}, sm_clock_khz=1, energy_mj=2**62, power_mw=None,
        processes=None, absent={"power_mw": "no_permission"}, xids=(79,),
    )  # fmt: skip
    tick = NodeSample(
        boot_ns=1, unix_ns=2**62, samples=(sample,), failures=(), driver="595.71.05", failure=None
    )
    return Answer(
        number=number, sample=tick, scales={"GPU-1": "mean"}, places={"GPU-1": 0},
        device_count=1, stuck_index=None,
    )  # fmt: skip


@given(
    st.lists(st.integers(0, 2**31), min_size=1, max_size=5),
    st.floats(0, 100),
    st.integers(1, 4000),
)
def test_messages_arrive_whole_and_exact(numbers: list[int], percent: float, step: int) -> None:
    """However the pipe cuts them, and a double's ratio to its last digit."""
    sent = [answer(number, Fraction(percent) / 100) for number in numbers]
    content = b"".join(framed(item) for item in sent)
    inbox, got = Inbox(), []
    for start in range(0, len(content), step):
        inbox.feed(content[start : start + step])
        while (body := inbox.take()) is not None:
            got.append(answer_of(body))

    assert got == sent


@given(st.binary(max_size=64))
def test_rubbish_is_refused_and_never_read_as_a_sample(body: bytes) -> None:
    """Whatever bytes come: a broken message, not another error."""
    for read in (answer_of, request_of):
        with pytest.raises(BrokenMessage):
            read(body)


def test_a_length_beyond_the_limit_is_refused_before_it_is_awaited() -> None:
    """Nobody collects gigabytes because four bytes say so."""
    inbox = Inbox()
    inbox.feed((MESSAGE_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(BrokenMessage):
        inbox.take()


def test_a_worker_answers_every_question_once_and_leaves_when_let_go(tmp_path: Path) -> None:
    """By its number; closing the pipe is enough to end it, with status 0."""
    with supervised(tmp_path, scenario("")) as it:
        it.warm(1)
        worker = it.made[0]
        it.source.close()
        assert worker._process.wait(DEADLINE_SECONDS) == 0


def test_a_worker_ignores_the_signals_of_a_stopping_group(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal; the agent still wants its last sample."""
    with supervised(tmp_path, scenario("")) as it:
        it.warm(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(it.made[0].pid, number)
        assert len(it.tick(0.2).samples) == 1
        assert len(it.made) == 1


def test_a_worker_inherits_pipes_and_nothing_else(tmp_path: Path) -> None:
    """No lock, no socket, no file: one that cannot be killed keeps nothing of ours."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))),
        (tmp_path / "lock").open("wb") as lock,
        supervised(tmp_path, scenario("")) as it,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        it.warm(1)
        found = descriptors(it.made[0].pid)
        mine = {target for target in descriptors(os.getpid()).values() if "socket" in target}
        own_error = str(Path("/proc/self/fd/2").readlink())

    kept = {fd: target for fd, target in found.items() if target != own_error}
    assert all(target.startswith("pipe:") for target in kept.values()), kept
    assert mine
    assert not mine & set(found.values())


def test_a_worker_is_small(tmp_path: Path) -> None:
    """Its share of memory leaves room for the agent under 64 MiB altogether."""
    with supervised(tmp_path, scenario(*[""] * 8)) as it:
        it.warm(8)
        for _ in range(20):
            it.tick(0.01)
        rollup = Path(f"/proc/{it.made[0].pid}/smaps_rollup").read_text()

    [line] = [line for line in rollup.splitlines() if line.startswith("Pss:")]
    assert int(line.split()[1]) < WORKER_PSS_KIB_MAX


def test_workers_end_with_an_agent_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL of the parent closes the pipes, and no worker goes on for nobody."""
    (tmp_path / "scenario.toml").write_text(scenario(""))
    program = f"""
import time
from flopledger_agent.clocks import SystemClock
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import SimulatedNode
from flopledger_agent.gpus.worker_process import PipeWorker
made = []
def launch():
    made.append(PipeWorker())
    return made[-1]
simulated = SimulatedNode(scenario={str(tmp_path / "scenario.toml")!r}, start_boottime_ns=0,
                          clock=None, tie_ns=0)
source = SupervisedSource(SystemClock(), launch, time.monotonic, deadline_seconds=20.0,
                          simulated=simulated)
source.sample()
print(made[0].pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        assert is_running(pid)
        agent.kill()
        wait_until(lambda: not is_running(pid))


def test_a_worker_that_does_not_start_is_gone_and_costs_no_wait() -> None:
    """Its end is seen at the pipe."""
    worker = PipeWorker((sys.executable, "-c", "raise SystemExit(3)"))
    wait_for_any([worker], DEADLINE_SECONDS)
    with pytest.raises(WorkerGone):
        worker.receive()
    wait_until(worker.ended)
    with pytest.raises(WorkerGone):
        worker.send(framed(Ask(number=1, delivered=True)))
    worker.end(kill=True)


def test_a_worker_that_is_told_rubbish_ends() -> None:
    """It does not guess."""
    worker = PipeWorker()
    worker.send(b"\0\0\0\1\xc1")
    wait_until(worker.ended)
    worker.end(kill=False)


def test_a_greeting_carries_everything_a_worker_needs() -> None:
    """Through the pipe and back it is the same."""
    hello = Hello(
        known=(Device(uuid="GPU-1", name="NVIDIA H100 80GB HBM3"),),
        selection=Selection(excluded=frozenset({"GPU-2"}), places={"GPU-2": 1},
                            nameless=frozenset({3}), device_count=4),
        scales={"GPU-1": "mean"}, deadline_seconds=0.75, simulated=None,
    )  # fmt: skip
    inbox = Inbox()
    inbox.feed(framed(hello))
    assert request_of(inbox.take() or b"") == hello


def test_left_out_devices_are_not_even_asked_who_they_are() -> None:
    """While the count is the same; with another one indexes may have moved."""
    selection = Selection(
        excluded=frozenset({"GPU-2"}), places={"GPU-2": 1}, nameless=frozenset({3}),
        device_count=4,
    )  # fmt: skip
    assert [selection.touches(index, 4) for index in range(4)] == [True, False, True, False]
    assert all(selection.touches(index, 3) for index in range(3))
    assert not selection.wants("GPU-2")
    assert selection.lacks(3, 4)
    assert not selection.lacks(1, 4)
    assert EVERYTHING.touches(0, 1)
    only = Selection(only_uuid="GPU-2", places={"GPU-2": 1, "GPU-1": 0}, device_count=2)
    assert [only.touches(index, 2) for index in range(2)] == [False, True]


@pytest.mark.parametrize("speed", [None, 600])
def test_the_clock_of_a_worker_is_the_agents(tmp_path: Path, speed: int | None) -> None:
    """No reading lies before its question or after its answer, on scaled time neither."""
    with supervised(tmp_path, scenario(""), speed=speed) as it:
        it.warm(1)
        for _ in range(5):
            before_ns = it.clock.boottime_ns()
            tick = it.tick(0.0)
            after_ns = it.clock.boottime_ns()
            assert before_ns <= tick.samples[0].boot_ns <= after_ns
