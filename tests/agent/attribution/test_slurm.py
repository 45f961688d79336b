"""The Slurm source beyond what a real Slurm shows: ghosts, contradictions, defects, names."""

import os
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from flopledger_agent.attribution.allocations import (
    AllocationView,
    DeviceDirectory,
    DirectoryEntry,
)
from flopledger_agent.attribution.slurm import (
    DeviceProcesses,
    SlurmPaths,
    SlurmReader,
    SlurmSource,
)
from flopledger_agent.attribution.slurm_jobs import JobFile, JobFolder, SlurmJob
from flopledger_agent.attribution.slurm_signs import GhostWatch, NodeSigns, Signs

ROOT: Final = Path(__file__).resolve().parents[3]
DIRECTORY: Final = DeviceDirectory(
    entries=tuple(
        DirectoryEntry(key=f"GPU-{minor}", uuid=f"GPU-{minor}", minor=minor, index=1 - minor)
        for minor in range(2)
    )
)
S: Final = 1_000_000_000
BOOT_UNIX_NS: Final = 1_000_000 * S


class Clock:
    """A clock that stands where it was put."""

    def __init__(self) -> None:
        self.boot_ns = 10_000 * S

    def boottime_ns(self) -> int:
        """Time since the boot."""
        return self.boot_ns

    def wall_unix_ns(self) -> int:
        """The same in the calendar."""
        return BOOT_UNIX_NS + self.boot_ns

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """Nothing sleeps here."""
        return virtual_seconds


class Node:
    """A made-up node: job folder, /proc, cgroups, gres.conf."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.jobs, self.proc, self.cgroups = (folder / n for n in ("jobs", "proc", "cgroups"))
        for path in (self.jobs, self.proc, self.cgroups):
            path.mkdir()
        self.gres = folder / "gres.conf"
        self.gres.write_text("Name=gpu File=/dev/nvidia1\nName=gpu File=/dev/nvidia0\n")
        me = frozenset({os.getuid()})
        self.reader = SlurmReader(
            self.clock,
            JobFolder(self.jobs, me),
            NodeSigns(self.proc, self.cgroups, me),
            SlurmPaths(proc=self.proc, gres_conf=self.gres),
            GhostWatch(),
        )

    def job(self, job_id: int, gpus: str, **more: str) -> Path:
        """A job file as the prolog writes it, written now."""
        path = self.jobs / f"{job_id}.n1.job"
        lines = [f"{name}={value}" for name, value in {"gpus": gpus, "node": "n1", **more}.items()]
        text = "\n".join(["flopledger_slurm_job=1", f"job_id={job_id}", *lines, "end=1", ""])
        path.write_text(text)
        now = self.clock.wall_unix_ns()
        os.utime(path, ns=(now, now))
        return path

    def process(self, pid: int, cgroup: str, environ: Mapping[str, str], command: str = "") -> Path:
        """A process in /proc."""
        path = self.proc / str(pid)
        (path / "task" / str(pid)).mkdir(parents=True)
        (path / "cgroup").write_text(cgroup)
        (path / "cmdline").write_text(command)
        (path / "stat").write_text(f"{pid} (a) ) S 1\n")
        (path / "task" / str(pid) / "children").write_text("")
        (path / "environ").write_text("\0".join(f"{k}={v}" for k, v in environ.items()))
        return path

    def look(self, processes: DeviceProcesses = ()) -> AllocationView:
        """What the reader says now."""
        return self.reader.look(DIRECTORY, processes)


@pytest.fixture(name="node")
def _node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_silent_allocation_is_held_until_its_lease_ends(node: Node) -> None:
    """Nothing runs for hours and the GPU is the job's; after a day without any sign it is not."""
    node.job(5, "0")
    for hours in (0, 1, 10, 12):
        node.clock.boot_ns += hours * 3600 * S
        (one,) = node.look().allocations
        assert one.device == "GPU-1"  # the first of gres.conf
    node.clock.boot_ns += 2 * 3600 * S
    view = node.look()
    assert not view.allocations
    assert "no sign of the job" in view.ghosts[0]


def test_a_named_end_bounds_the_lease(node: Node) -> None:
    """A job that should have ended an hour ago and shows nothing is a ghost."""
    end = node.clock.wall_unix_ns() // S + 60
    node.job(5, "0", end_time=str(end))
    node.clock.boot_ns += 3000 * S
    assert node.look().allocations
    node.clock.boot_ns += 1000 * S
    assert "time is over" in node.look().ghosts[0]


def test_a_batch_step_that_ended_takes_its_job_with_it(node: Node) -> None:
    """Five minutes after slurmstepd went, so that a slow epilog still counts as the job's."""
    node.job(5, "0")
    step = node.process(77, "0::/\n", {}, "slurmstepd: [5.batch]")
    assert node.look().allocations
    (step / "cmdline").write_text("")
    node.clock.boot_ns += S
    assert node.look().allocations
    node.clock.boot_ns += 299 * S
    assert node.look().allocations
    node.clock.boot_ns += 2 * S
    view = node.look()
    assert not view.allocations
    assert "gone for 300 seconds" in view.ghosts[0]


def test_a_file_from_before_the_boot_is_a_ghost(node: Node) -> None:
    """It cannot be of a job that runs now."""
    path = node.job(5, "0")
    before = BOOT_UNIX_NS - 3600 * S
    os.utime(path, ns=(before, before))
    assert "before this boot" in node.look().ghosts[0]


def test_a_later_job_takes_the_device_of_a_silent_one(node: Node) -> None:
    """Only where Slurm shares no GPU; where it does, both hold it and share."""
    node.job(5, "0")
    node.clock.boot_ns += 60 * S
    node.job(6, "0")
    view = node.look()
    assert [(one.job, one.shared) for one in view.allocations] == [("6", False)]
    assert view.ghosts == ("5.n1.job: job 6 was given its devices after it",)
    node.gres.write_text(node.gres.read_text() + "Name=shard Count=4\n")
    view = node.look()
    assert [(one.job, one.shared) for one in view.allocations] == [("5", True), ("6", True)]


def test_a_broken_file_hides_no_other(node: Node) -> None:
    """It is a trouble with a remedy."""
    node.job(5, "0")
    node.job(6, "x")
    view = node.look()
    assert [one.job for one in view.allocations] == ["5"]
    assert "remove this" in view.troubles[0]


def test_a_job_on_a_device_that_is_not_its_own_is_told(node: Node) -> None:
    """Slurm's word stays; so does a contradiction between a path and an environment."""
    node.job(5, "0", comment="x,pretrain,main")
    node.process(90, "0::/system.slice/slurmstepd.scope/job_5/step_0\n", {"SLURM_JOB_ID": "6"})
    view = node.look((("GPU-0", (90,)),))
    assert [(one.device, one.job) for one in view.allocations] == [("GPU-1", "5")]
    assert view.allocations[0].tags == {"project": "x", "activity": "pretrain"}
    assert any("ConstrainDevices" in text for text in view.troubles)
    assert any("claims job 6" in text for text in view.troubles)


def test_without_a_prolog_a_process_on_a_device_names_its_job(node: Node) -> None:
    """By its cgroup, and a SLUID by the environment beside it."""
    node.process(90, "0::/system.slice/slurmstepd.scope/job_5/step_0\n", {})
    sluid = {"SLURM_JOB_ID": "7", "SLURM_JOB_SLUID": "s5K1KKYAYG5D00", "SLURM_JOB_ACCOUNT": "acc"}
    path = "0::/system.slice/slurmstepd.scope/s5K1KKYAYG5D00/step_0/user/task_0\n"
    node.process(91, path, {**sluid, "AWS_SECRET": "x"})
    view = node.look((("GPU-0", (90,)), ("GPU-1", (91, 92))))
    assert [(one.device, one.job, one.evidence) for one in view.allocations] == [
        ("GPU-0", "5", "cgroup of process 90 on the device"),
        ("GPU-1", "7", "cgroup of process 91 on the device"),
    ]
    assert view.allocations[1].names["account"] == "acc"
    assert "AWS" not in repr(view)


def test_a_title_that_anybody_took_is_no_sign(tmp_path: Path) -> None:
    """A process called slurmstepd counts only when it belongs to root (or who runs slurmd)."""
    node = Node(tmp_path)
    node.process(77, "0::/\n", {"SLURM_JOB_ID": "5"}, "slurmstepd: [5.batch]")
    others = NodeSigns(node.proc, node.cgroups, frozenset({os.getuid() + 1}))
    assert not others.look([5], 1)
    mine = NodeSigns(node.proc, node.cgroups, frozenset({os.getuid()}))
    assert mine.look([5], 1)[5].steps == {"batch"}


def test_a_frozen_or_stopped_job_is_suspended(node: Node) -> None:
    """Cgroup v1 and v2 freeze, other tracking stops each process; its devices stay its own."""
    node.job(5, "0")
    step = node.process(77, "0::/\n", {}, "slurmstepd: [5.batch]")
    (step / "task" / "77" / "children").write_text("78 ")
    place = "system.slice/slurmstepd.scope/job_5/step_batch"
    work = node.process(78, f"0::/{place}\n", {"SLURM_JOB_ID": "5"})
    assert "state" not in node.look().allocations[0].names
    (work / "stat").write_text("78 (a) b) T 77\n")
    assert node.look().allocations[0].names["state"] == "suspended"
    (work / "stat").write_text("78 (a) b) S 77\n")
    assert "state" not in node.look().allocations[0].names
    (node.cgroups / place).mkdir(parents=True)
    (node.cgroups / place / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    assert node.look().allocations[0].names["state"] == "suspended"


def test_the_order_of_silent_signs_does_not_matter() -> None:
    """A job seen alive at every look is never a ghost, however old its file is."""
    watch = GhostWatch()
    file = JobFile(file_name="5.n.job", job=SlurmJob(job_id=5), written_unix_ns=0)
    for hours in range(0, 2000, 10):
        now = hours * 3600 * S
        assert not watch.ghosts((file,), {5: Signs()}, now, 0)


def test_a_defect_ends_no_attribution(node: Node) -> None:
    """The source keeps what it knew, says what happened, and tells when allocations change."""
    changes = threading.Event()
    source = SlurmSource(node.reader, interval_seconds=0.01, changed=changes.set)
    source.observe(DIRECTORY, {})
    node.job(5, "0")
    source.start()
    try:
        assert changes.wait(timeout=10)
        known = source.allocations().allocations
        assert [one.job for one in known] == ["5"]
        node.clock.boottime_ns = lambda: 1 // 0  # type: ignore[method-assign]
        while not source.allocations().troubles:
            source.look_now()
        assert source.allocations().allocations == known
        assert "ZeroDivisionError" in source.allocations().troubles[0]
    finally:
        source.close()


def test_the_scripts_are_posix_shell() -> None:
    """They parse in the strictest shell there is here."""
    for name in ("prolog.sh", "epilog.sh"):
        script = ROOT / "deploy" / "slurm" / name
        assert os.access(script, os.X_OK)
        assert subprocess.run(["sh", "-n", str(script)], timeout=20, check=False).returncode == 0
