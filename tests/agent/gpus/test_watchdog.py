"""A stuck job takes its own thread and nothing else."""

from __future__ import annotations

import threading

import pytest

from flopledger_agent.gpus.watchdog import Round, WatchedThread

PATIENT_SECONDS = 30.0


def test_answers_are_values_or_errors() -> None:
    """Both come back through the round."""
    one, two, together = WatchedThread[int]("one"), WatchedThread[int]("two"), Round()
    value = one.start(lambda: 7, together)
    error = two.start(lambda: 1 // 0, together)
    together.wait(PATIENT_SECONDS)
    assert (value.done, value.value, value.error) == (True, 7, None)
    assert error.done
    assert error.value is None
    assert isinstance(error.error, ZeroDivisionError)
    assert not one.stuck
    for thread in (one, two):
        thread.close()


def test_an_empty_round_is_over_at_once() -> None:
    """Nobody waits for nothing."""
    Round().wait(PATIENT_SECONDS)


def test_a_stuck_thread_is_known_as_such_until_it_comes_back() -> None:
    """The round ends at its deadline; the thread takes no other job meanwhile."""
    thread, gate = WatchedThread[bool]("test"), threading.Event()
    together = Round()
    late = thread.start(lambda: gate.wait(PATIENT_SECONDS), together)
    together.wait(0.01)
    assert not late.done
    assert thread.stuck
    with pytest.raises(AssertionError, match="stuck"):
        thread.start(lambda: True, Round())
    gate.set()
    thread.close()
    thread._thread.join(PATIENT_SECONDS)
    assert late.done
    assert not thread.stuck


def test_the_thread_never_keeps_the_process_alive() -> None:
    """A call that hangs in the kernel must not delay an exit."""
    thread = WatchedThread[None]("test")
    assert thread._thread.daemon
    thread.close()
    thread._thread.join(PATIENT_SECONDS)
    assert not thread._thread.is_alive()


def test_many_rounds_lose_no_arrival() -> None:
    """Counting is exact however threads interleave."""
    threads = [WatchedThread[int](f"test-{number}") for number in range(4)]
    for number in range(500):
        together = Round()
        answers = [thread.start(lambda number=number: number, together) for thread in threads]  # type: ignore[misc]
        together.wait(PATIENT_SECONDS)
        assert [answer.value for answer in answers] == [number] * 4
    for thread in threads:
        thread.close()
