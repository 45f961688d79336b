"""The job-mapping folder of dcgm-exporter, which many sites' prologs already write.

One file for each GPU, named by NVML's ordinal (`3`), or by ordinal and GPU instance (`3.9`); one
job id on each line. Several lines mean that the jobs share it. The folder says nothing else, so
users, accounts and attempts stay unknown, and a file whose job ended is told only by its emptiness.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.allocations import Allocation, AllocationView

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_agent.attribution.allocations import DeviceDirectory

FILE_BYTES_MAX: Final = 4096
FILES_MAX: Final = 1024
JOBS_MAX: Final = 128  # on one device
FILE_NAME: Final = re.compile(r"([0-9]{1,5})(?:\.([0-9]{1,3}))?")
_JOB: Final = re.compile(r"[0-9]{1,20}(?:[_+][0-9]{1,10})?")


def read_job_mapping(folder: Path, directory: DeviceDirectory, boot_ns: int) -> AllocationView:
    """The allocations that the folder names; never raises."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208
    except OSError as error:
        trouble = f"{folder}: {error.strerror}; correct the folder, or leave it out"
        return AllocationView(troubles=(trouble,))
    allocations: list[Allocation] = []
    troubles: list[str] = []
    for name in [name for name in names if FILE_NAME.fullmatch(name)][:FILES_MAX]:
        found = _one(folder / name, directory)
        if isinstance(found, str):
            troubles.append(f"{folder / name}: {found}")
        else:
            allocations.extend(found)
    return AllocationView(
        allocations=tuple(allocations), troubles=tuple(troubles), as_of_boot_ns=boot_ns
    )


def _one(path: Path, directory: DeviceDirectory) -> list[Allocation] | str:
    """The jobs of one file, or what is wrong with it."""
    match = FILE_NAME.fullmatch(path.name)
    assert match is not None
    read = _read(path)
    if read is None or isinstance(read, str):
        return read or []
    content, written_unix_ns = read
    lines = (line.strip() for line in content.decode("utf-8", "replace").splitlines())
    jobs = list(dict.fromkeys(line for line in lines if line))
    if len(jobs) > JOBS_MAX or not all(_JOB.fullmatch(job) for job in jobs):
        return "it holds something other than job ids; one job id stands on each line"
    instance = None if match.group(2) is None else int(match.group(2))
    keys = directory.of_index(int(match.group(1)), instance)
    if jobs and not keys:
        return "no such device here; the name is NVML's ordinal, or ordinal.instance"
    return [
        Allocation(
            scheduler="slurm",
            device=key,
            job=job,
            shared=len(jobs) > 1,
            since_unix_ms=written_unix_ns // 1_000_000 if len(jobs) == 1 else None,
            evidence=f"job mapping {path.name} names job {job}",
        )
        for key in keys
        for job in jobs
    ]


def _read(path: Path) -> tuple[bytes, int] | str | None:
    """The content and when it was written, or what is wrong; None when it is gone meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{error.strerror}; let the agent's user read it"
    try:
        facts = os.fstat(descriptor)
        regular = stat.S_ISREG(facts.st_mode)
        content = os.read(descriptor, FILE_BYTES_MAX + 1) if regular else b""
    except OSError as error:
        return f"{error.strerror}; remove it"
    finally:
        os.close(descriptor)
    if not regular:
        return "this is no file; remove it"
    if len(content) > FILE_BYTES_MAX:
        return f"it is longer than {FILE_BYTES_MAX} bytes; one job id stands on each line"
    return content, facts.st_mtime_ns
