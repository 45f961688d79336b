"""Which Slurm job a process belongs to, from its cgroup path and its environment. Pure.

The path is slurmstepd's word: only root moves a process into another job's cgroup. A process can
be started with any environment, so that counts only where no path speaks, and where both speak
and disagree the path wins and the disagreement is told.

    v1                /slurm[_<node>]/uid_1000/job_211/step_0/task_0
    v2                /system.slice/[<node>_]slurmstepd.scope/job_211/step_batch/user/task_0
    v2 from 26.05 on  /system.slice/[<node>_]slurmstepd.scope/s5K1KKYAYG5D00/step_0/user/task_0

The last names a job by its SLUID, whose job id only the job file or the environment tells. Which
nodes there are several of, and which slice they are in, is the site's matter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SLUID: Final = re.compile(r"s[0-9A-HJKMNP-TV-Z]{13}")
_STEP: Final = r"(?:/step_(?P<step>[A-Za-z0-9_]{1,40}))?(?=/|\Z)"
# What a user makes below his own slice is not slurmstepd's, whatever its name is.
_FOREIGN: Final = re.compile(r"(?:\A|/)(?:user\.slice|kubepods[^/]*|machine\.slice)(?=/)")
_V1: Final = re.compile(
    r"(?:\A|/)slurm(?:_(?P<node>[^/]+))?/uid_(?P<uid>[0-9]{1,10})/job_(?P<job>[0-9]{1,20})" + _STEP
)
_V2: Final = re.compile(
    r"(?:\A|/)(?:(?P<node>[^/]+)_)?slurmstepd\.scope/"
    r"(?:job_(?P<job>[0-9]{1,20})|(?P<sluid>s[0-9A-HJKMNP-TV-Z]{13}))" + _STEP
)
_LINE: Final = re.compile(r"[0-9]+:[^:]*:(.*)")


class SlurmPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where in Slurm's tree a process is."""

    job_id: int | None  # None: the path names the job by its SLUID
    sluid: str | None = None
    step: str | None = None  # 0, 1, ..., batch, extern, interactive
    node: str | None = None  # of several slurmd on one machine
    user_id: int | None = None


class JobOfProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The job of a process, and how sure that is."""

    job_id: int | None  # None: only the SLUID is known
    sluid: str | None
    step: str | None
    by_path: bool  # False: only its environment says so, which anybody can set
    contradiction: str | None  # what its environment claims instead


def place_of_path(path: str) -> SlurmPlace | None:
    """The place that one cgroup path names; None where it is not Slurm's."""
    found = _V2.search(path) or _V1.search(path)
    if found is None or _FOREIGN.search(path[: found.start() + 1]):
        return None
    parts = found.groupdict()
    return SlurmPlace(
        job_id=None if parts["job"] is None else int(parts["job"]),
        sluid=parts.get("sluid"),
        step=parts["step"],
        node=parts["node"],
        user_id=None if parts.get("uid") is None else int(parts["uid"]),
    )


def paths_in(cgroup_file: str) -> tuple[str, ...]:
    """The paths in the content of /proc/<pid>/cgroup, one for each hierarchy."""
    found = (_LINE.fullmatch(line) for line in cgroup_file.splitlines())
    return tuple(match.group(1) for match in found if match is not None)


def place_of_process(paths: Iterable[str]) -> SlurmPlace | None:
    """The most telling place of a process's paths: v1 has one for each controller."""
    best: SlurmPlace | None = None
    for path in paths:
        place = place_of_path(path)
        if place is not None and (best is None or (best.step is None and place.step is not None)):
            best = place
    return best


def job_of_process(
    paths: Iterable[str], environ: Mapping[str, str] | None, job_of_sluid: Mapping[str, int]
) -> JobOfProcess | None:
    """The Slurm job of a process; None where neither its path nor its environment names one."""
    place = place_of_process(paths)
    claimed = _job_id((environ or {}).get("SLURM_JOB_ID"))
    if place is None:
        if claimed is None:
            return None
        sluid = (environ or {}).get("SLURM_JOB_SLUID")
        step = (environ or {}).get("SLURM_STEP_ID")
        return JobOfProcess(
            job_id=claimed,
            sluid=sluid if sluid and SLUID.fullmatch(sluid) else None,
            step=step if step and step.isdecimal() else None,
            by_path=False,
            contradiction=None,
        )
    job_id = place.job_id
    if job_id is None and place.sluid is not None:
        job_id = job_of_sluid.get(place.sluid)
        if job_id is None and (environ or {}).get("SLURM_JOB_SLUID") == place.sluid:
            job_id = claimed
    contradiction = None
    if claimed is not None and job_id is not None and claimed != job_id:
        contradiction = f"its environment claims job {claimed}"
    return JobOfProcess(
        job_id=job_id,
        sluid=place.sluid,
        step=place.step,
        by_path=True,
        contradiction=contradiction,
    )


def _job_id(value: str | None) -> int | None:
    if value is None or not value.isascii() or not value.isdigit() or len(value) > 18:
        return None
    return int(value)
