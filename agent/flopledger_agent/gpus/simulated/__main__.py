"""Runs any pynvml program on a simulated driver, in this process.

    python -m flopledger_agent.gpus.simulated --scenario FILE [--speed X] -- SCRIPT.py [ARGS...]
    python -m flopledger_agent.gpus.simulated --scenario FILE [--speed X] -- -m MODULE [ARGS...]

The program sees the ordinary pynvml with the scenario's GPUs. It runs as `__main__` with its own
arguments; its exit status is passed on.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from pathlib import Path

from flopledger_agent.clocks import ScaledClock, ScaledClockConfig
from flopledger_agent.gpus.simulated.driver import install
from flopledger_agent.gpus.simulated.scenario import load_scenario
from flopledger_agent.gpus.simulated.tables import ScenarioError

EXIT_MISUSE = 2


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, install the driver, run the program; returns an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flopledger_agent.gpus.simulated",
        description="Run a pynvml program on simulated GPUs.",
    )
    parser.add_argument("--scenario", type=Path, required=True, help="scenario file (TOML)")
    parser.add_argument("--speed", type=int, default=1, help="times real time (default 1)")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- SCRIPT.py|-m MODULE [ARGS]")
    options = parser.parse_args(arguments)
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if options.speed < 1:
        parser.error(f"--speed is {options.speed}: give a whole number >= 1")
    if not program or program == ["-m"]:
        parser.error("no program is given: write -- SCRIPT.py or -- -m MODULE after the options")
    try:
        scenario = load_scenario(options.scenario)
    except ScenarioError as error:
        parser.exit(EXIT_MISUSE, f"{error}\n")
    now_ns = time.time_ns()
    clock = ScaledClock(
        ScaledClockConfig(speed=options.speed, real_origin_unix_ns=now_ns, origin_unix_ns=now_ns)
    )
    with install(scenario, clock):
        _run(program)
    return 0


def _run(program: list[str]) -> None:
    if program[0] == "-m":
        # The working directory comes first, as `python -m` has it; runpy sets argv[0] itself.
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
