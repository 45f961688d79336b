"""The job files that Slurm's prolog writes on this node: one for each job that was given something.

`deploy/slurm/prolog.sh` writes them as root and `epilog.sh` removes them. Users choose some of the
values (comment, job name), so every file is read strictly and within limits: a file is used whole
or not at all, and one that cannot be used is a trouble with its remedy and hides no other.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from pathlib import Path

FILE_BYTES_MAX: Final = 32 * 1024  # twenty values of a kilobyte, each byte escaped
FILES_MAX: Final = 4096  # far more jobs than any node runs at once
GPUS_MAX: Final = 1024  # of one job on one node
TROUBLES_MAX: Final = 8  # told one by one; the rest is counted
FIRST_LINE: Final = "flopledger_slurm_job=1"
LAST_LINE: Final = "end=1"
FILE_NAME: Final = re.compile(r"([0-9]{1,20})\.([A-Za-z0-9_-][A-Za-z0-9._-]{0,254})\.job")
NO_DEVICE_FILES: Final = "NoDevFiles"  # Slurm's word where gres.conf names no device files
_KEY: Final = re.compile(r"[a-z][a-z_]{0,39}(?:\.[a-z_]{1,40})?")
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED: Final = {"\\": "\\", "n": "\n"}
_UUID: Final = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z./-]{8,120}")
_TEXTS: Final = (
    "node",
    "cluster",
    "sluid",
    "user",
    "account",
    "partition",
    "qos",
    "reservation",
    "job_name",
    "comment",
    "wckey",
    "slurm_conf",
)
_NUMBERS: Final = {
    "uid": "user_id",
    "restart_count": "restart_count",
    "array_job_id": "array_job_id",
    "array_task_id": "array_task_id",
    "het_job_id": "het_job_id",
    "het_job_offset": "het_offset_index",
    "start_time": "start_unix_s",
    "end_time": "end_unix_s",
}


class BrokenJobFile(ValueError):
    """A job file says something that the prolog never writes."""


class SlurmJob(msgspec.Struct, frozen=True, kw_only=True):
    """One job on this node as its prolog described it; what it did not say is None or empty."""

    job_id: int  # the number Slurm gave to this job alone, also within an array
    node: str | None = None
    cluster: str | None = None
    sluid: str | None = None
    user: str | None = None
    user_id: int | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    job_name: str | None = None
    comment: str | None = None
    wckey: str | None = None
    restart_count: int | None = None
    array_job_id: int | None = None
    array_task_id: int | None = None
    het_job_id: int | None = None
    het_offset_index: int | None = None
    gpu_index: tuple[int, ...] = ()  # places in the order of gres.conf, not NVML's ordinals
    gpu_uuids: tuple[str, ...] = ()  # where Slurm itself names devices by UUID: MIG
    device_minor_numbers: tuple[int, ...] = ()  # where the prolog was told the order
    has_no_device_files: bool = False
    is_shared: bool = False  # it was given shards, or a percentage of MPS
    start_unix_s: int | None = None
    end_unix_s: int | None = None
    slurm_conf: str | None = None
    too_long: tuple[str, ...] = ()  # values that the prolog left out because of their length

    @property
    def name(self) -> str:
        """The job's id as people and sacct write it: 123, 123_4 of an array, 123+1 of a het job."""
        if self.array_job_id is not None and self.array_task_id is not None:
            return f"{self.array_job_id}_{self.array_task_id}"
        if self.het_job_id is not None and self.het_offset_index is not None:
            return f"{self.het_job_id}+{self.het_offset_index}"
        return str(self.job_id)

    @property
    def wants_devices(self) -> bool:
        """Whether Slurm gave it GPUs of this node at all."""
        named = self.gpu_index or self.gpu_uuids or self.device_minor_numbers
        return bool(named) or self.has_no_device_files


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """A job file that could be read."""

    file_name: str
    job: SlurmJob
    written_unix_ns: int  # the prolog ran then


class FolderView(msgspec.Struct, frozen=True, kw_only=True):
    """Every job file of the folder now."""

    present: bool  # False: there is no such folder
    files: tuple[JobFile, ...] = ()
    troubles: tuple[str, ...] = ()


def parse_job_file(content: bytes) -> SlurmJob:
    """The job that a file's content describes. Errors: BrokenJobFile says what is wrong with it."""
    if len(content) > FILE_BYTES_MAX:
        raise BrokenJobFile(f"it is longer than {FILE_BYTES_MAX} bytes")
    text = content.decode("utf-8", "replace")
    lines = text.split("\n")
    if lines[0] != FIRST_LINE:
        raise BrokenJobFile(f"its first line is not {FIRST_LINE}")
    if lines[-2:] != [LAST_LINE, ""]:
        raise BrokenJobFile(f"its last line is not {LAST_LINE}: it was cut short")
    values: dict[str, str] = {}
    for line in lines[1:-2]:
        key, equals, value = line.partition("=")
        if not equals or _KEY.fullmatch(key) is None:
            raise BrokenJobFile(f"the line {line[:60]!r} is not name=value")
        if key in values:
            raise BrokenJobFile(f"it says {key} twice")
        values[key] = _unescaped(key, value)
    return _job(values)


def job_from_environment(environ: dict[str, str]) -> SlurmJob | None:
    """The same from the environment that slurmstepd gave to a job; None: it is no Slurm job's.

    There CUDA_VISIBLE_DEVICES counts from zero within the job, so only UUIDs in it are used.
    """
    values = {
        key: environ[variable]
        for key, variables in _ENVIRONMENT.items()
        for variable in variables
        if environ.get(variable)
    }
    visible = values.get("visible_devices")
    if visible is not None and not _uuids(visible):
        del values["visible_devices"]
    try:
        return _job(values)
    except BrokenJobFile:
        return None


_ENVIRONMENT: Final[dict[str, tuple[str, ...]]] = {
    "job_id": ("SLURM_JOBID", "SLURM_JOB_ID"),
    "node": ("SLURMD_NODENAME",),
    "cluster": ("SLURM_CLUSTER_NAME",),
    "sluid": ("SLURM_JOB_SLUID",),
    "user": ("SLURM_JOB_USER",),
    "uid": ("SLURM_JOB_UID",),
    "account": ("SLURM_JOB_ACCOUNT",),
    "partition": ("SLURM_JOB_PARTITION",),
    "qos": ("SLURM_JOB_QOS",),
    "reservation": ("SLURM_JOB_RESERVATION",),
    "job_name": ("SLURM_JOB_NAME",),
    "comment": ("SLURM_JOB_COMMENT",),
    "wckey": ("SLURM_WCKEY", "SLURM_JOB_WCKEY"),
    "restart_count": ("SLURM_RESTART_COUNT",),
    "array_job_id": ("SLURM_ARRAY_JOB_ID",),
    "array_task_id": ("SLURM_ARRAY_TASK_ID",),
    "gpus": ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"),  # the job's where both are there
    "visible_devices": ("CUDA_VISIBLE_DEVICES",),
    "shards": ("SLURM_SHARDS_ON_NODE",),
    "mps_percent": ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",),
    "start_time": ("SLURM_JOB_START_TIME",),
    "end_time": ("SLURM_JOB_END_TIME",),
}
KEPT_VARIABLES: Final = frozenset(name for names in _ENVIRONMENT.values() for name in names)
"""Everything that may be remembered of a job's environment; the rest may hold secrets."""


class JobFolder:
    """Reads the folder; a file that did not change is not read again. One caller at a time."""

    def __init__(self, path: Path, trusted_user_ids: frozenset[int] = frozenset({0})) -> None:
        self._path = path
        self._trusted = trusted_user_ids
        self._known: dict[str, tuple[tuple[int, ...], JobFile | str]] = {}

    def read(self) -> FolderView:
        """The folder now; never raises."""
        try:
            folder = os.stat(self._path)  # noqa: PTH116 - pathlib would cost more, this runs often
            names = sorted(os.listdir(self._path))  # noqa: PTH208
        except FileNotFoundError:
            self._known.clear()
            return FolderView(present=False)
        except OSError as error:
            trouble = f"{self._path}: {error.strerror}; let the agent's user list this folder"
            return FolderView(present=True, troubles=(trouble,))
        if folder.st_uid not in self._trusted or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            trouble = (
                f"{self._path}: others than root may write here, so nothing in it is believed; "
                "let it belong to root with mode 755"
            )
            return FolderView(present=True, troubles=(trouble,))
        files: list[JobFile] = []
        troubles: list[str] = []
        names = [name for name in names if FILE_NAME.fullmatch(name)]
        if len(names) > FILES_MAX:
            troubles.append(
                f"{self._path}: {len(names)} job files, only {FILES_MAX} are read; "
                "check that epilog.sh runs"
            )
        self._known = {name: self._known[name] for name in names if name in self._known}
        for name in names[:FILES_MAX]:
            found = self._file(name)
            if isinstance(found, JobFile):
                files.append(found)
            elif found is not None:
                troubles.append(f"{self._path / name}: {found}")
        if len(troubles) > TROUBLES_MAX:
            more = len(troubles) - TROUBLES_MAX
            troubles = [*troubles[:TROUBLES_MAX], f"{self._path}: {more} more files like these"]
        return FolderView(present=True, files=tuple(files), troubles=tuple(troubles))

    def _file(self, name: str) -> JobFile | str | None:
        """The file, or what is wrong with it; None when it is gone meanwhile."""
        try:
            descriptor = os.open(
                self._path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except FileNotFoundError:
            self._known.pop(name, None)
            return None
        except OSError as error:
            return f"{error.strerror}; let the agent's user read it (mode 644), and no links"
        try:
            facts = os.fstat(descriptor)
            version = (facts.st_ino, facts.st_mtime_ns, facts.st_size, facts.st_uid, facts.st_mode)
            known = self._known.get(name)
            if known is None or known[0] != version:
                known = (version, self._read(descriptor, facts, name))
                self._known[name] = known
            return known[1]
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, facts: os.stat_result, name: str) -> JobFile | str:
        if not stat.S_ISREG(facts.st_mode):
            return "this is no file; remove it"
        if facts.st_uid not in self._trusted or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "others than root can write it, so it is not believed; remove it"
        try:
            content = b""
            while len(content) <= FILE_BYTES_MAX and (piece := os.read(descriptor, 65536)):
                content += piece
            job = parse_job_file(content)
        except BrokenJobFile as error:
            return f"{error}; install deploy/slurm/prolog.sh of this agent's version, remove this"
        except OSError as error:
            return f"{error.strerror}; remove it"
        if str(job.job_id) != name.partition(".")[0].lstrip("0"):
            return f"it speaks of job {job.job_id}; remove it"
        return JobFile(file_name=name, job=job, written_unix_ns=facts.st_mtime_ns)


def _job(values: dict[str, str]) -> SlurmJob:
    job_id = _number("job_id", values.get("job_id"))
    if not job_id:
        raise BrokenJobFile("it names no job")
    gpus = values.get("gpus")
    visible = values.get("visible_devices")
    uuids = _uuids(visible or "") or _uuids(gpus or "")
    if not gpus and not uuids:
        gpus = visible  # as older plugins of MPS do; in a prolog it counts as SLURM_JOB_GPUS does
    no_files = gpus == NO_DEVICE_FILES
    fields: dict[str, object] = {name: values[name] for name in _TEXTS if values.get(name)}
    for key, field in _NUMBERS.items():
        fields[field] = _number(key, values.get(key))
    return msgspec.convert(
        {
            **fields,
            "job_id": job_id,
            "gpu_index": () if no_files or uuids else _numbers("gpus", gpus),
            "gpu_uuids": uuids,
            "device_minor_numbers": _numbers("device_minors", values.get("device_minors")),
            "has_no_device_files": no_files,
            "is_shared": bool(values.get("shards") or values.get("mps_percent")),
            "too_long": tuple(
                key.partition(".")[2] for key in values if key.startswith("too_long.")
            ),
        },
        SlurmJob,
    )


def _unescaped(key: str, value: str) -> str:
    def one(match: re.Match[str]) -> str:
        if match.group(1) not in _ESCAPED:
            raise BrokenJobFile(f"{key} has the unknown escape {match.group()!r}")
        return _ESCAPED[match.group(1)]

    if value.replace("\\\\", "").endswith("\\"):
        raise BrokenJobFile(f"{key} ends in half an escape")
    return _ESCAPE.sub(one, value)


def _number(key: str, value: str | None) -> int | None:
    if value is None or value == "":
        return None
    if len(value) > 18 or not value.isascii() or not value.isdigit():
        raise BrokenJobFile(f"{key} is {value[:40]!r}, not a number")
    return int(value)


def _numbers(key: str, value: str | None) -> tuple[int, ...]:
    """A list such as 0,2 or 0-3,5, in ascending order without repetitions."""
    found: set[int] = set()
    for part in (value or "").split(",") if value else ():
        first, dash, last = part.partition("-")
        begin = _number(key, first)
        end = _number(key, last) if dash else begin
        if begin is None or end is None or not begin <= end < begin + GPUS_MAX:
            raise BrokenJobFile(f"{key} is {(value or '')[:40]!r}, not a list of numbers")
        found.update(range(begin, end + 1))
        if len(found) > GPUS_MAX:
            raise BrokenJobFile(f"{key} names more than {GPUS_MAX} devices")
    return tuple(sorted(found))


def _uuids(value: str) -> tuple[str, ...]:
    """The UUIDs of a list of devices; none where it is a list of numbers."""
    parts = tuple(part for part in value.split(",") if part)
    return parts if parts and all(_UUID.fullmatch(part) for part in parts) else ()
