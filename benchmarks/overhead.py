"""What the agent costs a training node: CPU per tick without the driver's own time, and memory.

An 8-GPU node on the simulated driver. Calls into the driver's library are timed at its edge and
taken out, because a simulated driver costs something else than a real one. CPU is given as a
share of one core at one tick a second. Memory, and the CPU of what passes between daemon and
worker, are those of two real processes, which the simulated driver is part of.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import pynvml
from rich.console import Console
from rich.table import Table

from tests.agent.sampling import SECOND_NS
from tests.end_to_end.virtual_node import VirtualNode

GPUS: Final = 8
TICKS: Final = 600
SPEED: Final = 60  # of a real daemon's clock, in which it ticks once a second
MEMORY_AFTER_SECONDS: Final = 20  # twenty virtual minutes: caches are warm
CPU_SECONDS: Final = 20
PHASE: Final[dict[str, object]] = {
    "seconds": 86_400,
    "sm_clock_mhz": 1755,
    "power_watts": 610,
    "sm_active": 0.97,
    "pipes": {"hmma": 0.5, "fp32": 0.02},
    "processes": ["train"],
}
SCENARIO: Final[dict[str, object]] = {
    "driver_version": "595.71.05",
    "gpus": [{"model": "NVIDIA H100 80GB HBM3", "phases": [PHASE]} for _ in range(GPUS)],
    "processes": {
        "train": {"pid": 10_000_001, "environ": {"FLOPLEDGER_PROJECT": "atlas"}},
    },
}


class TimedLibrary:
    """Times every call that pynvml makes into the driver's library."""

    def __init__(self, library: Any) -> None:  # noqa: ANN401 (pynvml's library object)
        self._library = library
        self.cpu_ns = 0
        self.calls = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (a ctypes function)
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:  # noqa: ANN401 (whatever NVML takes)
            began = time.thread_time_ns()
            try:
                return function(*arguments)
            finally:
                self.cpu_ns += time.thread_time_ns() - began
                self.calls += 1

        return timed


def measure_cpu() -> tuple[float, float, float]:
    """Microseconds per tick: the agent's own, the driver's, and the number of driver calls."""
    with VirtualNode(SCENARIO) as node:
        node.run(10)
        library = TimedLibrary(pynvml.nvmlLib)
        pynvml.nvmlLib = library
        pynvml._nvmlGetFunctionPointer_cache.clear()  # noqa: SLF001 (pynvml offers no way in)
        began = time.process_time_ns()
        for _ in range(TICKS):
            node.agent.tick()
            node.clock.now_ns += SECOND_NS
        total_ns = time.process_time_ns() - began
    own_ns = total_ns - library.cpu_ns
    return own_ns / TICKS / 1000, library.cpu_ns / TICKS / 1000, library.calls / TICKS


def measure_daemon() -> tuple[float, float]:
    """A running daemon and its GPU worker: memory in MiB, and CPU per tick in microseconds.

    Both with the simulator in them; the CPU also has what passes between the two processes.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        gpus = "\n".join('[[gpus]]\nmodel = "NVIDIA H100 80GB HBM3"' for _ in range(GPUS))
        (root / "scenario.toml").write_text(f'driver_version = "595.71.05"\n{gpus}\n')
        (root / "agent.toml").write_text(
            f'[state]\ndirectory = "{root}/state"\n[tags]\nsocket = "{root}/t.sock"\n'
            '[web]\nlisten_address = "127.0.0.1:0"\n'
            f'[gpus]\ndriver = "simulated"\nscenario = "{root}/scenario.toml"\n'
            f"[clock]\nspeed = {SPEED}\nreal_origin_unix_ns = {time.time_ns()}\n"
            "origin_unix_ns = 1764000000000000000\n"
        )
        command = [sys.executable, "-m", "flopledger_agent", "run", "--config"]
        with subprocess.Popen(
            [*command, str(root / "agent.toml")], stderr=subprocess.DEVNULL
        ) as daemon:
            threading.Event().wait(MEMORY_AFTER_SECONDS)
            pids = (daemon.pid, *children_of(daemon.pid))
            pss_kib = sum(pss_of_kib(pid) for pid in pids)
            began_s = sum(cpu_seconds_of(pid) for pid in pids)
            threading.Event().wait(CPU_SECONDS)
            cpu_s = sum(cpu_seconds_of(pid) for pid in pids) - began_s
            daemon.terminate()
    return pss_kib / 1024, cpu_s * 1_000_000 / (CPU_SECONDS * SPEED)


def children_of(pid: int) -> list[int]:
    """The processes that any thread of a process started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def cpu_seconds_of(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_of_kib(pid: int) -> int:
    """Proportional set size of one process."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def main() -> None:
    """Print the table."""
    own_us, driver_us, calls = measure_cpu()
    table = Table(title=f"agent overhead, {GPUS} GPUs at 1 Hz, simulated driver")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("own CPU per tick", f"{own_us:.0f} us")
    table.add_row("own CPU, share of one core", f"{own_us / 10_000:.3f} %")
    table.add_row("driver calls per tick", f"{calls:.0f}")
    table.add_row("driver CPU per tick (simulated, reported apart)", f"{driver_us:.0f} us")
    memory_mib, daemon_us = measure_daemon()
    table.add_row("CPU per tick of daemon and worker, simulator included", f"{daemon_us:.0f} us")
    table.add_row("proportional memory of daemon and worker", f"{memory_mib:.1f} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
