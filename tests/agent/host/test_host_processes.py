"""CPU time by owner from a proc tree: judged once, cheap to repeat, bounded in time."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.host.cpu import node_totals, process_stat
from flopledger_agent.host.interface import HostReadError
from flopledger_agent.host.processes import TURNS, ProcessScanner
from flopledger_agent.host.procfs import ProcessFiles
from tests.agent.host.trees import TICK_NS, FakeOwners, ProcTree

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TAGGED = {"FLOPLEDGER_PROJECT": "atlas"}
PATIENT_SECONDS = 20.0
TICKS_PER_SCAN = 1_000  # ten seconds


class World:
    """A proc tree, a scanner over it, and who owns what."""

    def __init__(self, root: Path, owners: FakeOwners, scan_seconds: float = 5.0) -> None:
        self.tree = ProcTree(root)
        self.owners = owners
        self.files = ProcessFiles(root)
        self.scanner = ProcessScanner(
            self.files, owners, TICK_NS, time.monotonic, scan_seconds=scan_seconds
        )
        self.now_ticks = 1_000_000

    def scan(self) -> dict[str, int]:
        """Ticks by project in the interval that ends now."""
        self.now_ticks += TICKS_PER_SCAN
        found = self.scanner.scan(self.now_ticks * TICK_NS)
        return {one.claim.owner.account: one.cpu_ns // TICK_NS for one in found}


def test_what_a_tagged_process_uses_is_its_owners(tmp_path: Path) -> None:
    """Not what it used before anybody watched, but all from then on."""
    world = World(tmp_path, FakeOwners(pid7="atlas"))
    world.tree.process(7, ticks=500, environ=TAGGED)
    world.tree.process(8, ticks=900, environ={"PATH": "/bin"})

    assert world.scan() == {"atlas": 0}
    world.tree.process(7, ticks=650, environ=TAGGED)
    world.tree.process(8, ticks=1_900, environ={"PATH": "/bin"})
    assert world.scan() == {"atlas": 150}
    assert world.scan() == {"atlas": 0}
    assert world.owners.asked == [7]  # judged once, however often it is read


def test_a_process_born_since_the_last_scan_is_counted_whole(tmp_path: Path) -> None:
    """Its time cannot be of any other interval."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid9="atlas"))
    world.scan()
    world.tree.process(7, ticks=300, start_ticks=world.now_ticks + 5, environ=TAGGED)
    world.tree.process(9, ticks=300, start_ticks=world.now_ticks - 500, environ=TAGGED)
    assert world.scan() == {"atlas": 300}


def test_children_inherit_a_registered_tag(tmp_path: Path) -> None:
    """Also those of processes that nobody looked at before, as soon as the tag is there."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid8="atlas", pid9="atlas"))
    world.tree.process(7, environ={})
    world.tree.process(8, parent=7, ticks=100, environ=None)
    world.tree.process(9, parent=8, ticks=100, environ=None)
    world.tree.process(10, parent=1, ticks=100, environ=None)
    assert world.scan() == {}

    world.owners.tag(7)
    for pid, parent in ((8, 7), (9, 8), (10, 1)):
        world.tree.process(pid, parent=parent, ticks=140, environ=None)
    assert set(world.scan()) == {"atlas"}
    for pid, parent in ((8, 7), (9, 8), (10, 1)):
        world.tree.process(pid, parent=parent, ticks=190, environ=None)
    assert world.scan() == {"atlas": 100}
    assert 10 not in world.owners.asked


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    """Neither its owner nor its counters go over to the new one."""
    world = World(tmp_path, FakeOwners(pid7="atlas"))
    world.tree.process(7, ticks=500, start_ticks=10, environ=TAGGED)
    world.scan()
    world.owners.projects[7] = "zeus"
    other = {"FLOPLEDGER_PROJECT": "zeus"}
    world.tree.process(7, ticks=30, start_ticks=world.now_ticks + 1, environ=other)
    assert world.scan() == {"zeus": 30}


def test_a_program_that_was_executed_is_judged_anew(tmp_path: Path) -> None:
    """A shell that becomes a tagged job is found by its new command."""
    world = World(tmp_path, FakeOwners(pid7="atlas"))
    world.tree.process(7, ticks=10, command="sh", environ={})
    assert world.scan() == {}
    world.tree.process(7, ticks=20, command="python", environ=TAGGED)
    assert {"atlas": 0} in [world.scan() for _ in range(TURNS)]
    world.tree.process(7, ticks=70, command="python", environ=TAGGED)
    assert world.scan() == {"atlas": 50}


def test_a_process_seen_before_its_program_began_is_looked_at_again(tmp_path: Path) -> None:
    """Between fork and exec it has its parent's environment and perhaps the same name."""
    world = World(tmp_path, FakeOwners(pid7="atlas"))
    world.scan()
    start = world.now_ticks + TICKS_PER_SCAN - 1
    world.tree.process(7, ticks=1, start_ticks=start, environ={})
    assert world.scan() == {}
    world.tree.process(7, ticks=401, start_ticks=start, environ=TAGGED)
    assert set(world.scan()) == {"atlas"}


def test_ended_children_are_their_parents_by_the_kernels_account(tmp_path: Path) -> None:
    """What was counted while they lived is taken off, so nothing is counted twice."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid8="atlas"))
    world.scan()
    start = world.now_ticks + 1
    world.tree.process(7, start_ticks=start, environ=TAGGED)
    world.tree.process(8, ticks=300, parent=7, start_ticks=start, environ=TAGGED)
    assert world.scan() == {"atlas": 300}
    # 8 used 50 more and ended; a third process used 20 and was never seen at all.
    world.tree.end(8)
    world.tree.process(7, children_ticks=370, start_ticks=start, environ=TAGGED)
    assert world.scan() == {"atlas": 70}
    assert world.scan() == {"atlas": 0}


def test_children_that_nobody_waited_for_are_not_invented(tmp_path: Path) -> None:
    """Their last interval is nobody's, and never a negative of their parent."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid8="atlas"))
    world.tree.process(7, environ=TAGGED)
    world.tree.process(8, ticks=300, parent=7, environ=TAGGED)
    world.scan()
    world.tree.end(8)
    assert world.scan() == {"atlas": 0}


def test_a_parent_does_not_get_another_owners_child(tmp_path: Path) -> None:
    """A launcher's children may be somebody else's: then the rest is nobody's."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid8="zeus"))
    world.tree.process(7, environ=TAGGED)
    world.tree.process(8, ticks=300, parent=7, environ={"FLOPLEDGER_PROJECT": "zeus"})
    assert world.scan() == {"atlas": 0, "zeus": 0}
    world.tree.end(8)
    world.tree.process(7, children_ticks=400, environ=TAGGED)
    assert world.scan() == {"atlas": 0}


def test_kernel_threads_and_closed_environments_are_nobodys(tmp_path: Path) -> None:
    """Neither is asked about; an unreadable environment is no error."""
    world = World(tmp_path, FakeOwners(pid2="atlas", pid3="atlas"))
    world.tree.process(2, kernel=True, ticks=5, environ=TAGGED)
    world.tree.process(3, ticks=5, environ=None)
    assert world.scan() == {}
    assert world.owners.asked == []


def test_environments_are_not_read_again(tmp_path: Path) -> None:
    """One look at a process that stays what it is."""
    world = World(tmp_path, FakeOwners(pid7="atlas"))
    asked: list[int] = []
    variables = world.files.variables

    def counting(pids: Sequence[int], limit_seconds: float) -> dict[int, bytes]:
        asked.extend(pids)
        return variables(pids, limit_seconds)

    world.files.variables = counting  # type: ignore[method-assign]
    for pid in range(7, 20):
        world.tree.process(pid, environ={"A": "b"})
    for _ in range(3 * TURNS):
        world.scan()
    assert sorted(asked) == list(range(7, 20))


def test_a_job_of_many_processes_is_judged_once(tmp_path: Path) -> None:
    """The same tags and the same user have the same owner; other ones are asked about."""
    owners = FakeOwners(**{f"pid{pid}": "atlas" for pid in range(10, 60)}, pid60="zeus")
    world = World(tmp_path, owners)
    for pid in range(10, 60):
        world.tree.process(pid, environ=TAGGED)
    world.tree.process(60, environ={"FLOPLEDGER_PROJECT": "zeus"})
    assert world.scan() == {"atlas": 0, "zeus": 0}
    assert len(owners.asked) == 2


def test_a_nearer_tag_counts(tmp_path: Path) -> None:
    """Also where a farther one was there before; the tag of an ancestor that ended still holds."""
    world = World(tmp_path, FakeOwners(pid7="atlas", pid8="atlas", pid9="atlas"))
    for pid, parent in ((7, 1), (8, 7), (9, 8)):
        world.tree.process(pid, parent=parent, environ={})
    world.owners.tag(7)
    assert world.scan() == {"atlas": 0}
    world.owners.projects |= {8: "zeus", 9: "zeus"}
    world.owners.tag(8)
    assert world.scan() == {"atlas": 0, "zeus": 0}
    world.tree.end(8)
    world.tree.process(9, parent=1, ticks=30, environ={})
    assert world.scan() == {"atlas": 0, "zeus": 30}


def test_a_scan_ends_when_its_time_is_up(tmp_path: Path) -> None:
    """Three thousand processes under a clock that runs fast; the rest follows at later scans."""
    owners = FakeOwners(**{f"pid{pid}": "atlas" for pid in range(10, 3_010)})
    world = World(tmp_path, owners)
    beats = itertools.count()
    world.scanner._monotonic_seconds = lambda: next(beats) * 0.05
    world.scanner._scan_seconds = 2.0
    for pid in range(10, 3_010):
        world.tree.process(pid, environ=TAGGED if pid >= 3_000 else {})
    seen: list[int] = []
    while not seen or seen[-1] < 3_000:
        world.scan()
        seen.append(len(world.scanner._known))
        assert len(seen) < 40
    assert len(seen) > 3
    assert all(after - before <= 512 + 16 * 21 for before, after in itertools.pairwise([0, *seen]))


def test_a_process_that_hangs_in_the_kernel_holds_nobody_up(tmp_path: Path) -> None:
    """A named pipe nobody writes to stands in for its environment: the others are still found."""
    world = World(tmp_path, FakeOwners(pid6="atlas", pid7="atlas", pid8="atlas"), 0.2)
    for pid in (6, 7, 8):
        world.tree.process(pid, environ=TAGGED)
    (tmp_path / "7" / "environ").unlink()
    os.mkfifo(tmp_path / "7" / "environ")
    began = time.monotonic()
    for _ in range(8):
        world.scan()
    took = time.monotonic() - began
    for pid in (6, 8):
        world.tree.process(pid, ticks=100, environ=TAGGED)
    found = world.scan()
    with open(tmp_path / "7" / "environ", "wb"):  # noqa: PTH123 (lets the thread go)
        pass

    assert found == {"atlas": 200}
    assert 7 not in world.owners.asked
    assert took < 5
    deadline = time.monotonic() + PATIENT_SECONDS
    while any(thread.name == "environments" for thread in threading.enumerate()):
        assert time.monotonic() < deadline


def test_the_nodes_counters_take_guests_once_and_no_stolen_time(tmp_path: Path) -> None:
    """A guest's time is inside user time; stolen time ran nothing here."""
    tree = ProcTree(tmp_path)
    tree.node(busy_ticks=500, idle_ticks=9_999, steal=77, guest=400, cpus=3)
    totals = node_totals((tmp_path / "stat").read_bytes(), TICK_NS)
    assert (totals.cpu_count, totals.busy_ns) == (3, 500 * TICK_NS)


@pytest.mark.parametrize("content", [b"", b"cpu  1 2", b"cpu  a b c d e f g h\ncpu0 1\n", b"x\n"])
def test_an_unusable_proc_says_so(content: bytes) -> None:
    """No number is made of it."""
    with pytest.raises(HostReadError):
        node_totals(content, TICK_NS)


def test_a_command_may_look_like_fields(tmp_path: Path) -> None:
    """Brackets and spaces in a name shift nothing; garbage is no process."""
    tree = ProcTree(tmp_path)
    tree.process(7, ticks=90, children_ticks=4, parent=3, start_ticks=12, command="a) R 9 (b")
    stat = process_stat((tmp_path / "7" / "stat").read_bytes(), TICK_NS)
    assert stat is not None
    assert (stat.command, stat.parent_pid, stat.is_kernel_thread) == (b"a) R 9 (b", 3, False)
    assert (stat.own_ns, stat.children_ns, stat.start_ns) == (
        90 * TICK_NS,
        4 * TICK_NS,
        12 * TICK_NS,
    )
    for content in (b"", b"7 (x", b"7 (x) S 1", b"7 (x) S y " + b"0 " * 40):
        assert process_stat(content, TICK_NS) is None
