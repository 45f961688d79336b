"""Reads `sacct --parsable2` text into job runs with exact GPU-seconds.

A pure parser: text and a time zone in, values out. Every ended run counts once, also the earlier
runs of a requeued job; step lines are parts of a job and not jobs; running work is only previewed.
A line that cannot be read is named with its number and the reason, never half read: GPU-seconds of
the report are exactly the sum over its jobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from flopledger_collector.importers.sacct_fields import (
    ENDED,
    WAITING,
    TagProposal,
    UnreadableField,
    present,
    read_allocation,
    read_elapsed,
    read_job_id,
    read_span,
    read_state,
    read_tag,
)
from flopledger_core.errors import InvalidInput

COLUMNS: Final = (
    "JobID,User,Account,Partition,State,Submit,Start,End,ElapsedRaw,NNodes,NodeList,AllocTRES,"
    "Comment,JobName"
)
COMMAND: Final = (
    "sacct --parsable2 --allusers --duplicates --starttime=2025-01-01 --format=" + COLUMNS
)
SNOWMAN: Final = "\N{SNOWMAN}"  # some tools ask sacct for this delimiter
BYTES_MAX: Final = 1 << 30  # a gibibyte is some ten million lines: a year of a large site
COLUMNS_MAX: Final = 512  # sacct knows about 120
FREE_TEXT: Final = ("jobname", "comment", "admincomment", "systemcomment", "submitline", "workdir")

_NEWLINE: Final = re.compile(r"\r\n|\n|\r")


class SacctRefused(InvalidInput):
    """The text as a whole is not sacct output that can be read."""


class SacctJob(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one job. Absent values are None; times are Unix milliseconds."""

    line: int
    job_id: str
    cluster: str | None = None  # of the Cluster column, where there is one
    user: str | None
    account: str | None
    partition: str | None
    name: str | None
    comment: str | None
    state: str
    start_unix_ms: int
    end_unix_ms: int | None  # None: still running
    elapsed_seconds: int
    gpus: int
    gpu_type: str | None
    nodes: int | None
    proposal: TagProposal | None
    flags: tuple[str, ...]  # what was doubtful, in words

    @property
    def gpu_seconds(self) -> int:
        """GPUs times elapsed seconds, exactly."""
        return self.gpus * self.elapsed_seconds


class SkippedLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that became no job, and why."""

    line: int
    job_id: str | None
    reason: str


class SacctReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a sacct file says."""

    jobs: tuple[SacctJob, ...]  # ended runs, GPU or not, in file order
    running: tuple[SacctJob, ...]  # previewed, never posted
    gpu_seconds: int  # of the ended runs
    gpu_seconds_running: int
    skipped: tuple[SkippedLine, ...]
    step_lines: int
    time_zone: str


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    names: tuple[str, ...]
    trailing: bool  # every line ends in one more delimiter (--parsable)


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one line came to: a step, a job, or nothing."""

    step: bool = False
    job: SacctJob | None = None
    cluster: str = ""
    skipped: SkippedLine | None = None


def read_sacct(text: str | bytes, *, time_zone: str) -> SacctReport:
    """All runs in sacct text; `time_zone` is the site's (`Europe/Oslo`), as its times have none.

    Raises `SacctRefused` when the whole cannot be read: no header, a needed column missing, another
    delimiter, binary data, an unknown zone. Single lines never raise; they are reported as skipped.
    """
    zone = _zone(time_zone)
    lines = _lines(_decoded(text))
    first = next(lines, None)
    if first is None:
        raise SacctRefused("sacct text", "", f"it is empty; print it with `{COMMAND}`")
    header = _header(first[1])
    return _report((_read_line(number, line, header, zone) for number, line in lines), time_zone)


def _decoded(text: str | bytes) -> str:
    if len(text) > BYTES_MAX:
        raise SacctRefused("sacct text", len(text), f"give at most {BYTES_MAX} bytes at a time")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            remedy = f"it is not UTF-8 (byte {error.start}); print it with `{COMMAND}`"
            raise SacctRefused("sacct text", text[:40], remedy) from None
    if "\0" in text:
        raise SacctRefused("sacct text", text[:40], f"it is binary; print it with `{COMMAND}`")
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        remedy = "name an IANA zone such as Europe/Oslo (a bare machine needs the tzdata package)"
        raise SacctRefused("time_zone", name, remedy) from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, without copying the whole text once more."""
    start = 0
    number = 1
    for match in _NEWLINE.finditer(text):
        line = text[start : match.start()]
        if line.strip():
            yield number, line
        start = match.end()
        number += 1
    if text[start:].strip():
        yield number, text[start:]


def _header(line: str) -> _Header:
    names = [name.strip().lower() for name in line.split("|")]
    if SNOWMAN in line:
        remedy = f"the delimiter is U+2603; print with `|` between columns: `{COMMAND}`"
        raise SacctRefused("sacct delimiter", SNOWMAN, remedy)
    if len(names) > COLUMNS_MAX:
        raise SacctRefused("sacct header", len(names), f"give at most {COLUMNS_MAX} columns")
    trailing = len(names) > 1 and names[-1] == ""
    names = names[:-1] if trailing else names
    if names[0][:1].isdigit():
        remedy = f"the header line is missing; leave out --noheader: `{COMMAND}`"
        raise SacctRefused("sacct header", line, remedy)
    wanted = (
        ("jobid", "jobidraw"),
        ("state",),
        ("start",),
        ("end", "elapsedraw", "elapsed"),
        ("alloctres",),
    )
    titles = {name.lower(): name for name in (*COLUMNS.split(","), "JobIDRaw", "Elapsed")}
    for group in wanted:
        if not any(name in names for name in group):
            missing = " or ".join(titles[name] for name in group)
            remedy = f"column {missing} is missing; print it with `{COMMAND}`"
            raise SacctRefused("sacct header", line, remedy)
    for name in names:
        if names.count(name) > 1:
            raise SacctRefused("sacct header", name, "name every column once")
    return _Header(names=tuple(names), trailing=trailing)


def _read_line(number: int, line: str, header: _Header, zone: ZoneInfo) -> _Found:
    """One line. With too many fields, a free-text column holds the delimiter: find which."""
    fields = line.split("|")
    if header.trailing and len(fields) > len(header.names) and fields[-1] == "":
        fields.pop()
    extra = len(fields) - len(header.names)
    if tuple(field.strip().lower() for field in fields) == header.names:
        return _skip(number, None, "the header again")
    if extra < 0:
        reason = f"{len(fields)} fields where the header has {len(header.names)}"
        return _skip(number, fields[0][:40], reason)
    if extra == 0:
        try:
            return _read_row(number, dict(zip(header.names, fields, strict=True)), zone)
        except UnreadableField as error:
            return _skip(number, fields[0][:40], str(error))
    return _absorbed(number, fields, header, zone)


def _absorbed(number: int, fields: list[str], header: _Header, zone: ZoneInfo) -> _Found:
    """A row with extra fields, read with each free-text column that could hold the delimiter.

    One way to read it is taken. Several that differ only in free text are one job with no text.
    """
    extra = len(fields) - len(header.names)
    ways: list[_Found] = []
    for place, name in enumerate(header.names):
        if name not in FREE_TEXT:
            continue
        joined = "|".join(fields[place : place + extra + 1])
        row = [*fields[:place], joined, *fields[place + extra + 1 :]]
        try:
            ways.append(_read_row(number, dict(zip(header.names, row, strict=True)), zone))
        except UnreadableField:
            continue
    bare = {msgspec.json.encode(_without_text(way)) for way in ways}
    if len(ways) == 1:
        return ways[0]
    if len(bare) == 1:
        return _without_text(ways[0])
    how = "in no way" if not ways else "in more than one way"
    reason = f"{extra} fields too many, and a free-text column can absorb them {how}"
    return _skip(number, fields[0][:40], reason)


def _without_text(found: _Found) -> _Found:
    if found.job is None:
        return found
    flags = (*found.job.flags, "the delimiter stands in free text: name and comment left out")
    job = msgspec.structs.replace(found.job, name=None, comment=None, proposal=None, flags=flags)
    return msgspec.structs.replace(found, job=job)


def _skip(line: int, job_id: str | None, reason: str) -> _Found:
    return _Found(skipped=SkippedLine(line=line, job_id=job_id, reason=reason))


def _read_row(number: int, row: Mapping[str, str], zone: ZoneInfo) -> _Found:
    """A row with one field per column. Raises `UnreadableField`."""
    job_id, step = read_job_id(present(row.get("jobid", "")) or row.get("jobidraw", ""))
    state = read_state(row["state"])
    allocation = read_allocation(row["alloctres"])
    elapsed = read_elapsed(present(row.get("elapsedraw", "")), present(row.get("elapsed", "")))
    start, end = present(row["start"]), present(row.get("end", ""))
    if step is not None:
        return _Found(step=True)
    if state == "PENDING" or (state in WAITING and (start is None or end is None)):
        return _skip(number, job_id, f"{state}: not started")
    if start is None:
        return _skip(number, job_id, f"{state}: never started")
    # A resized job's earlier size and a held job's earlier run have an end: they are over.
    over = state in ENDED or (end is not None and (state == "RESIZING" or state in WAITING))
    span = read_span(start, end, elapsed, zone, running=not over)
    nodes = present(row.get("nnodes", ""))
    comment = present(row.get("comment", ""))
    cluster = present(row.get("cluster", ""))
    job = SacctJob(
        line=number,
        job_id=job_id,
        cluster=cluster,
        user=present(row.get("user", "")),
        account=present(row.get("account", "")),
        partition=present(row.get("partition", "")),
        name=present(row.get("jobname", "")),
        comment=comment,
        state=state,
        start_unix_ms=span.start_unix_ms,
        end_unix_ms=span.end_unix_ms,
        elapsed_seconds=span.elapsed_seconds,
        gpus=allocation.gpus,
        gpu_type=allocation.gpu_type,
        nodes=int(nodes) if nodes and re.fullmatch(r"[0-9]{1,9}", nodes) else allocation.nodes,
        proposal=read_tag(comment),
        flags=(*span.flags, *allocation.flags),
    )
    return _Found(job=job, cluster=cluster or "")


def _report(found: Iterator[_Found], time_zone: str) -> SacctReport:
    """All lines together; the same run on two lines counts once, ended before running."""
    jobs: dict[tuple[str, str, int], SacctJob] = {}
    skipped: list[SkippedLine] = []
    steps = 0
    for item in found:
        steps += item.step
        if item.skipped is not None:
            skipped.append(item.skipped)
        if item.job is None:
            continue
        key = (item.cluster, item.job.job_id, item.job.start_unix_ms)
        other = jobs.setdefault(key, item.job)
        if other is not item.job:
            kept, left = _one_of(other, item.job)
            jobs[key] = kept
            reason = f"the same run as line {kept.line}: same job, same start"
            skipped.append(SkippedLine(line=left.line, job_id=left.job_id, reason=reason))
    ended = [job for job in jobs.values() if job.end_unix_ms is not None]
    running = [job for job in jobs.values() if job.end_unix_ms is None]
    return SacctReport(
        jobs=tuple(sorted(ended, key=lambda job: job.line)),
        running=tuple(sorted(running, key=lambda job: job.line)),
        gpu_seconds=sum(job.gpu_seconds for job in ended),
        gpu_seconds_running=sum(job.gpu_seconds for job in running),
        skipped=tuple(sorted(skipped, key=lambda line: line.line)),
        step_lines=steps,
        time_zone=time_zone,
    )


def _one_of(first: SacctJob, second: SacctJob) -> tuple[SacctJob, SacctJob]:
    """(kept, left out): an ended run says more than a running one, a longer one than a shorter."""
    ranks = [
        (job.end_unix_ms is not None, job.elapsed_seconds, job.gpus) for job in (first, second)
    ]
    return (second, first) if ranks[1] > ranks[0] else (first, second)
