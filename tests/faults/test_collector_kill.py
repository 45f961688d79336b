"""SIGKILL at any moment: every acknowledged batch is there once, and totals equal the batches."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from flopledger_core.batch import decode
from flopledger_core.flop import basis
from flopledger_core.records import UsageRecord
from tests.collector.opened import opened
from tests.faults.collector_process import MINUTES, POSTS, STREAMS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS: Final = 120
Promise = tuple[str, int, str]


def _start(mode: str, directory: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.collector_process", mode, str(directory)]
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    return subprocess.Popen(
        [*command, str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _promises(lines: Iterator[str] | list[str]) -> list[Promise]:
    """What whole lines promise; the last may be torn by the kill."""
    found: list[Promise] = []
    for line in lines:
        words = line.split()
        if line.endswith("\n") and words[0] in {"admitted", "duplicate", "posted"}:
            found.append((words[1], int(words[2]), words[3]))
        else:
            assert not line.endswith("\n"), line
    return found


def _killed_after(directory: Path, seed: int, lines: int) -> list[Promise]:
    """Run until so many acknowledgements were read, kill, and return what was promised."""
    process = _start("ingest", directory, seed)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        read = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        read += process.stdout.readlines()
        process.stderr.read()
    return _promises([line for line in read if line])


def _finished(process: subprocess.Popen[str]) -> list[Promise]:
    out, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, errors
    return _promises(out.splitlines(keepends=True))


def _check_journal(directory: Path, promised: set[Promise]) -> int:
    """Every promise kept once, nothing torn, totals equal to what is journaled; the batch count."""
    with opened(directory) as handle:
        handle.folder.fold()
        totals = handle.ledger.totals("atlas")
        assert handle.rebuild() == totals.position.entries
        assert handle.ledger.totals("atlas").lines == totals.lines
    database = sqlite3.connect(directory / "ledger.sqlite3", timeout=10)
    entries = database.execute(
        "SELECT stream_id, sequence, batch_hash, content FROM journal"
    ).fetchall()
    database.close()
    assert len({entry[:2] for entry in entries}) == len(entries)
    present = {entry[:3] for entry in entries}
    assert promised <= present
    records = [
        record
        for entry in entries
        for record in decode(entry[3]).records
        if isinstance(record, UsageRecord)
    ]
    metered = [line for line in totals.lines if line.tier == "gpm_cycles"]
    assert sum(line.records for line in metered) == len(records)
    for quantity in ("elapsed", "float_tensor", "energy_mj", "gpu_time_ms"):
        expected = sum(basis(record).get(quantity, 0) for record in records)
        assert sum(line.sums.get(quantity, 0) for line in metered) == expected
    return len(entries)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_collector_keeps_every_promise_once(seed: int, tmp_path: Path) -> None:
    """Killed three times at random acknowledgements, then left alone to finish."""
    chance = random.Random(seed)
    promised: set[Promise] = set()
    for round_ in range(3):
        lines = chance.randint(1, STREAMS * MINUTES - 20)
        promised |= set(_killed_after(tmp_path, seed * 10 + round_, lines))
        _check_journal(tmp_path, promised)

    promised |= set(_finished(_start("ingest", tmp_path, seed)))
    assert len(promised) == STREAMS * MINUTES
    assert _check_journal(tmp_path, promised) == STREAMS * MINUTES


def test_a_command_posting_beside_the_server_loses_nothing(tmp_path: Path) -> None:
    """Two processes write, both fold, neither fails or waits for ever."""
    opened(tmp_path).close()  # founded once, so that the kill of neither can tear it
    server = _start("ingest", tmp_path, 1)
    commands = [_start("post", tmp_path, seed) for seed in (1, 2)]
    promised = [promise for process in (*commands, server) for promise in _finished(process)]

    assert len(promised) == len(set(promised)) == STREAMS * MINUTES + 2 * POSTS
    assert _check_journal(tmp_path, set(promised)) == len(promised)
    with opened(tmp_path) as handle:
        (line,) = [line for line in handle.ledger.totals().lines if line.tier == "gpu_hours"]
        assert line.records == 2 * POSTS


def test_two_processes_that_found_a_ledger_at_once_found_the_same(tmp_path: Path) -> None:
    """The key, the tables and the ledger's id are made once."""
    processes = [_start("post", tmp_path, seed) for seed in (1, 2, 3)]
    promised = {promise for process in processes for promise in _finished(process)}

    assert len(promised) == 3 * POSTS
    assert len({stream for stream, _, _ in promised}) == 1
    _check_journal(tmp_path, promised)
