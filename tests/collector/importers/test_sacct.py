"""sacct text becomes exact GPU-seconds, or a sentence that says why not."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_collector.importers.hours import HoursTerms, hours_of
from flopledger_collector.importers.sacct import (
    COLUMNS,
    SacctJob,
    SacctRefused,
    SacctReport,
    read_sacct,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "sacct"
HEADER = "JobID|User|State|Start|End|ElapsedRaw|AllocTRES|Comment|JobName"
TRES = "billing=8,cpu=8,gres/gpu:a100=2,gres/gpu=2,mem=1G,node=1"


def row(**changes: str) -> str:
    """One line under HEADER: a completed job of 60 s on two A100, with changes."""
    fields = {
        "JobID": "100",
        "User": "ann",
        "State": "COMPLETED",
        "Start": "2025-01-10T12:00:00",
        "End": "2025-01-10T12:01:00",
        "ElapsedRaw": "60",
        "AllocTRES": TRES,
        "Comment": "",
        "JobName": "train",
    }
    return "|".join({**fields, **changes}.values())


def read(*rows: str, header: str = HEADER, zone: str = "Europe/Oslo") -> SacctReport:
    """The report of a header and rows."""
    return read_sacct("\n".join([header, *rows]) + "\n", time_zone=zone)


def only(report: SacctReport) -> SacctJob:
    """The one ended job of a report that skipped nothing."""
    assert report.skipped == ()
    (job,) = report.jobs
    return job


def plain_total(file: str, columns: tuple[int, int, int, int]) -> tuple[int, int]:
    """GPU-seconds (ended, running) of a golden file, by another way than the importer's.

    Durations come from Start and End for ended work where both are given, GPUs from the text after
    the untyped `gres/gpu=`.
    """
    state_at, start_at, end_at, tres_at = columns
    ended = running = 0
    for line in (GOLDEN / file).read_text(encoding="utf-8").splitlines()[1:]:
        cells = line.split("|")
        if "." in cells[0] or "gres/gpu=" not in cells[tres_at]:
            continue
        gpus = int(cells[tres_at].split("gres/gpu=")[1].split(",")[0])
        if cells[state_at] == "RUNNING":
            elapsed = cells[12] if file.startswith("fox") else cells[13]
            if ":" in elapsed:
                days, _, clock = elapsed.rpartition("-")
                hours, minutes, seconds = map(int, clock.split(":"))
                elapsed = str(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
            running += gpus * int(elapsed)
        else:
            span = datetime.fromisoformat(cells[end_at]) - datetime.fromisoformat(cells[start_at])
            ended += gpus * int(span.total_seconds())
    return ended, running


@pytest.mark.parametrize(
    ("file", "zone", "columns", "lines", "skipped"),
    [
        ("fox_even_jobs.psv", "Europe/Oslo", (4, 5, 6, 29), (27, 18, 93), 16),
        ("habrok_even_jobs_pipe.psv", "Europe/Amsterdam", (8, 10, 11, 22), (43, 1, 69), 6),
    ],
)
def test_real_files_give_the_totals_of_an_independent_count(
    file: str,
    zone: str,
    columns: tuple[int, int, int, int],
    lines: tuple[int, int, int],
    skipped: int,
) -> None:
    """Every line is a run, a step or a named skip, and the GPU-seconds agree with a plain sum."""
    report = read_sacct((GOLDEN / file).read_bytes(), time_zone=zone)

    assert lines == (len(report.jobs), len(report.running), report.step_lines)
    assert skipped == len(report.skipped)
    assert plain_total(file, columns) == (report.gpu_seconds, report.gpu_seconds_running)
    rows = len((GOLDEN / file).read_text(encoding="utf-8").splitlines()) - 1
    assert rows == sum(lines) + skipped
    assert all(not job.flags for job in report.jobs)


def test_real_snowman_text_is_refused_with_the_command_that_prints_pipes() -> None:
    """The delimiter is named and the remedy is a command."""
    text = (GOLDEN / "habrok_first_lines_snowman.txt").read_text(encoding="utf-8")

    with pytest.raises(SacctRefused, match=r"U\+2603.*sacct --parsable2 --allusers --duplicates"):
        read_sacct(text, time_zone="Europe/Amsterdam")


def test_a_job_carries_what_its_line_says() -> None:
    """Every field of a plain line, with local time turned into Unix milliseconds."""
    job = only(read(row(Comment="hello")))

    assert job == SacctJob(
        line=2,
        job_id="100",
        user="ann",
        account=None,
        partition=None,
        name="train",
        comment="hello",
        state="COMPLETED",
        start_unix_ms=1_736_506_800_000,  # 11:00 UTC
        end_unix_ms=1_736_506_860_000,
        elapsed_seconds=60,
        gpus=2,
        gpu_type="a100",
        nodes=1,
        proposal=None,
        flags=(),
    )
    assert job.gpu_seconds == 120


@pytest.mark.parametrize("column", ["JobID", "State", "Start", "AllocTRES"])
def test_a_missing_column_is_refused_with_the_exact_command(column: str) -> None:
    """The sentence names the column and holds the whole sacct command."""
    header = "|".join(name for name in HEADER.split("|") if name != column)

    with pytest.raises(SacctRefused) as refused:
        read(header=header)

    assert f"column {column}" in str(refused.value)
    assert f"--format={COLUMNS}`" in str(refused.value)


def test_without_any_duration_column_the_text_is_refused() -> None:
    """End, ElapsedRaw or Elapsed: one of them must be there."""
    with pytest.raises(SacctRefused, match="column End or ElapsedRaw or Elapsed is missing"):
        read(header="JobID|State|Start|AllocTRES")


def test_columns_may_stand_in_any_order() -> None:
    """The header decides, also about JobIDRaw standing in for JobID."""
    report = read(
        f"{TRES}|1-00:00:01|2025-01-10T12:00:00|FAILED|7",
        header="AllocTRES|Elapsed|Start|State|JobIDRaw",
    )

    job = only(report)
    assert (job.job_id, job.elapsed_seconds, report.gpu_seconds) == ("7", 86_401, 172_802)
    assert job.end_unix_ms == job.start_unix_ms + 86_401_000


@pytest.mark.parametrize(
    ("tres", "gpus", "kind", "flag"),
    [
        ("", 0, None, None),
        ("cpu=4,mem=1G,node=2", 0, None, None),
        ("gres/gpu=4", 4, None, None),
        ("gres/gpu:h100=4", 4, "h100", None),
        ("gres/gpu=4,gres/gpu:h100=4", 4, "h100", None),
        ("gres/gpu=3,gres/gpu:a100=2,gres/gpu:v100=1", 3, None, "several GPU types"),
        ("gres/gpu=1,gres/gpu:a100=2", 2, "a100", "the larger is taken"),
        ("gres/gpumem=20G,gres/gpuutil=90,gres/gpu=1", 1, None, None),
        ("gres/shard=4", 0, None, "not counted"),
        ("gres/gpu:a100_1g.5gb=1,gres/gpu=1", 1, "a100_1g.5gb", "MIG"),
    ],
)
def test_typed_and_untyped_gpus_are_the_same_gpus(
    tres: str, gpus: int, kind: str | None, flag: str | None
) -> None:
    """`gres/gpu` and `gres/gpu:TYPE` are never added, and what is doubtful is flagged."""
    job = only(read(row(AllocTRES=tres)))

    assert (gpus, kind) == (job.gpus, job.gpu_type)
    assert (flag is None) == (not job.flags)
    assert flag is None or flag in " ".join(job.flags)


def test_jobs_of_two_clusters_with_one_id_stay_apart() -> None:
    """The Cluster column names the cluster; the option speaks where the column is silent."""
    header = f"Cluster|{HEADER}"
    report = read(*(f"{name}|{row()}" for name in ("alpha", "beta", "")), header=header)
    terms = HoursTerms(
        cluster="west", accelerator=None, precision=None, utilization_per_mille=None,
        utilization_source=None, project_from="account", source="sacct", at_unix_ms=0, author="a",
    )  # fmt: skip

    records = hours_of(report, terms)
    assert [record.cluster for record in records] == ["alpha", "beta", "west"]
    assert len({record.import_key for record in records}) == 3
    assert records[0].import_key.startswith("alpha/100/")


def test_steps_are_not_jobs() -> None:
    """Only the job line counts, whatever its steps are called."""
    steps = ["100.batch", "100.extern", "100.0", "100_3.12", "100+1.interactive"]

    report = read(row(), *(row(JobID=step) for step in steps))

    assert (len(report.jobs), report.step_lines, report.gpu_seconds) == (1, 5, 120)


def test_every_run_of_a_requeued_job_counts() -> None:
    """`--duplicates` prints earlier runs under the same id; each used GPUs."""
    report = read(
        row(
            State="NODE_FAIL",
            Start="2025-01-10T11:00:00",
            End="2025-01-10T11:00:30",
            ElapsedRaw="30",
        ),
        row(
            State="REQUEUED",
            Start="2025-01-10T11:30:00",
            End="2025-01-10T11:30:10",
            ElapsedRaw="10",
        ),
        row(),
    )

    assert [job.gpu_seconds for job in report.jobs] == [60, 20, 120]
    assert (report.gpu_seconds, report.skipped) == (200, ())


def test_the_same_run_printed_twice_counts_once() -> None:
    """Two exports put together: the later, ended line wins over the running one."""
    early = row(State="RUNNING", End="Unknown", ElapsedRaw="10")

    report = read(early, HEADER, row(), row())

    assert (report.gpu_seconds, report.gpu_seconds_running) == (120, 0)
    assert [line.line for line in report.skipped] == [2, 3, 5]
    assert "same run as line 4" in report.skipped[0].reason


def test_running_work_is_only_previewed() -> None:
    """Running, suspended and completing jobs have no end and are kept apart."""
    states = ["RUNNING", "SUSPENDED", "COMPLETING"]
    report = read(*(row(JobID=str(i), State=s, End="Unknown") for i, s in enumerate(states, 1)))

    assert (report.jobs, report.gpu_seconds, report.gpu_seconds_running) == ((), 0, 360)
    assert [job.end_unix_ms for job in report.running] == [None] * 3


def test_array_and_heterogeneous_jobs_keep_their_ids() -> None:
    """Each task and each component is a job of its own."""
    ids = ["5_1", "5_2", "6+0", "6+1"]

    assert ids == [job.job_id for job in read(*(row(JobID=name) for name in ids)).jobs]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"State": "PENDING", "Start": "Unknown", "End": "Unknown"}, "PENDING: not started"),
        ({"JobID": "5_[1-9%2]", "State": "PENDING"}, "PENDING: not started"),
        ({"State": "CANCELLED by 1000", "Start": "None"}, "CANCELLED: never started"),
        ({"State": "EXPLODED"}, "State is 'EXPLODED'"),
        ({"State": ""}, "State is ''"),
        ({"JobID": "abc"}, "JobID is 'abc'"),
        ({"Start": "2025-13-40T00:00:00"}, "Start is"),
        ({"Start": "0001-01-01T00:00:00"}, "Start is"),
        ({"ElapsedRaw": "-5"}, "ElapsedRaw is '-5'"),
        ({"ElapsedRaw": "9" * 40}, "ElapsedRaw is"),
        ({"ElapsedRaw": "99999999999"}, "expected at most"),
        ({"End": "2025-01-10T11:00:00"}, "expected an end not before the start"),
        ({"AllocTRES": "gres/gpu=many"}, "AllocTRES gres/gpu is 'many'"),
        ({"AllocTRES": "gres/gpu=" + "9" * 5000}, "AllocTRES gres/gpu is"),
        ({"AllocTRES": "gres/gpu=-1"}, "AllocTRES gres/gpu is '-1'"),
        ({"AllocTRES": "gres/gpu"}, "expected name=value"),
    ],
)
def test_a_line_that_is_no_run_is_skipped_with_its_reason(
    changes: dict[str, str], reason: str
) -> None:
    """Nothing is half read: the line number and the reason are reported."""
    report = read(row(**changes))

    assert (report.jobs, report.gpu_seconds) == ((), 0)
    (skipped,) = report.skipped
    assert skipped.line == 2
    assert reason in skipped.reason


def test_cancelled_by_somebody_is_cancelled() -> None:
    """The uid behind `CANCELLED by` is no part of the state."""
    assert only(read(row(State="CANCELLED by 1000"))).state == "CANCELLED"


def test_a_pipe_in_the_last_column_is_part_of_the_name() -> None:
    """JobName last and Comment absent: only the name can hold the extra delimiter."""
    header = "JobID|State|Start|ElapsedRaw|AllocTRES|JobName"

    job = only(read(f"1|COMPLETED|2025-01-10T12:00:00|60|{TRES}|a|b||c", header=header))

    assert (job.name, job.gpu_seconds) == ("a|b||c", 120)


def test_a_pipe_in_the_middle_is_found_by_the_fields_behind_it() -> None:
    """A comment before the state can only be read one way."""
    header = "JobID|Comment|State|Start|ElapsedRaw|AllocTRES|JobName"

    job = only(read(f"1|x|y|COMPLETED|2025-01-10T12:00:00|60|{TRES}|name", header=header))

    assert (job.comment, job.name) == ("x|y", "name")


def test_a_pipe_that_two_text_columns_could_hold_costs_only_the_text() -> None:
    """The GPU-seconds are certain, the name is not: it is left out and flagged."""
    job = only(read(row(Comment="x|y")))

    assert (job.gpu_seconds, job.name, job.comment) == (120, None, None)
    assert "free text" in job.flags[0]


@pytest.mark.parametrize("line", ["1|COMPLETED", row(Start="x|y")])
def test_a_row_that_does_not_fit_the_header_is_skipped(line: str) -> None:
    """Too few fields, or too many in no text column's place."""
    report = read(line)

    assert (report.gpu_seconds, len(report.skipped)) == (0, 1)
    assert "fields" in report.skipped[0].reason


def test_line_ends_byte_order_mark_and_trailing_delimiters_do_not_matter() -> None:
    """The same jobs from --parsable text saved on another system."""
    text = "\ufeff" + "\r\n".join([HEADER + "|", row() + "|", "", row(JobID="2") + "|"])

    report = read_sacct(text.encode(), time_zone="UTC")

    assert (len(report.jobs), report.gpu_seconds, report.skipped) == (2, 240, ())


def test_the_stated_duration_resolves_a_repeated_hour() -> None:
    """02:30 happens twice when summer time ends; the elapsed time says which one is meant."""
    doubtful = {"Start": "2025-10-26T02:30:00", "End": "2025-10-26T03:30:00"}

    short = only(read(row(**doubtful, ElapsedRaw="3600")))
    long = only(read(row(**doubtful, ElapsedRaw="7200")))

    assert short.start_unix_ms - long.start_unix_ms == 3_600_000
    assert short.end_unix_ms == long.end_unix_ms
    assert "occurs twice in Europe/Oslo" in short.flags[0]


def test_a_local_time_that_does_not_exist_is_flagged() -> None:
    """02:30 is jumped over when summer time begins; the stated duration still counts."""
    job = only(read(row(Start="2025-03-30T02:30:00", End="2025-03-30T04:00:00", ElapsedRaw="1800")))

    assert job.elapsed_seconds == 1800
    assert "does not exist in Europe/Oslo" in job.flags[0]


def test_a_run_across_the_change_of_summer_time_is_measured_in_true_seconds() -> None:
    """Without a stated duration, local clocks are turned into instants first."""
    times = {"Start": "2025-03-30T01:00:00", "End": "2025-03-30T04:00:00", "ElapsedRaw": ""}

    assert only(read(row(**times))).elapsed_seconds == 7200
    assert only(read(row(**times), zone="UTC")).elapsed_seconds == 10_800


def test_suspended_time_shows_as_a_flag_and_the_stated_duration_wins() -> None:
    """Elapsed leaves suspended time out; End - Start does not."""
    job = only(read(row(ElapsedRaw="40")))

    assert job.elapsed_seconds == 40
    assert job.flags == ("End - Start is 60 s but the elapsed time is 40 s",)


@pytest.mark.parametrize(
    ("comment", "project", "activity"),
    [
        ("atlas,final,train", "atlas", "pretrain"),
        ("ablate,sweep", None, "ablation"),
        ("data,cpu", None, "data_preprocess"),
    ],
)
def test_a_comment_tag_becomes_a_proposal(comment: str, project: str | None, activity: str) -> None:
    """`[project,]stage,run_type` suggests; it decides nothing."""
    proposal = only(read(row(Comment=comment))).proposal

    assert proposal is not None
    assert (project, activity) == (proposal.project, proposal.activity)


@pytest.mark.parametrize("comment", ["", "hello", "a,b,c,d", "unknown,train", "x y,final,train"])
def test_other_comments_propose_nothing(comment: str) -> None:
    """Only the grammar and its closed list of stages count."""
    assert only(read(row(Comment=comment))).proposal is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is empty"),
        (" \r\n\n", "it is empty"),
        (b"\x7fELF\x00\x01", "it is binary"),
        (b"\xff\xfe\x00J", "it is not UTF-8"),
        (row() + "\n", "the header line is missing"),
        ("JobID,State,Start\n1,2,3\n", "column JobID or JobIDRaw is missing"),
        (HEADER + "|State\n", "name every column once"),
        ("|".join("x" * 600), "at most 512 columns"),
    ],
)
def test_text_that_is_no_sacct_output_is_refused_with_a_remedy(
    text: str | bytes, sentence: str
) -> None:
    """One sentence that says what it is and what to do."""
    with pytest.raises(SacctRefused, match=sentence):
        read_sacct(text, time_zone="UTC")


def test_a_header_alone_is_an_empty_report() -> None:
    """No jobs is an answer, not an error."""
    report = read()

    assert (report.jobs, report.running, report.gpu_seconds, report.skipped) == ((), (), 0, ())


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../etc/passwd", "Europe", "\0"])
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    """The zone is never guessed."""
    with pytest.raises(SacctRefused, match="name an IANA zone"):
        read(zone=zone)


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\0\u2603")), max_size=5))
def test_no_line_stops_the_others(lines: list[str]) -> None:
    """Whatever stands between two good lines, both are read."""
    noise = [line.replace("\n", " ").replace("\r", " ") for line in lines]

    report = read(row(JobID="1"), *noise, row(JobID="2"))

    assert {"1", "2"} <= {job.job_id for job in report.jobs}
    assert report.gpu_seconds == sum(job.gpus * job.elapsed_seconds for job in report.jobs)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10**9)), max_size=20),
)
def test_gpu_seconds_are_exact_integers(runs: list[tuple[int, int]]) -> None:
    """The total is the sum of GPUs times seconds, whatever their size."""
    rows = [
        row(JobID=str(i), AllocTRES=f"gres/gpu={gpus}", ElapsedRaw=str(seconds), End="Unknown")
        for i, (gpus, seconds) in enumerate(runs, start=1)
    ]

    assert sum(gpus * seconds for gpus, seconds in runs) == read(*rows).gpu_seconds
