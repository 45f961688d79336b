"""The supervised source: whatever a worker does, the other GPUs are read, in time, to the digit."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_agent.gpus.lanes import ABANDONED_WORKERS_MAX, BACKOFF_TICKS_MAX, Patience
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import (
    Answer,
    Ask,
    Hello,
    Inbox,
    framed,
    request_of,
)
from flopledger_agent.gpus.worker_process import WorkerGone
from flopledger_core.records import Device
from tests.agent.gpus.nodes import scenario
from tests.agent.gpus.steered_worker import SteeredFault
from tests.agent.gpus.workers import StubbornWorker, supervised
from tests.agent.sampling import GPU, TestClock, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from flopledger_agent.gpus.worker_process import WorkerProcess

HANG = SteeredFault(kind="hang", gpu=0)
STARTING = {"worker_died", "worker_starting"}
LIMIT_SECONDS = 5.0  # a tick that waited for a hang would take longer by far
OTHER = Device(uuid="GPU-2", name="NVIDIA H100 80GB HBM3", sm_count=132)


def reasons(tick: NodeSample) -> set[str]:
    """Why devices were not sampled."""
    return {failure.reason for failure in tick.failures}


# --- real processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_counting_goes_on_exactly_when_a_worker_is_killed(tmp_path: Path, scale: str) -> None:
    """Every reading is the truth of its instant, of the same epoch and scale; none is withheld."""
    phase = (
        "[[gpus.phases]]\nseconds = 86400\nsm_clock_mhz = 1755\npower_watts = 600\n"
        "sm_active = 0.9\npipes = { hmma = 0.5 }\n"
    )
    with supervised(tmp_path, scenario(f'cycle_scale = "{scale}"', phase=phase)) as it:
        it.warm(1)
        for _ in range(4):
            os.kill(it.made[-1].pid, signal.SIGKILL)
            tick = it.until(lambda tick: not reasons(tick) & STARTING, 0.0)
            assert tick.failures == ()  # no warming up: the scale was passed on
            before_ns = it.clock.boottime_ns() - it.start_ns
            [found] = it.tick(0.0).samples
            after_ns = it.clock.boottime_ns() - it.start_ns
            assert (found.tier, found.absent) == ("gpm_cycles", {})
            assert found.cycles is not None
            assert found.energy_mj is not None
            assert before_ns * 600 // 10**6 <= found.energy_mj <= after_ns * 600 // 10**6
            elapsed = [at_ns * 132 * 1_755 // 1000 for at_ns in (before_ns, after_ns)]
            assert elapsed[0] - 132 <= (found.cycles.elapsed or 0) <= elapsed[1]
        assert it.source.counts.restarts["died"] == 4


def test_a_hanging_gpu_costs_the_others_no_tick_and_comes_back_by_itself(tmp_path: Path) -> None:
    """It is set apart, the rest goes on in a worker without it, and later both are read."""
    with supervised(tmp_path, scenario("", ""), deadline_seconds=0.4) as it:
        it.warm(2)
        it.fail(HANG)
        healthy = it.until(lambda tick: "timeout" in reasons(tick)).samples[0].device.uuid
        first = it.made[0]
        while not it.source.counts.restarts.get("gpu_set_changed"):
            tick = it.tick()
            assert healthy in {item.device.uuid for item in tick.samples}
        tick = it.until(lambda tick: len(tick.samples) == 1)
        assert (tick.samples[0].device.uuid, reasons(tick)) == (healthy, {"timeout"})
        assert max(it.took_seconds) < LIMIT_SECONDS
        assert first.ended()
        it.fail()
        assert it.until(lambda tick: len(tick.samples) == 2).failures == ()
        assert it.source.counts.running_workers == 2


def test_a_worker_that_outlives_sigkill_is_left_behind(tmp_path: Path) -> None:
    """The rest is read, the abandoned are counted and few, and closing waits for none of them."""
    with supervised(
        tmp_path, scenario("", ""), worker=StubbornWorker, deadline_seconds=0.4, hang_seconds=0.1
    ) as it:
        it.warm(2)
        it.fail(HANG)
        it.until(lambda tick: it.source.counts.abandoned_workers >= 2)
        tick = it.until(lambda tick: len(tick.samples) == 1)
        assert reasons(tick) == {"timeout"}
        began = time.monotonic()
        it.source.close()
        assert time.monotonic() - began < LIMIT_SECONDS
        assert it.source.counts.abandoned_workers >= 3
        assert reasons(it.source.sample()) == {"closed"}


def test_a_driver_upgrade_is_met_by_a_fresh_library(tmp_path: Path) -> None:
    """A version mismatch ends the process that holds the old library; then all is read again."""
    mismatch = SteeredFault(
        kind="error", code=18, functions=["nvmlInitWithFlags", "nvmlDeviceGetCount_v2"]
    )
    with supervised(tmp_path, scenario("")) as it:
        it.warm(1)
        it.fail(mismatch)
        it.until(lambda tick: tick.failure == "driver_version_mismatch")
        it.fail()
        tick = it.until(lambda tick: bool(tick.samples))
        assert tick.samples[0].tier == "gpm_cycles"
        assert it.source.counts.restarts["driver_version_mismatch"] >= 1
        assert it.made[0].ended()
        assert len(it.made) > 1


def test_a_device_that_hangs_before_it_says_who_it_is_does_not_hide_the_others(
    tmp_path: Path,
) -> None:
    """The place is left out, what was known of it is reported, and it comes back by itself."""
    hang = SteeredFault(kind="hang", gpu=0, functions=["nvmlDeviceGetHandleByIndex_v2"])
    known = Device(uuid="GPU-00000000-0000-4000-8000-000000000001", name="unknown")
    text = scenario(f'uuid = "{known.uuid}"', "")
    with supervised(tmp_path, text, known=(known,), deadline_seconds=0.4, faults=(hang,)) as it:
        tick = it.until(lambda tick: len(tick.samples) == 1)
        assert tick.samples[0].device.uuid != known.uuid
        assert [(item.device.uuid, item.reason) for item in tick.failures] == [
            (known.uuid, "timeout")
        ]
        it.fail()
        tick = it.until(lambda tick: len(tick.samples) == 2)
        assert tick.failures == ()
        assert known.uuid in {item.device.uuid for item in tick.samples}


def test_a_lost_gpu_is_let_go_so_that_it_can_be_reset(tmp_path: Path) -> None:
    """It is looked at now and then, by a worker that ends at once; after the reset it is read."""
    with supervised(tmp_path, scenario("", "")) as it:
        it.warm(2)
        it.fail(SteeredFault(kind="lost", gpu=0))
        tick = it.until(lambda tick: it.source.counts.restarts.get("gpu_lost", 0) > 1)
        assert reasons(tick) == {"gpu_is_lost"}
        assert len(tick.samples) == 1
        it.fail()
        assert it.until(lambda tick: len(tick.samples) == 2).failures == ()


def test_a_pause_lets_the_driver_go_and_resuming_takes_it_again(tmp_path: Path) -> None:
    """No process of ours is left while paused; every device says why it is not read."""
    with supervised(tmp_path, scenario("", "")) as it:
        it.warm(2)
        it.source.pause()
        assert all(worker.ended() for worker in it.made)
        tick = it.tick()
        assert (len(tick.failures), reasons(tick), tick.failure) == (2, {"paused"}, "paused")
        it.source.resume()
        assert it.warm(2).failures == ()


def test_a_stopped_process_times_out_and_is_replaced(tmp_path: Path) -> None:
    """Not only the driver can stop a worker: SIGSTOP does, and the loop does not wait for it."""
    with supervised(tmp_path, scenario(""), deadline_seconds=0.3) as it:
        it.warm(1)
        os.kill(it.made[-1].pid, signal.SIGSTOP)
        assert reasons(it.until(lambda tick: not tick.samples)) == {"timeout"}
        it.until(lambda tick: bool(tick.samples))
        assert it.source.counts.restarts["hung"] >= 1
        assert max(it.took_seconds) < LIMIT_SECONDS


# --- stand-ins for processes ---------------------------------------------------------------------


class ScriptedWorker:
    """A worker in this process that answers what the test says, when the test says so."""

    def __init__(self, script: Callable[[ScriptedWorker, Ask], bytes]) -> None:
        self.script = script
        self.hello: Hello | None = None
        self.asked: list[Ask] = []
        self.outbox = b""
        self.killed = False
        self.immortal = False

    def send(self, content: bytes) -> None:
        """Take a question."""
        if self.killed:
            raise WorkerGone("killed")
        inbox = Inbox()
        inbox.feed(content)
        request = request_of(inbox.take() or b"")
        if isinstance(request, Hello):
            self.hello = request
        else:
            self.asked.append(request)
            self.outbox += self.script(self, request)

    def receive(self) -> bytes:
        """What is there."""
        content, self.outbox = self.outbox, b""
        return content

    def fileno(self) -> int:
        """Nothing to poll."""
        return -1

    def end(self, *, kill: bool) -> None:
        """End, unless immortal."""
        self.killed = True

    def ended(self) -> bool:
        """Whether it is gone."""
        return self.killed and not self.immortal


def told(ask: Ask, *samples: GpuSample, failures: tuple[DeviceFailure, ...] = (),
         failure: str | None = None, retired: tuple[str, ...] = ()) -> bytes:  # fmt: skip
    """An answer."""
    tick = NodeSample(
        boot_ns=1, unix_ns=1, samples=samples, failures=failures, driver="595.71.05",
        failure=failure, retired=retired,
    )  # fmt: skip
    return framed(
        Answer(number=ask.number, sample=tick, scales={}, places={"GPU-1": 0, "GPU-2": 1},
               device_count=2, stuck_index=None)
    )  # fmt: skip


class Imagined:
    """A supervised source over scripted workers; real time is a number the test moves."""

    def __init__(self, script: Callable[[ScriptedWorker, Ask], bytes], **options: object) -> None:
        self.now_seconds = 0.0
        self.made: list[ScriptedWorker] = []
        self.script = script
        self.source = SupervisedSource(
            TestClock(), self._launch, lambda: self.now_seconds, deadline_seconds=1.0,
            patience=Patience(hang_seconds=5.0, start_seconds=20.0), wait=self._wait,
            known=(GPU, OTHER),
        )  # fmt: skip
        self.immortal = bool(options.get("immortal"))

    def _launch(self) -> ScriptedWorker:
        self.made.append(ScriptedWorker(self._answer))
        self.made[-1].immortal = self.immortal
        return self.made[-1]

    def _answer(self, worker: ScriptedWorker, ask: Ask) -> bytes:
        return self.script(worker, ask)

    def _wait(self, workers: Iterable[WorkerProcess], seconds: float) -> None:
        if not any(isinstance(item, ScriptedWorker) and item.outbox for item in workers):
            self.now_seconds += seconds

    def tick(self) -> NodeSample:
        """One second later."""
        self.now_seconds = float(int(self.now_seconds) + 1)
        return self.source.sample()


def nothing(_worker: ScriptedWorker, _ask: Ask) -> bytes:
    """No answer."""
    return b""


def both(_worker: ScriptedWorker, ask: Ask) -> bytes:
    """Both devices."""
    return told(ask, sample(1), sample(1, device=OTHER))


def test_a_worker_that_dies_at_once_is_tried_less_and_less_often() -> None:
    """After 1, 2, 4, ... and at most 64 ticks; nothing waits, everything is reported."""

    def die(worker: ScriptedWorker, _ask: Ask) -> bytes:
        worker.killed = True
        raise WorkerGone("died")

    it = Imagined(die)
    starts: list[int] = []
    for number in range(400):
        before = len(it.made)
        tick = it.tick()
        assert reasons(tick) == {"worker_died"}
        assert {item.device.key for item in tick.failures} == {"GPU-1", "GPU-2"}
        if len(it.made) > before:
            starts.append(number)
    pauses = [later - earlier for earlier, later in pairwise(starts)]

    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 64, 64]
    assert max(pauses) == BACKOFF_TICKS_MAX


def test_no_more_workers_sleep_in_the_driver_than_a_few() -> None:
    """Where killing does not help, starting more does not either; one that goes makes room."""
    it = Imagined(nothing, immortal=True)
    for _ in range(2000):
        it.tick()
    assert len(it.made) == ABANDONED_WORKERS_MAX
    assert it.source.counts.abandoned_workers == ABANDONED_WORKERS_MAX
    it.made[0].immortal = False
    it.script = both
    ticks = [it.tick() for _ in range(BACKOFF_TICKS_MAX + 1)]
    assert len(ticks[-1].samples) == 2


def test_what_comes_too_late_is_no_sample_but_its_events_are_kept() -> None:
    """The next answer is told that the last one was not used; XIDs and endings are not lost."""
    late: list[bytes] = []

    def slow(worker: ScriptedWorker, ask: Ask) -> bytes:
        if len(worker.asked) == 2:
            seen = msgspec.structs.replace(sample(7), xids=(31,))
            late.append(told(ask, seen, retired=("GPU-2",)))
            return b""
        return both(worker, ask) if not late else told(ask, sample(9))

    it = Imagined(slow)
    assert len(it.tick().samples) == 2
    assert reasons(it.tick()) == {"timeout"}
    assert reasons(it.tick()) == {"timeout"}
    it.made[0].outbox = late[0]
    tick = it.tick()

    assert [(item.boot_ns - sample(0).boot_ns, item.xids) for item in tick.samples] == [(9, (31,))]
    assert tick.retired == ("GPU-2",)
    assert tick.failures == ()
    assert [ask.delivered for ask in it.made[0].asked] == [True, True, False]
    it.tick()
    assert it.made[0].asked[-1].delivered


def test_a_silent_worker_is_waited_for_once_then_served_at_once() -> None:
    """The first tick takes the deadline, the next ones no time, until patience is at its end."""
    it = Imagined(both)
    it.tick()
    it.script = nothing
    took: list[float] = []
    while len(it.made) == 1:
        it.now_seconds = float(int(it.now_seconds) + 1)
        began = it.now_seconds
        tick = it.source.sample()
        took.append(it.now_seconds - began)
        if len(it.made) == 1:
            assert reasons(tick) == {"timeout"}
    assert took[0] == 1.0
    assert set(took[1:-1]) == {0.0}
    assert it.made[0].killed


def test_a_broken_answer_ends_the_worker_that_gave_it() -> None:
    """Nothing of it is believed."""
    it = Imagined(lambda worker, ask: b"\0\0\0\1\xc1")
    assert reasons(it.tick()) == {"worker_died"}
    it.script = both
    assert len(it.tick().samples) == 2


def test_the_rest_is_read_until_the_successor_reads_it() -> None:
    """The old worker goes only when the new one, which does not touch the hung GPU, delivers."""

    def hung(worker: ScriptedWorker, ask: Ask) -> bytes:
        assert worker.hello is not None
        selection = worker.hello.selection
        if selection.only_uuid == "GPU-1":
            return b""
        if "GPU-1" in selection.excluded:
            if len(worker.asked) < 4:
                return told(ask, failures=(DeviceFailure(device=OTHER, reason="warming_up"),))
            return told(ask, sample(1, device=OTHER))
        return told(
            ask, sample(1, device=OTHER), failures=(DeviceFailure(device=GPU, reason="timeout"),)
        )

    it = Imagined(hung)
    ticks = [it.tick() for _ in range(30)]

    assert all([s.device.key for s in tick.samples] == ["GPU-2"] for tick in ticks)
    assert all([(f.device.key, f.reason) for f in tick.failures] == [("GPU-1", "timeout")]
               for tick in ticks)  # fmt: skip
    assert it.made[0].killed
    hello = it.made[1].hello if it.made[1].hello is not None else it.made[2].hello
    assert hello is not None
    excluding = [w for w in it.made if w.hello and "GPU-1" in w.hello.selection.excluded]
    assert len(excluding) == 1
    assert excluding[0].hello is not None
    assert excluding[0].hello.selection.places == {"GPU-1": 0}
    assert excluding[0].hello.known == (OTHER,)


def test_no_process_to_be_had_is_a_reason_not_an_error() -> None:
    """The node has no room for another process: the tick says so, and later ones try again."""

    def refuse() -> WorkerProcess:
        raise OSError(11, "Resource temporarily unavailable")

    clock = TestClock()
    source = SupervisedSource(clock, refuse, lambda: 0.0, known=(GPU,), deadline_seconds=1.0)
    assert reasons(source.sample()) == {"worker_cannot_start"}
    assert reasons(source.sample()) == {"worker_cannot_start"}
    source.close()
