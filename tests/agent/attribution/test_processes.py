"""A pid and a create time are a process; real ones are told from their successors."""

from __future__ import annotations

import getpass
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from flopledger_agent.attribution.processes import (
    LATE_READS_MAX,
    QUESTIONS_PER_ENVIRONMENT,
    CombinedProcessTable,
    EnvironmentReader,
    PsutilProcessTable,
)
from tests.agent.attribution.people import (
    PATIENT_SECONDS,
    FakeProcessTable,
    process,
    running,
    until,
)


def test_a_real_process_is_known_with_its_tags_and_ancestors() -> None:
    """User, create time, the variables of attribution and nothing else of its environment."""
    table = PsutilProcessTable()
    tags = {"FLOPLEDGER_PROJECT": "atlas", "SLURM_JOB_ID": "17", "DATABASE_PASSWORD": "secret"}
    with running(tags) as child:
        until(lambda: (found := table.identify(child.pid)) and found.environ, "exec")
        found = PsutilProcessTable().identify(child.pid)
        assert found is not None
        assert found.environ == {"FLOPLEDGER_PROJECT": "atlas", "SLURM_JOB_ID": "17"}
        assert (found.user, found.uid) == (getpass.getuser(), os.getuid())
        ours = PsutilProcessTable().identify(os.getpid())
        assert ours is not None
        assert found.ancestors[0] == (os.getpid(), ours.create_time_ms)
        assert found.create_time_ms >= ours.create_time_ms


def test_a_process_that_ended_is_gone() -> None:
    """Even though its pid was known."""
    table = PsutilProcessTable()
    with running() as child:
        assert table.identify(child.pid) is not None
    assert table.identify(child.pid) is None


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 5, 2**40, 2**70])
def test_a_pid_of_nothing_is_nobody(pid: int) -> None:
    """Whatever the driver says, identifying it never raises."""
    found = PsutilProcessTable().identify(pid)
    assert found is None


def test_the_same_process_is_the_same_value_while_it_lives() -> None:
    """Known processes cost no new reading, and judgements about them can be kept."""
    table = PsutilProcessTable()
    first = table.identify(os.getpid())
    assert first is not None
    assert table.identify(os.getpid()) is first


def test_a_program_that_executes_another_shows_its_new_environment() -> None:
    """The pid stays and the environment changes: it is looked at again."""
    code = (
        "import os, sys; sys.stdin.readline();"
        "os.environ['FLOPLEDGER_PROJECT'] = 'after';"
        "os.execv(sys.executable, [sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    )
    table = PsutilProcessTable()
    with running(command=(sys.executable, "-c", code)) as child:
        before = table.identify(child.pid)
        assert before is not None
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
        until(
            lambda: (
                (found := table.identify(child.pid))
                and found.environ == {"FLOPLEDGER_PROJECT": "after"}
            ),
            "the environment of the second program",
        )
        after = table.identify(child.pid)
        assert after is not None
        assert after.create_time_ms == before.create_time_ms


def test_the_create_time_survives_a_step_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time moves; the process does not become another one, nor its children orphans."""
    table = PsutilProcessTable()
    before = table.identify(os.getpid())
    assert before is not None
    with running() as child:
        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
        after = table.identify(os.getpid())
        assert after == before
        young = table.identify(child.pid)
        assert young is not None
        assert young.ancestors[0] == (os.getpid(), before.create_time_ms)


def test_memory_is_bounded() -> None:
    """A node that starts processes all day long fills nothing."""
    table = PsutilProcessTable(processes_max=2)
    for pid in (os.getpid(), os.getppid(), 1):
        table.identify(pid)
    assert len(table._known) == 2
    assert len(table._create_times) <= 4


def test_an_unreadable_environment_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission is not an empty environment."""

    def denied(_self: object) -> dict[str, str]:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "environ", denied)
    found = PsutilProcessTable().identify(os.getpid())
    assert found is not None
    assert found.environ is None
    assert found.reason is not None
    assert "CAP_SYS_PTRACE" in found.reason


class Hang:
    """Stands for the kernel: reading an environment blocks until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.reads = 0
        real = psutil.Process.environ

        def environ(handle: psutil.Process) -> dict[str, str]:
            self.reads += 1
            assert self.gate.wait(PATIENT_SECONDS)
            return real(handle)

        monkeypatch.setattr(psutil.Process, "environ", environ)


def test_a_process_that_hangs_in_the_kernel_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its environment is absent with a reason, asked for once, and there when it answers."""
    hang = Hang(monkeypatch)
    table = PsutilProcessTable(environments=EnvironmentReader(deadline_seconds=0.01))
    with running({"FLOPLEDGER_PROJECT": "atlas"}) as child:
        for _ in range(20):
            found = table.identify(child.pid)
            assert found is not None
            assert found.environ is None
            assert found.reason is not None
            assert found.reason.startswith("timed out")
        assert hang.reads == 1
        hang.gate.set()
        until(
            lambda: (found := table.identify(child.pid)) and found.environ and not found.reason,
            "its environment",
        )


def test_many_hanging_processes_cost_a_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the ones beyond that no time at all."""
    hang = Hang(monkeypatch)
    reader = EnvironmentReader(deadline_seconds=0.01)
    with ExitStack() as children:
        pids = [children.enter_context(running()).pid for _ in range(LATE_READS_MAX + 2)]
        answers = [reader.read(psutil.Process(pid)) for pid in pids]
        assert all(environ is None for environ, _reason in answers)
        assert hang.reads == LATE_READS_MAX
        hang.gate.set()
        last = psutil.Process(pids[-1])
        until(lambda: reader.read(last)[0] is not None, "a free thread")


def test_an_environment_known_before_stays_while_its_process_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was read still tells most."""
    table = PsutilProcessTable(environments=EnvironmentReader(deadline_seconds=0.01))
    before = table.identify(os.getpid())
    hang = Hang(monkeypatch)
    for _ in range(2 * QUESTIONS_PER_ENVIRONMENT):
        assert table.identify(os.getpid()) is before
    hang.gate.set()


def test_two_tables_are_asked_in_order() -> None:
    """The first one's answer counts."""
    first, second = process(1, user="first"), process(1, user="second")
    other = process(2)
    table = CombinedProcessTable(FakeProcessTable(first), FakeProcessTable(second, other))
    assert table.identify(1) is first
    assert table.identify(2) is other
    assert table.identify(3) is None


def descriptors() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_known_processes_hold_a_bounded_number_of_descriptors() -> None:
    """And give them back when the process is gone or forgotten."""
    before = descriptors()
    table = PsutilProcessTable(processes_max=1)
    with running() as child:
        held = descriptors()
        assert table.identify(child.pid) is not None
        assert descriptors() == held + 1
        assert table.identify(os.getpid()) is not None
        assert descriptors() == held + 1
        assert table.identify(child.pid) is not None
    assert table.identify(child.pid) is None
    assert descriptors() == before


def test_without_pidfds_processes_are_told_apart_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels before 5.3 have none."""

    def missing(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    table = PsutilProcessTable()
    with running() as child:
        first = table.identify(child.pid)
        assert first is not None
        assert table.identify(child.pid) is first
    assert table.identify(child.pid) is None
