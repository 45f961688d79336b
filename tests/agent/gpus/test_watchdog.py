"""A stuck job takes its own thread and nothing else."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest

from flopledger_agent.gpus.watchdog import WatchedThread

PATIENT_SECONDS = 30.0


def test_a_job_answers_through_its_future() -> None:
    """Results and exceptions alike."""
    thread = WatchedThread("test")
    assert thread.start(lambda: 7).result(PATIENT_SECONDS) == 7
    with pytest.raises(ZeroDivisionError):
        thread.start(lambda: 1 // 0).result(PATIENT_SECONDS)
    assert not thread.stuck
    thread.close()


def test_a_stuck_thread_is_known_as_such_until_it_comes_back() -> None:
    """It takes no other job meanwhile."""
    thread, gate = WatchedThread("test"), threading.Event()
    job = thread.start(lambda: gate.wait(PATIENT_SECONDS))
    assert thread.stuck
    with pytest.raises(AssertionError, match="stuck"):
        thread.start(lambda: None)
    gate.set()
    wait([job], timeout=PATIENT_SECONDS)
    assert not thread.stuck
    assert thread.start(lambda: 1).result(PATIENT_SECONDS) == 1
    thread.close()


def test_the_thread_never_keeps_the_process_alive() -> None:
    """A call that hangs in the kernel must not delay an exit."""
    thread = WatchedThread("test")
    assert thread._thread.daemon
    thread.close()
    thread._thread.join(PATIENT_SECONDS)
    assert not thread._thread.is_alive()
