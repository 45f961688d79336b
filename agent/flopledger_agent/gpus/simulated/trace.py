"""Replay of a recorded or prepared trace: CSV rows become phases. It computes nothing.

    [trace]
    file = "x.csv"          relative to the scenario file
    end_seconds = 120.0     when the last row of every GPU ends; absent: a GPU's last row only marks
                            the end of the row before it, as the last sample of a recording does

Columns (header line required, any order; `seconds` and `gpu` needed, the rest optional):

    seconds           since the scenario's start; per GPU strictly rising; each row starts a phase
                      that holds until the GPU's next row
    gpu               index of the [[gpus]] table
    sm_clock_mhz, power_watts, memory_used_mib
    sm_active, gpu_active, sm_occupancy, dram_active      ratios 0..1
    any_tensor, hmma, imma, dmma, dfma, fp64, fp32, fp16, integer      ratios 0..1
    process           process names separated by ";", each optionally NAME:WEIGHT

An empty cell is an absent key: the defaults are those of a phase.
Before its first row a GPU is idle.
"""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path
from typing import Final

from flopledger_agent.gpus.simulated.tables import ScenarioError, Table, whole_nanoseconds

SURPLUS: Final = "(surplus)"  # where csv puts cells beyond the header
PLAIN_COLUMNS: Final = (
    "sm_clock_mhz",
    "power_watts",
    "memory_used_mib",
    "sm_active",
    "gpu_active",
    "sm_occupancy",
    "dram_active",
)


def read_trace(
    table: Table, directory: Path, pipes: tuple[str, ...], gpu_count: int
) -> dict[int, list[dict[str, object]]]:
    """The phases of every GPU of the trace, shaped like [[gpus.phases]]. Errors: ScenarioError."""
    path = directory / table.text("file")
    end_seconds = table.number("end_seconds") if "end_seconds" in table else None
    table.finish()
    known = {"seconds", "gpu", "process", *PLAIN_COLUMNS, *pipes}
    samples: dict[int, list[tuple[Fraction, dict[str, object]]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True, restkey=SURPLUS, restval="")
            for column in rows.fieldnames or ("",):
                if column not in known:
                    raise ScenarioError("trace column", column, f"use {', '.join(sorted(known))}")
            for row in rows:
                where = f"trace.line[{rows.line_num}]"
                gpu, seconds, phase = _read_row(where, row, pipes, gpu_count)
                earlier = samples.setdefault(gpu, [])
                if earlier and seconds <= earlier[-1][0]:
                    field = f"{where}.seconds"
                    raise ScenarioError(field, str(seconds), "order each GPU's rows by time")
                earlier.append((seconds, phase))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError("trace.file", str(path), f"give a readable CSV ({error})") from None
    return {gpu: _phases(gpu, rows_of_gpu, end_seconds) for gpu, rows_of_gpu in samples.items()}


def _read_row(
    where: str, row: dict[str, str], pipes: tuple[str, ...], gpu_count: int
) -> tuple[int, Fraction, dict[str, object]]:
    if SURPLUS in row:
        raise ScenarioError(where, row[SURPLUS], "give no more cells than the header has")
    cells = {column: text for column, text in row.items() if text}
    gpu = _number(f"{where}.gpu", cells.get("gpu", ""))
    if gpu.denominator != 1 or not 0 <= gpu < gpu_count:
        raise ScenarioError(f"{where}.gpu", str(gpu), f"give a GPU index below {gpu_count}")
    seconds = _number(f"{where}.seconds", cells.get("seconds", ""))
    whole_nanoseconds(f"{where}.seconds", seconds)
    phase: dict[str, object] = {
        column: _number(f"{where}.{column}", cells[column])
        for column in PLAIN_COLUMNS
        if column in cells
    }
    phase["pipes"] = {
        pipe: _number(f"{where}.{pipe}", cells[pipe]) for pipe in pipes if pipe in cells
    }
    owners = [part.partition(":") for part in cells.get("process", "").split(";") if part]
    phase["processes"] = [name.strip() for name, _, _ in owners]
    phase["shares"] = {
        name.strip(): _number(f"{where}.process", weight) for name, _, weight in owners if weight
    }
    return gpu.numerator, seconds, phase


def _number(field: str, text: str) -> Fraction:
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError) as error:
        raise ScenarioError(field, text, "give a decimal number") from error


def _phases(
    gpu: int,
    samples: list[tuple[Fraction, dict[str, object]]],
    end_seconds: Fraction | None,
) -> list[dict[str, object]]:
    starts = [seconds for seconds, _ in samples]
    if end_seconds is not None:
        if end_seconds <= starts[-1]:
            field = f"trace.end_seconds (gpu {gpu})"
            raise ScenarioError(field, str(end_seconds), "end the trace after its last row")
        starts.append(end_seconds)
    phases: list[dict[str, object]] = []
    if starts[0] > 0:
        phases.append({"seconds": starts[0]})
    for (start, phase), end in zip(samples, starts[1:], strict=False):
        phases.append({"seconds": end - start, **phase})
    return phases
