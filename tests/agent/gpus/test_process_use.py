"""Use of a shared GPU by process: as the driver tells it, counted once, absent otherwise."""

from __future__ import annotations

from flopledger_agent.gpus.process_use import MISSES_MAX, ProcessUse, ProcessUses
from flopledger_agent.gpus.simulated.functions import processes
from tests.agent.gpus.nodes import PHASE, node, scenario

TWO = (
    PHASE.replace('["train"]', '["train", "other"]\nshares = { train = 0.75, other = 0.25 }')
    + PHASE.replace('["train"]', "[]").replace("0.98", "0.0")
).replace("pipes = { hmma = 0.55, imma = 0.05, any_tensor = 0.6, fp32 = 0.03 }", "")
OTHER = "[processes.other]\npid = 4243\nuser = 'bob'\n"


def use(unix_us: int, pid: int = 7, percent: int = 10) -> ProcessUse:
    """One sample."""
    return ProcessUse(pid=pid, unix_us=unix_us, sm_percent=percent)


def test_each_sample_counts_once_and_an_undelivered_one_again() -> None:
    """Asked from the newest stamp that reached the consumer; one process's samples add up."""
    uses, asked = ProcessUses(), []

    def read(after: int) -> tuple[ProcessUse, ...]:
        asked.append(after)
        return (
            use(after + 1),
            use(after + 2, percent=5),
            use(after, percent=50),
            use(after + 1, 8),
        )

    assert uses.since(read) == {7: 15, 8: 10}
    uses.settle(delivered=False)
    assert uses.since(read) == {7: 15, 8: 10}
    uses.settle(delivered=True)
    uses.since(read)
    assert asked == [0, 0, 2]


def test_nothing_new_is_nothing_used_and_stamps_are_found_again() -> None:
    """Not absent: the driver has spoken. After a step of the clock its last period is asked for."""
    uses, asked = ProcessUses(), []

    def read(after: int) -> tuple[ProcessUse, ...]:
        asked.append(after)
        return (use(100),) if len(asked) == 1 else ()

    for _ in range(MISSES_MAX + 2):
        uses.since(read)
        uses.settle(delivered=True)
    assert asked == [0, 100, 100, 100, 0]


def test_odd_samples_are_no_use() -> None:
    """Percentages that are none, and no process at all."""
    odd = (use(5, percent=101), use(5, pid=0), use(5, pid=9, percent=0), use(5, pid=8, percent=100))
    assert ProcessUses().since(lambda _after: odd) == {8: 100}


def test_the_driver_tells_the_use_of_two_processes() -> None:
    """Three quarters and one quarter of a busy GPU; a process alone is not asked about."""
    with node(scenario(phase=TWO) + OTHER) as it:
        it.warm()
        (sample,) = it.tick().samples
    assert sample.process_utilization == {4242: 74, 4243: 24}
    with node() as it:
        (sample,) = it.warm().samples
    assert sample.process_utilization is None


def test_a_driver_without_the_call_leaves_the_split_equal() -> None:
    """Absent, and the reading is as good as before."""
    head = 'missing_functions = ["nvmlDeviceGetProcessUtilization"]\n'
    with node(scenario(phase=TWO, head=head) + OTHER) as it:
        (sample,) = it.warm().samples
    assert (sample.process_utilization, sample.processes) == (None, (4242, 4243))
    assert "process_utilization" not in sample.absent
    assert "nvmlDeviceGetProcessUtilization" in processes.FUNCTIONS
