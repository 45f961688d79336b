"""Slurm as a source of allocations: which jobs hold which devices of this node, and since when.

The prolog's job files are the truth where they exist: they are there from the allocation to its
end, also while a job holds its GPUs idle or suspended. Where a node has no such folder, jobs are
found by their slurmstepd and by the processes seen on devices, and which GPUs they were given
comes from the environment that slurmstepd gave them; that needs the right to read it. A job-mapping
folder of dcgm-exporter is read last, for devices that nothing else speaks of. No Slurm command and
no Slurm daemon is ever asked.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.allocations import Allocation, AllocationView, DeviceDirectory
from flopledger_agent.attribution.job_mapping import read_job_mapping
from flopledger_agent.attribution.slurm_cgroups import job_of_process, paths_in
from flopledger_agent.attribution.slurm_comment import parse_comment
from flopledger_agent.attribution.slurm_gres import (
    GRES_BYTES_MAX,
    GresOrder,
    devices_of,
    parse_gres_conf,
)
from flopledger_agent.attribution.slurm_jobs import (
    KEPT_VARIABLES,
    FolderView,
    job_from_environment,
)
from flopledger_agent.attribution.slurm_signs import ENVIRONMENT_BYTES_MAX, GhostWatch
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from flopledger_agent.attribution.slurm_gres import Held
    from flopledger_agent.attribution.slurm_jobs import JobFile, JobFolder, SlurmJob
    from flopledger_agent.attribution.slurm_signs import NodeSigns, Signs
    from flopledger_agent.clocks import Clock

DEFAULT_FOLDER: Final = Path("/run/flopledger-agent/slurm")
DEFAULT_GRES_CONF: Final = Path("/etc/slurm/gres.conf")
INTERVAL_SECONDS: Final = 0.5  # listing a small folder takes microseconds
UNFILED_NS: Final = 5 * NS_PER_SECOND  # so long a job may be seen without its file, at its edges
UNFILED_STEP_NS: Final = NS_PER_SECOND  # counted at most between two looks, which are 0.5 s apart
TROUBLES_MAX: Final = 32
CGROUP_BYTES_MAX: Final = 65536
SUSPENDED: Final = "suspended"

DeviceProcesses = tuple[tuple[str, tuple[int, ...]], ...]  # (Device.key, pids on it)


class SlurmPaths(msgspec.Struct, frozen=True, kw_only=True):
    """Where this node keeps what is read."""

    proc: Path = Path("/proc")
    gres_conf: Path | None = None  # None: beside the slurm.conf that the prolog names
    job_mapping: Path | None = None  # dcgm-exporter's folder, where a site has one


class SlurmReader:
    """One look at everything Slurm left on this node; one caller at a time."""

    def __init__(
        self,
        clock: Clock,
        folder: JobFolder,
        signs: NodeSigns,
        paths: SlurmPaths,
        watch: GhostWatch,
    ) -> None:
        self._clock = clock
        self._folder = folder
        self._signs = signs
        self._paths = paths
        self._watch = watch
        self._unfiled: dict[int, int] = {}  # jobs without a file, and for how long (ns)
        self._watched_ns = 0
        self._filed: set[int] = set()  # jobs that had a file while they were seen
        self._slurm_conf: str | None = None  # as a prolog named it last
        self._gres: dict[tuple[str, str | None], tuple[tuple[int, int], GresOrder]] = {}

    def look(self, directory: DeviceDirectory, processes: DeviceProcesses) -> AllocationView:
        """Who holds what now; `processes` are those on each device at the last sample."""
        boot_ns, unix_ns = self._clock.boottime_ns(), self._clock.wall_unix_ns()
        folder = self._folder.read()
        for file in folder.files:
            self._slurm_conf = file.job.slurm_conf or self._slurm_conf
        signs = self._signs.look((file.job.job_id for file in folder.files), boot_ns)
        ghosts = self._watch.ghosts(folder.files, signs, unix_ns, unix_ns - boot_ns)
        alive = [file for file in folder.files if file.file_name not in ghosts]
        troubles = list(folder.troubles)
        held = {file.file_name: self._held(file.job, directory) for file in alive}
        ghosts |= _superseded(alive, held, signs, self._may_share)
        told: dict[int, tuple[str, ...]] = {}
        allocations: list[Allocation] = []
        for file in alive:
            if file.file_name in ghosts:
                continue
            holds = held[file.file_name]
            told[file.job.job_id] = holds.devices
            if holds.trouble is not None:
                troubles.append(holds.trouble)
            seen = signs.get(file.job.job_id)
            allocations += _allocations(
                _completed(file.job, seen),
                holds,
                seen,
                file.written_unix_ns,
                f"job file {file.file_name}, {holds.how}",
            )
        sluids = {file.job.sluid: file.job.job_id for file in alive if file.job.sluid}
        allocations += self._without_file(folder, signs, directory, told, troubles)
        allocations += self._on_devices(processes, told, sluids, troubles)
        allocations += self._mapped(directory, boot_ns, allocations, troubles)
        comments = {a.job: parse_comment(a.names.get("comment")).trouble for a in allocations}
        troubles += [f"job {job}: {text}" for job, text in sorted(comments.items()) if text]
        return AllocationView(
            allocations=_with_sharing(allocations),
            troubles=_limited(troubles),
            ghosts=tuple(f"{name}: {reason}" for name, reason in sorted(ghosts.items())),
            as_of_boot_ns=boot_ns,
        )

    # --- what a job holds ---------------------------------------------------------------------

    def _held(self, job: SlurmJob, directory: DeviceDirectory) -> Held:
        return devices_of(job, self._order(job), directory)

    def _may_share(self, job: SlurmJob) -> bool:
        order = self._order(job)
        return order is None or order.may_share or order.trouble is not None

    def _order(self, job: SlurmJob) -> GresOrder | None:
        """gres.conf as slurmd of this job reads it; None where it cannot be read."""
        path = self._paths.gres_conf
        if path is None:
            conf = job.slurm_conf or self._slurm_conf
            path = DEFAULT_GRES_CONF if conf is None else Path(conf).with_name("gres.conf")
        key = (str(path), job.node)
        try:
            facts = path.stat()
            version = (facts.st_mtime_ns, facts.st_size)
            known = self._gres.get(key)
            if known is None or known[0] != version:
                with path.open("rb") as file:
                    text = file.read(GRES_BYTES_MAX).decode("utf-8", "replace")
                known = self._gres[key] = (version, parse_gres_conf(text, job.node))
        except OSError:
            return None
        return known[1]

    # --- where no job file speaks -------------------------------------------------------------

    def _watch_unfiled(self, without: set[int]) -> None:
        """How long each job was seen without its file: time between two far looks tells little.

        A requeued job ends and begins again under one id, so only time that was watched counts.
        """
        now_ns = self._clock.boottime_ns()
        passed_ns = min(now_ns - self._watched_ns, UNFILED_STEP_NS)
        self._watched_ns = now_ns
        self._unfiled = {
            job_id: self._unfiled[job_id] + passed_ns if job_id in self._unfiled else 0
            for job_id in without
        }

    def _without_file(
        self,
        folder: FolderView,
        signs: Mapping[int, Signs],
        directory: DeviceDirectory,
        told: dict[int, tuple[str, ...]],
        troubles: list[str],
    ) -> list[Allocation]:
        """Jobs with a slurmstepd and no job file: what their environment says they were given."""
        with_file = {file.job.job_id for file in folder.files}
        # A job whose file the epilog took away is over, though its slurmstepd may linger for long.
        self._filed = (self._filed | with_file) & set(signs)
        without = set(signs) - with_file - self._filed
        self._watch_unfiled(without)
        found: list[Allocation] = []
        for job_id in sorted(without):
            # Its file may have come or gone since the folder was read, and slurmstepd may linger.
            if folder.present and self._unfiled[job_id] < UNFILED_NS:
                continue
            seen = signs[job_id]
            job = None if seen.environ is None else job_from_environment(seen.environ)
            if job is None or not job.wants_devices:
                continue
            holds = self._held(job, directory)
            if holds.trouble is not None:
                troubles.append(holds.trouble)
            told[job_id] = holds.devices
            if folder.present:
                troubles.append(
                    f"job {job.name} has no job file, and its environment is believed instead; "
                    "let slurm.conf name prolog.sh for every partition of this node"
                )
            how = f"environment of job {job.name}, {holds.how}"
            found += _allocations(job, holds, seen, None, how)
        return found

    def _on_devices(
        self,
        processes: DeviceProcesses,
        told: Mapping[int, tuple[str, ...]],
        sluids: Mapping[str, int],
        troubles: list[str],
    ) -> list[Allocation]:
        """Jobs that are known only by a process of theirs on a device, and contradictions."""
        found: dict[tuple[str, int], Allocation] = {}
        for key, pids in processes:
            for pid in pids:
                environ = self._environ(pid)
                text = _text(self._paths.proc / str(pid) / "cgroup", CGROUP_BYTES_MAX)
                sight = job_of_process(paths_in(text or ""), environ, sluids)
                if sight is None or sight.job_id is None:
                    continue
                if sight.contradiction is not None:
                    troubles.append(
                        f"process {pid} is in job {sight.job_id}, and {sight.contradiction}; "
                        "the cgroup counts: ask its user to leave SLURM_JOB_ID alone"
                    )
                devices = told.get(sight.job_id)
                if devices is not None:
                    if sight.by_path and devices and key not in devices:
                        troubles.append(
                            f"job {sight.job_id} runs on {key}, which Slurm did not give it; set "
                            "ConstrainDevices=yes in cgroup.conf, and compare gres.conf with the "
                            "device files"
                        )
                    continue
                job = job_from_environment(environ or {}) if not sight.contradiction else None
                if (key, sight.job_id) not in found:
                    found[key, sight.job_id] = _of_process(
                        key, sight.job_id, pid, job, sight.by_path
                    )
        return list(found.values())

    def _mapped(
        self,
        directory: DeviceDirectory,
        boot_ns: int,
        known: Iterable[Allocation],
        troubles: list[str],
    ) -> list[Allocation]:
        """What the job-mapping folder says of devices that nothing else speaks of."""
        if self._paths.job_mapping is None:
            return []
        view = read_job_mapping(self._paths.job_mapping, directory, boot_ns)
        troubles += view.troubles
        spoken = {allocation.device for allocation in known}
        return [one for one in view.allocations if one.device not in spoken]

    def _environ(self, pid: int) -> dict[str, str] | None:
        """Slurm's variables of a process; None where they cannot be read."""
        text = _text(self._paths.proc / str(pid) / "environ", ENVIRONMENT_BYTES_MAX)
        if text is None:
            return None
        pairs = (item.partition("=") for item in text.split("\0"))
        return {name: value for name, _equals, value in pairs if name in KEPT_VARIABLES}


class SlurmSource:
    """Answers from memory what a thread of its own found out at its last look."""

    def __init__(
        self,
        reader: SlurmReader,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self._reader = reader
        self._interval_seconds = interval_seconds
        self._changed = changed  # told when the allocations changed; must return at once
        self._directory = DeviceDirectory()
        self._processes: DeviceProcesses = ()
        self._view = AllocationView()
        self._looked_at: DeviceDirectory | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="slurm", daemon=True)

    def start(self) -> None:
        """Begin to look; until the first look ends, nothing is known."""
        self._thread.start()

    def observe(self, directory: DeviceDirectory, processes: Mapping[str, tuple[int, ...]]) -> None:
        """Take note of the devices and of the processes on them at the last sample."""
        self._directory = directory
        self._processes = tuple(sorted(processes.items()))

    def allocations(self) -> AllocationView:
        """What is known now, from memory; never blocks and never raises."""
        return self._view

    def has_looked_at(self, directory: DeviceDirectory) -> bool:
        """Whether the last look knew these very devices."""
        return self._looked_at is directory

    def look_now(self) -> None:
        """Look at once instead of at the end of the interval."""
        self._wake.set()

    def close(self) -> None:
        """Stop looking; a look that hangs in the file system is left behind."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def _work(self) -> None:
        while not self._stop.is_set():
            before, directory = self._view, self._directory
            try:
                self._view = self._reader.look(directory, self._processes)
            except Exception as error:  # noqa: BLE001 - a defect here must not end attribution
                text = (
                    f"looking at Slurm's jobs failed ({type(error).__name__}: {error}); report it"
                )
                self._view = msgspec.structs.replace(before, troubles=(text,))
            self._looked_at = directory
            if self._changed is not None and before.allocations != self._view.allocations:
                self._changed()
            self._wake.wait(timeout=self._interval_seconds)
            self._wake.clear()


def _allocations(
    job: SlurmJob, holds: Held, seen: Signs | None, written_unix_ns: int | None, evidence: str
) -> list[Allocation]:
    since_ns = written_unix_ns
    if since_ns is None and job.start_unix_s is not None:
        since_ns = job.start_unix_s * NS_PER_SECOND
    comment = parse_comment(job.comment)
    names = {**_names(job), **comment.names}
    if seen is not None and seen.is_suspended:
        names["state"] = SUSPENDED
    return [
        Allocation(
            scheduler="slurm",
            device=key,
            job=job.name,
            attempt=None if job.restart_count is None else str(job.restart_count),
            user=job.user,
            names=names,
            tags=comment.tags,
            shared=job.is_shared,
            since_unix_ms=None if since_ns is None else since_ns // 1_000_000,
            evidence=evidence,
        )
        for key in holds.devices
    ]


def _of_process(
    key: str,
    job_id: int,
    pid: int,
    job: SlurmJob | None,
    by_path: bool,  # noqa: FBT001
) -> Allocation:
    """An allocation that is known only because a process of the job is on the device."""
    how = "cgroup" if by_path else "environment"
    comment = parse_comment(None if job is None else job.comment)
    return Allocation(
        scheduler="slurm",
        device=key,
        job=str(job_id) if job is None else job.name,
        attempt=None if job is None or job.restart_count is None else str(job.restart_count),
        user=None if job is None else job.user,
        names={} if job is None else {**_names(job), **comment.names},
        tags=comment.tags,
        evidence=f"{how} of process {pid} on the device",
    )


def _names(job: SlurmJob) -> dict[str, str]:
    values = {
        "job_id": str(job.job_id),
        "account": job.account,
        "partition": job.partition,
        "qos": job.qos,
        "reservation": job.reservation,
        "job_name": job.job_name,
        "comment": job.comment,
        "wckey": job.wckey,
        "cluster": job.cluster,
        "node": job.node,
        "sluid": job.sluid,
        "user_id": job.user_id,
        "array_job_id": job.array_job_id,
        "array_task_id": job.array_task_id,
        "het_job_id": job.het_job_id,
        "too_long": ",".join(job.too_long) or None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _completed(job: SlurmJob, seen: Signs | None) -> SlurmJob:
    """The job with names that only its environment has; its id stays as the job file says it."""
    if seen is None or seen.environ is None:
        return job
    more = job_from_environment(seen.environ)
    if more is None or more.job_id != job.job_id:
        return job
    return msgspec.structs.replace(
        job,
        job_name=job.job_name or more.job_name,
        wckey=job.wckey or more.wckey,
        account=job.account or more.account,
        is_shared=job.is_shared or more.is_shared,
    )


def _superseded(
    files: list[JobFile],
    held: Mapping[str, Held],
    signs: Mapping[int, Signs],
    may_share: Callable[[SlurmJob], bool],
) -> dict[str, str]:
    """Silent jobs whose devices Slurm gave to a later job where it never shares any."""
    found: dict[str, str] = {}
    latest: dict[str, JobFile] = {}
    for file in sorted(files, key=lambda one: one.written_unix_ns):
        for key in held[file.file_name].devices:
            before = latest.get(key)
            latest[key] = file
            if before is None or before.job.job_id in signs or before.job.is_shared:
                continue
            if not may_share(before.job) and not may_share(file.job):
                found[before.file_name] = f"job {file.job.name} was given its devices after it"
    return found


def _with_sharing(allocations: list[Allocation]) -> tuple[Allocation, ...]:
    """Allocations in a fixed order; whoever holds a device together with another job shares it."""
    jobs: dict[str, set[str]] = {}
    for one in allocations:
        jobs.setdefault(one.device, set()).add(one.job)
    return tuple(
        msgspec.structs.replace(one, shared=one.shared or len(jobs[one.device]) > 1)
        for one in sorted(allocations, key=lambda one: (one.device, one.job))
    )


def _limited(troubles: list[str]) -> tuple[str, ...]:
    """Each once and printable; a node full of broken jobs does not fill the log."""
    once = list(dict.fromkeys(troubles))
    if len(once) > TROUBLES_MAX:
        once = [*once[:TROUBLES_MAX], f"{len(once) - TROUBLES_MAX} more troubles with Slurm's jobs"]
    return tuple("".join(c if c.isprintable() else "?" for c in text) for text in once)


def _text(path: Path, bytes_max: int) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(bytes_max).decode("utf-8", "replace")
    except OSError:
        return None
