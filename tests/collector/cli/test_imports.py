"""`flopledger import sacct`: scheduler records as GPU time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.collector.cli.commands import run, shell

HEADER = "JobID|Account|State|Start|End|ElapsedRaw|AllocTRES|Comment\n"
SPAN = "2025-11-24T00:00:00|2025-11-24T01:00:00|3600"
JOBS = f"""{HEADER}1|atlas|COMPLETED|{SPAN}|gres/gpu=8|
1.batch|atlas|COMPLETED|{SPAN}|gres/gpu=8|
2|-bad id-|FAILED|2025-11-24T00:00:00|2025-11-24T00:30:00|1800|gres/gpu=2|
3|atlas|RUNNING|2025-11-24T00:00:00|Unknown|60|gres/gpu=1|
4|atlas|PENDING|Unknown|Unknown|0||
5|atlas|COMPLETED|{SPAN}|cpu=4|
6|idle|COMPLETED|2025-11-24T02:00:00|2025-11-24T03:00:00|3600|gres/gpu=1|
"""
TERMS = (
    "--accelerator", "H100 SXM", "--precision", "bf16", "--utilization", "0.4",
    "--utilization-source", "fleet median",
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What sacct printed."""
    path = tmp_path / "jobs.psv"
    path.write_text(JOBS)
    return path


def test_a_dry_run_posts_nothing_and_needs_no_ledger(file: Path) -> None:
    """The stable document: ended jobs, GPU-seconds, running ones apart, what was skipped."""
    result = run("import", "sacct", str(file), "--dry-run", "--format", "json")
    document = json.loads(result.stdout)
    assert document["jobs"] == 4
    assert document["gpu_jobs"] == 3
    assert document["gpu_seconds"] == 8 * 3600 + 2 * 1800 + 3600
    assert document["gpu_seconds_running"] == 60
    assert [one["line"] for one in document["skipped"]] == [6]
    assert document["projects"] == {
        "atlas": {"gpu_seconds": 28_800}, "unattributed": {"gpu_seconds": 7_200},
    }  # fmt: skip
    assert "posted" not in document


def test_an_import_is_posted_once(tmp_path: Path, file: Path) -> None:
    """Importing the same file again posts nothing; every GPU-second is counted once."""
    ledger = shell(tmp_path)
    ledger.run("migrate")
    first = ledger.json("import", "sacct", str(file), *TERMS)
    assert (first["posted"], first["duplicates"]) == (3, 0)
    again = ledger.json("import", "sacct", str(file), *TERMS)
    assert (again["posted"], again["duplicates"]) == (0, 3)
    status = ledger.json("status")
    (atlas,) = status["projects"]
    assert atlas["own"]["gpu_time_ms"]["central"] == "28800000"
    assert int(atlas["own"]["flop"]["central"]) > 10**18
    assert status["unattributed"]["gpu_time_ms"]["central"] == "7200000"


def test_without_an_accelerator_flop_is_open_and_time_is_not(tmp_path: Path, file: Path) -> None:
    """Unknown hardware has no FLOP of zero."""
    ledger = shell(tmp_path)
    ledger.run("migrate")
    ledger.run("import", "sacct", str(file))
    (atlas,) = ledger.json("status")["projects"]
    assert atlas["flop"]["high"] is None
    assert atlas["own"]["gpu_time_ms"]["central"] == "28800000"


def test_a_comment_can_name_project_and_activity(tmp_path: Path) -> None:
    """A tag in the comment says whose work it was and of which kind."""
    file = tmp_path / "jobs.psv"
    row = "1|acct|COMPLETED|2025-11-24T00:00:00|2025-11-24T01:00:00|3600|gres/gpu=8|"
    file.write_text(f"{HEADER}{row}atlas,final,main\n{row.replace('1|acct', '2|acct')}hello\n")
    ledger = shell(tmp_path)
    ledger.run("migrate")
    ledger.run("import", "sacct", str(file), "--project-from", "comment")
    assert [one["activity"] for one in ledger.json("job", "list", "atlas")["jobs"]] == ["pretrain"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--accelerator", "X"), "accelerator is 'X'"),
        (("--utilization", "0.4"), "--utilization-source"),
        (("--utilization", "1.4", "--utilization-source", "x"), "share from 0 to 1"),
        (("--utilization", "0.12345", "--utilization-source", "x"), "share from 0 to 1"),
        (("--time-zone", "Mars/Base"), "IANA zone"),
    ],
)
def test_what_cannot_be_meant_is_refused(file: Path, words: tuple[str, ...], names: str) -> None:
    """A claim needs its source, and names must exist."""
    assert names in run("import", "sacct", str(file), "--dry-run", *words, status=2).stderr
