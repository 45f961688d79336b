"""Reads single values of sacct text: times, durations, TRES strings, states, job ids, tags.

Kept apart from the rows so that each rule can be seen and tested alone. A value is read or refused
with a sentence; nothing is guessed except which of two instants an ambiguous local time means, and
then the caller is told.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from flopledger_core.errors import InvalidInput

SECONDS_MAX: Final = 100 * 366 * 86_400  # a century: anything longer is not the life of a job
GPUS_MAX: Final = 10_000_000  # more GPUs than any site has; keeps GPU-seconds far below 2^63
YEAR_MIN, YEAR_MAX = 1970, 2200

#: How sacct writes "there is no such value".
ABSENT: Final = frozenset({"", "None", "Unknown", "N/A", "None assigned", "INVALID", "(null)"})

ENDED: Final = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "LAUNCH_FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "RECONFIG_FAIL",
        "REQUEUED",
        "REVOKED",
        "TIMEOUT",
    }
)
RUNNING: Final = frozenset(
    {
        "COMPLETING",
        "CONFIGURING",
        "RESIZING",
        "RUNNING",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
    }
)
WAITING: Final = frozenset(
    {"PENDING", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)

_JOB_ID: Final = re.compile(
    r"(?P<job>\d{1,12}(?:_(?:\d{1,10}|\[[^\]|]{1,200}\]))?(?:\+\d{1,6})?)(?:\.(?P<step>[\w+.]+))?",
    re.ASCII,
)
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", re.ASCII)
_EPOCH: Final = re.compile(r"\d{9,11}", re.ASCII)  # SLURM_TIME_FORMAT=%s
_ELAPSED: Final = re.compile(
    r"(?:(?:(?P<days>\d{1,6})-)?(?P<hours>\d{1,7}):)?(?P<minutes>\d\d):(?P<seconds>\d\d)(?:\.\d{1,6})?",
    re.ASCII,
)
_COUNT: Final = re.compile(r"\d{1,12}", re.ASCII)
_MIG: Final = re.compile(r"(?:^|[_:.-])\d+[gc]\.\d+gb", re.ASCII | re.IGNORECASE)
_TAG: Final = re.compile(r"[\w.:-]{1,64}")

#: Stage of the tag grammar -> the activity it suggests; a person confirms. Stages that are not
#: plainly one activity suggest the one that policies count.
STAGES: Final = {
    "data": "data_preprocess",
    "explore": "ablation",
    "baseline": "ablation",
    "ablate": "ablation",
    "hyperparam": "ablation",
    "final": "pretrain",
}


class UnreadableField(InvalidInput):
    """One value of a row cannot be read."""


class TagProposal(msgspec.Struct, frozen=True, kw_only=True):
    """What a `[project,]stage,run_type` tag suggests; never more than a proposal."""

    project: str | None
    stage: str
    run_type: str
    activity: str


class GpuAllocation(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs of an AllocTRES string, each counted once."""

    gpus: int
    gpu_type: str | None  # None: not named, or several
    nodes: int | None
    flags: tuple[str, ...]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """When a run started and ended, and how long it ran."""

    start_unix_ms: int
    end_unix_ms: int | None  # None: still running
    elapsed_seconds: int
    flags: tuple[str, ...]


def present(text: str) -> str | None:
    """The value, or None for any of sacct's words for nothing."""
    stripped = text.strip()
    return None if stripped in ABSENT else stripped


def read_job_id(text: str) -> tuple[str, str | None]:
    """(job, step): `123_4.batch` is job `123_4`, step `batch`; a job line has step None."""
    match = _JOB_ID.fullmatch(text.strip())
    if match is None:
        raise UnreadableField("JobID", text, "expected a number, with array index and step")
    return match["job"], match["step"]


def read_state(text: str) -> str:
    """The state's first word: `CANCELLED by 1000` and `CANCELLED+` are CANCELLED."""
    words = text.split()
    state = words[0].rstrip("+").upper() if words else ""
    for known in (ENDED, RUNNING, WAITING):
        if state in known:
            return state
    raise UnreadableField("State", text, "expected a Slurm job state")


def read_elapsed(raw: str | None, clock: str | None) -> int | None:
    """Whole seconds from ElapsedRaw, else from Elapsed `[D-]HH:MM:SS`; None if neither is given."""
    if raw is not None:
        if not _COUNT.fullmatch(raw):
            raise UnreadableField("ElapsedRaw", raw, "expected whole seconds, 0 or more")
        seconds = int(raw)
    elif clock is not None:
        match = _ELAPSED.fullmatch(clock)
        if match is None:
            raise UnreadableField("Elapsed", clock, "expected [D-]HH:MM:SS")
        days, hours = int(match["days"] or 0), int(match["hours"] or 0)
        seconds = (days * 24 + hours) * 3600 + int(match["minutes"]) * 60 + int(match["seconds"])
    else:
        return None
    if seconds > SECONDS_MAX:
        raise UnreadableField("Elapsed", raw or clock, f"expected at most {SECONDS_MAX} seconds")
    return seconds


def read_allocation(text: str) -> GpuAllocation:
    """GPUs from AllocTRES. `gres/gpu` and `gres/gpu:TYPE` are the same GPUs and never added."""
    total: int | None = None
    by_type: dict[str, int] = {}
    nodes: int | None = None
    flags: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = item.partition("=")
        if not separator:
            raise UnreadableField("AllocTRES", text, "expected name=value, separated by commas")
        if key == "node":
            nodes = _count("AllocTRES node", value)
        elif key == "gres/gpu":
            total = _count("AllocTRES gres/gpu", value)
        elif key.startswith("gres/gpu:"):
            kind = key.removeprefix("gres/gpu:")
            by_type[kind] = by_type.get(kind, 0) + _count(f"AllocTRES {key}", value)
        elif key.startswith(("gres/shard", "gres/mps")):
            flags.append(f"{key} is a part of a GPU and is not counted")
    typed = sum(by_type.values())
    if total is not None and by_type and total != typed:
        flags.append(f"gres/gpu={total} but the types add to {typed}: the larger is taken")
    flags += [f"{kind} looks like a MIG slice" for kind in by_type if _MIG.search(kind)]
    if len(by_type) > 1:
        flags.append(f"several GPU types: {', '.join(sorted(by_type))}")
    return GpuAllocation(
        gpus=max(total or 0, typed),
        gpu_type=next(iter(by_type)) if len(by_type) == 1 else None,
        nodes=nodes,
        flags=tuple(flags),
    )


def _count(field: str, text: str) -> int:
    if not _COUNT.fullmatch(text) or int(text) > GPUS_MAX:
        raise UnreadableField(field, text, f"expected a whole number up to {GPUS_MAX}")
    return int(text)


def _instants(field: str, text: str, zone: ZoneInfo) -> tuple[tuple[int, ...], str | None]:
    """The Unix seconds a local time can mean, and why it is not exactly one."""
    if _EPOCH.fullmatch(text):
        return (int(text),), None
    try:
        naive = datetime.fromisoformat(text) if _TIME.fullmatch(text) else None
    except ValueError:
        naive = None
    if naive is None or not YEAR_MIN < naive.year < YEAR_MAX:
        raise UnreadableField(field, text, "expected YYYY-MM-DDTHH:MM:SS or Unix seconds")
    early, late = sorted(int(naive.replace(tzinfo=zone, fold=fold).timestamp()) for fold in (0, 1))
    if early == late:
        return (early,), None
    back = datetime.fromtimestamp(early, zone).replace(tzinfo=None)
    happens = "occurs twice" if back == naive else "does not exist"
    return (early, late), f"{field} {text} {happens} in {zone.key}"


def read_span(
    start: str, end: str | None, elapsed: int | None, zone: ZoneInfo, *, running: bool
) -> Span:
    """Start, end and duration. The stated duration wins over the difference of local times."""
    starts, start_doubt = _instants("Start", start, zone)
    ends, end_doubt = _instants("End", end, zone) if end and not running else ((), None)
    flags = [doubt for doubt in (start_doubt, end_doubt) if doubt]
    if running:
        if elapsed is None:
            raise UnreadableField("Elapsed", None, "a running job needs ElapsedRaw or Elapsed")
        return Span(
            start_unix_ms=starts[0] * 1000,
            end_unix_ms=None,
            elapsed_seconds=elapsed,
            flags=tuple(flags),
        )
    if not ends:
        if elapsed is None:
            raise UnreadableField("End", end, "an ended job needs End, ElapsedRaw or Elapsed")
        ends = (starts[0] + elapsed,)
        flags.append("no End: it is taken as Start and the elapsed time")
    pairs = [(first, last) for first in starts for last in ends if first <= last]
    if not pairs:
        raise UnreadableField("End", end, f"expected an end not before the start {start}")
    wanted = elapsed if elapsed is not None else 0
    first, last = min(pairs, key=lambda pair: (abs(pair[1] - pair[0] - wanted), pair))
    if elapsed is None:
        elapsed = last - first
        if elapsed > SECONDS_MAX:
            raise UnreadableField("End", end, f"expected at most {SECONDS_MAX} seconds after Start")
    elif abs(last - first - elapsed) > 1:
        flags.append(f"End - Start is {last - first} s but the elapsed time is {elapsed} s")
    return Span(
        start_unix_ms=first * 1000,
        end_unix_ms=last * 1000,
        elapsed_seconds=elapsed,
        flags=tuple(flags),
    )


def read_tag(comment: str | None) -> TagProposal | None:
    """The proposal in a comment of the form `[project,]stage,run_type`, else None."""
    parts = [part.strip() for part in (comment or "").split(",")]
    if len(parts) not in (2, 3) or not all(_TAG.fullmatch(part) for part in parts):
        return None
    stage = parts[-2].lower()
    if stage not in STAGES:
        return None
    return TagProposal(
        project=parts[0] if len(parts) == 3 else None,
        stage=stage,
        run_type=parts[-1],
        activity=STAGES[stage],
    )
