"""`make bench-accuracy`: metered against known FLOP and energy, one table per machine.

The simulated driver runs everywhere. A real GPU is used when its driver answers and a Python with
PyTorch is at hand (this one, or the one named by --python). Results go into docs/validation.md;
a real run also writes raw traces (--record).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console

from benchmarks.accuracy import simulated, tables
from benchmarks.accuracy.cases import Run

VALIDATION: Final = Path(__file__).parents[2] / "docs" / "validation.md"
REAL_TIMEOUT_SECONDS: Final = 1800


@click.command()
@click.option("--python", default=sys.executable, help="A Python with PyTorch, for the real GPU.")
@click.option("--record", type=click.Path(path_type=Path), help="Folder for raw traces.")
@click.option("--no-write", is_flag=True, help="Print only; leave docs/validation.md as it is.")
def main(python: str, record: Path | None, no_write: bool) -> None:  # noqa: FBT001 (a flag)
    """Measure accuracy on the simulated driver, and on a real GPU when there is one."""
    console = Console(width=200)
    runs = [simulated.run(driver) for driver in simulated.DRIVERS]
    for run in runs:
        console.print(tables.terminal_table(run))
        console.print(tables.summary(run))
    real = _real(python, record)
    if isinstance(real, str):
        console.print(f"real GPU: skipped, {real}")
    else:
        console.print(tables.terminal_table(real))
        console.print(tables.summary(real))
        for finding in real.findings:
            console.print(f"  {finding}")
    if not no_write:
        text = "\n".join(tables.markdown_section(run) for run in runs)
        tables.write_section(VALIDATION, "simulated", text)
        if isinstance(real, Run):
            tables.write_section(VALIDATION, "real", tables.markdown_section(real))
        console.print(f"written to {VALIDATION.name}")


def _real(python: str, record: Path | None) -> Run | str:
    """The real GPU's results, from a process of its own; or why there are none."""
    command = [python, "-m", "benchmarks.accuracy.real"]
    if record is not None:
        command += ["--record", str(record)]
    root = VALIDATION.parents[1]
    path = os.pathsep.join(str(root / room) for room in (".", "core", "agent"))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=REAL_TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Run)


if __name__ == "__main__":
    main()
