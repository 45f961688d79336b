"""Signs of life of Slurm's jobs on this node, and job files whose job shows none any more.

Each step of a job has a slurmstepd whose command line names it (`slurmstepd: [123.batch]`), with
every process-tracking plugin and for every user to see; a cgroup of the job is a sign, too. A job
need not show any: an interactive allocation between two steps holds its GPUs in silence. So
silence alone makes no ghost. What does: that the file is from before this boot; that the batch or
extern step, which lives as long as the job, was here and ended; that the lease ran out; or that a
later job was given the same GPU where no GPU is shared.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.slurm_cgroups import place_of_path
from flopledger_agent.attribution.slurm_jobs import KEPT_VARIABLES
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from flopledger_agent.attribution.slurm_jobs import JobFile

GRACE_SECONDS: Final = 300  # an epilog may clean up for minutes, and the job holds its GPUs then
LEASE_SECONDS: Final = 24 * 3600  # without any sign, for a file that names no end
OVERTIME_SECONDS: Final = 3600  # beyond the end that the file names: limits get extended
# How soon all processes are looked through for jobs not seen yet: twice as late each time.
SCAN_WAIT_NS: Final = NS_PER_SECOND // 2
SCAN_EVERY_NS: Final = 10 * NS_PER_SECOND
WHOLE_SCANS: Final = 6  # one scan of so many looks at processes again that were seen twice
COMMAND_BYTES_MAX: Final = 256
ENVIRONMENT_BYTES_MAX: Final = 1024 * 1024
CHILDREN_MAX: Final = 4096  # processes of one job that are looked at
CGROUPS_MAX: Final = 4096
_STEPD: Final = re.compile(rb"slurmstepd: \[([0-9]{1,18})\.([A-Za-z0-9_+]{1,40})\][\0 ]*")
_LASTING: Final = frozenset({"batch", "extern"})
# Below the mount point; v1 has the tree once for each controller.
_CGROUP_TREES: Final = (
    "system.slice/*slurmstepd.scope/job_*",
    "system.slice/*slurmstepd.scope/s*",
    "*/slurm*/uid_*/job_*",
)


class Signs(msgspec.Struct, frozen=True, kw_only=True):
    """What shows that a job lives on this node."""

    steps: frozenset[str] = frozenset()  # batch, extern, 0, ...; empty: only a cgroup
    is_suspended: bool = False
    environ: dict[str, str] | None = None  # of its first process, Slurm's variables only


class NodeSigns:
    """Looks for signs in a mounted /proc and cgroup tree; one caller at a time."""

    def __init__(
        self, proc: Path, cgroups: Path, trusted_user_ids: frozenset[int] = frozenset({0})
    ) -> None:
        self._proc = str(proc)
        self._trusted = trusted_user_ids
        self._cgroups = cgroups
        self._stepds: dict[int, tuple[int, str]] = {}  # pid -> (job id, step)
        self._environs: dict[int, dict[str, str]] = {}
        self._scanned_boot_ns: int | None = None
        self._missing: set[int] = set()  # wanted jobs without slurmstepd at the last look
        self._wait_ns = SCAN_WAIT_NS
        self._scans_count = 0
        self._others: dict[int, int] = {}  # how often a pid was no slurmstepd in a row

    def look(self, wanted: Iterable[int], boot_ns: int) -> dict[int, Signs]:
        """Signs by job id: of the wanted jobs for certain, of others as far as they are known.

        All processes are looked through only while a wanted job shows nothing, and not each time.
        """
        self._stepds = {
            pid: known for pid, known in self._stepds.items() if self._stepd(pid) == known
        }
        in_cgroups = self._jobs_in_cgroups()
        seen = {job for job, _step in self._stepds.values()}
        missing = (set(wanted) | in_cgroups) - seen
        if missing - self._missing:
            self._wait_ns = SCAN_WAIT_NS  # a job began; its slurmstepd appears within moments
        self._missing = missing
        scanned = self._scanned_boot_ns
        if scanned is None or boot_ns - scanned >= (self._wait_ns if missing else SCAN_EVERY_NS):
            self._wait_ns = min(2 * self._wait_ns, SCAN_EVERY_NS)
            self._scanned_boot_ns = boot_ns
            self._scan()
        found: dict[int, Signs] = {job: Signs() for job in in_cgroups}
        steps: dict[int, list[tuple[str, int]]] = {}
        for pid, (job, step) in sorted(self._stepds.items()):
            steps.setdefault(job, []).append((step, pid))
        for job, of_job in steps.items():
            found[job] = self._signs(job, of_job)
        self._environs = {job: self._environs[job] for job in steps if job in self._environs}
        return found

    def _scan(self) -> None:
        """Look through all processes for slurmstepd."""
        try:
            names = os.listdir(self._proc)  # noqa: PTH208
        except OSError:
            return
        others, self._others = self._others, {}
        self._scans_count += 1
        for pid in (int(name) for name in names if name.isdecimal()):
            if pid in self._stepds:
                continue
            before = others.get(pid, 0)
            # A slurmstepd has its title moments after its start, and pids come back late.
            known = None
            if before < 2 or self._scans_count % WHOLE_SCANS == 0:
                known = self._stepd(pid)
            if known is None:
                self._others[pid] = before + 1
            else:
                self._stepds[pid] = known

    def _stepd(self, pid: int) -> tuple[int, str] | None:
        """The job and step of a slurmstepd; only root's count, anybody can take that title."""
        try:
            descriptor = os.open(f"{self._proc}/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            content = os.read(descriptor, COMMAND_BYTES_MAX)
            match = _STEPD.match(content)
            if match is None or os.fstat(descriptor).st_uid not in self._trusted:
                return None
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return int(match.group(1)), match.group(2).decode()

    def _jobs_in_cgroups(self) -> set[int]:
        found: set[int] = set()
        for tree in _CGROUP_TREES:
            for count, path in enumerate(self._cgroups.glob(tree)):
                if count >= CGROUPS_MAX:
                    break
                place = place_of_path("/" + path.relative_to(self._cgroups).as_posix())
                if place is not None and place.job_id is not None:
                    found.add(place.job_id)
        return found

    def _signs(self, job: int, steps: list[tuple[str, int]]) -> Signs:
        work = [pid for step, pid in steps if step != "extern"]
        children = self._descendants(work)
        states = {state for _pid, state in children}
        stopped = bool(states) and states <= {"T", "t", "Z"} and states != {"Z"}
        environ = self._environs.get(job)
        if environ is None and children:
            environ = self._environ(children[0][0], job)
            if environ is not None:
                self._environs[job] = environ
        return Signs(
            steps=frozenset(step for step, _pid in steps),
            is_suspended=stopped or (bool(children) and self._is_frozen(children[0][0])),
            environ=environ,
        )

    def _descendants(self, pids: Iterable[int]) -> list[tuple[int, str]]:
        """Processes below these, in the order of their generations, with the letter of state."""
        found: list[tuple[int, str]] = []
        waiting = list(pids)
        while waiting and len(found) < CHILDREN_MAX:
            parent = waiting.pop(0)
            for name in self._children(parent):
                state = self._state(int(name))
                if state is not None:
                    found.append((int(name), state))
                    waiting.append(int(name))
        return found

    def _children(self, pid: int) -> list[bytes]:
        """The children of all threads: slurmstepd starts tasks from any of its own."""
        try:
            threads = sorted(os.listdir(f"{self._proc}/{pid}/task"))  # noqa: PTH208
        except OSError:
            return []
        found: list[bytes] = []
        for thread in threads:
            text = self._read(f"{pid}/task/{thread}/children", ENVIRONMENT_BYTES_MAX)
            found += (text or b"").split()
        return found

    def _is_frozen(self, pid: int) -> bool:
        """Whether its cgroup is frozen, which is how Slurm suspends what it tracks by cgroup."""
        for line in (
            (self._read(f"{pid}/cgroup", 65536) or b"").decode("utf-8", "replace").split("\n")
        ):
            _number, _colon, rest = line.partition(":")
            controllers, _colon, path = rest.partition(":")
            place = path.lstrip("/")
            if place_of_path(path) is None:
                continue
            v1 = controllers == "freezer"
            group = self._cgroups / ("freezer" if v1 else "") / place
            state = _frozen_line(group / ("freezer.state" if v1 else "cgroup.events"))
            if state in {"FROZEN", "frozen 1"}:
                return True
        return False

    def _state(self, pid: int) -> str | None:
        text = self._read(f"{pid}/stat", 4096)
        after = (text or b"").rpartition(b") ")[2]
        return chr(after[0]) if text and after else None

    def _environ(self, pid: int, job: int) -> dict[str, str] | None:
        """Slurm's variables of a process that slurmstepd started; None where it is not allowed."""
        content = self._read(f"{pid}/environ", ENVIRONMENT_BYTES_MAX)
        if not content:
            return None
        found: dict[str, str] = {}
        for item in content.split(b"\0"):
            name, equals, value = item.decode("utf-8", "replace").partition("=")
            if equals and name in KEPT_VARIABLES:
                found[name] = value
        return found if found.get("SLURM_JOB_ID") == str(job) else None

    def _read(self, path: str, bytes_max: int) -> bytes | None:
        try:
            descriptor = os.open(f"{self._proc}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            content = b""
            while len(content) < bytes_max and (piece := os.read(descriptor, 65536)):
                content += piece
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return content


def _frozen_line(path: Path) -> str | None:
    """FROZEN of v1, `frozen 1` of v2; None where there is no such file or it says otherwise."""
    try:
        with path.open("rb") as file:
            lines = file.read(256).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in lines if line.strip() in {"FROZEN", "frozen 1"}), None)


class _Life:
    """What is remembered of one job file."""

    __slots__ = ("had_lasting", "last_unix_ns", "lasting_ended_unix_ns")

    def __init__(self, written_unix_ns: int) -> None:
        self.last_unix_ns = written_unix_ns
        self.had_lasting = False
        self.lasting_ended_unix_ns: int | None = None


class GhostWatch:
    """Tells job files that were left behind from those of jobs that hold their GPUs in silence."""

    def __init__(self, grace_seconds: int = GRACE_SECONDS, lease_seconds: int = LEASE_SECONDS):
        self._grace_ns = grace_seconds * NS_PER_SECOND
        self._lease_ns = lease_seconds * NS_PER_SECOND
        self._lives: dict[tuple[str, int], _Life] = {}

    def ghosts(
        self,
        files: tuple[JobFile, ...],
        signs: Mapping[int, Signs],
        now_unix_ns: int,
        booted_unix_ns: int,
    ) -> dict[str, str]:
        """The reason by file name, of those that hold nothing any more."""
        lives = self._lives
        self._lives = {}
        found: dict[str, str] = {}
        for file in files:
            key = (file.file_name, file.written_unix_ns)
            life = self._lives[key] = lives.get(key) or _Life(file.written_unix_ns)
            reason = self._reason(file, life, signs.get(file.job.job_id), now_unix_ns)
            # A minute of doubt, because wall time may have been set right after the boot.
            if file.written_unix_ns < booted_unix_ns - 60 * NS_PER_SECOND and reason != "":
                reason = "it was written before this boot"
            if reason:
                found[file.file_name] = reason
        return found

    def _reason(
        self, file: JobFile, life: _Life, signs: Signs | None, now_unix_ns: int
    ) -> str | None:
        """Why it is a ghost; an empty text where the job lives, None where nobody knows."""
        if signs is not None:
            life.last_unix_ns = max(life.last_unix_ns, now_unix_ns)
            if signs.steps & _LASTING:
                life.had_lasting = True
                life.lasting_ended_unix_ns = None
            return ""
        if life.had_lasting:
            if life.lasting_ended_unix_ns is None:
                life.lasting_ended_unix_ns = now_unix_ns
            if now_unix_ns - life.lasting_ended_unix_ns >= self._grace_ns:
                seconds = self._grace_ns // NS_PER_SECOND
                return f"the job's processes have been gone for {seconds} seconds"
            return None
        lease_ns = life.last_unix_ns + self._lease_ns
        reason = f"no sign of the job for {self._lease_ns // NS_PER_SECOND} seconds"
        if file.job.end_unix_s:
            over_ns = (file.job.end_unix_s + OVERTIME_SECONDS) * NS_PER_SECOND
            lease_ns = max(over_ns, life.last_unix_ns + self._grace_ns)
            reason = "the job's time is over and nothing of it is here"
        return reason if now_unix_ns >= lease_ns else None
