"""A clock set by hand and scenario texts that the simulated driver's tests share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pynvml

from flopledger_agent.gpus.simulated.driver import SimulatedDriver, install
from flopledger_agent.gpus.simulated.scenario import parse_scenario

# pynvml makes its error classes at run time and shares no types; tests use it as it is.
nvml: Any = pynvml

SECOND = 1_000_000_000
BOOT_NS = 77 * SECOND
UNIX_NS = 1_764_000_000 * SECOND


class ManualClock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.elapsed_ns = 0

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.elapsed_ns += round(seconds * SECOND)

    def boottime_ns(self) -> int:
        """Boot time."""
        return BOOT_NS + self.elapsed_ns

    def wall_unix_ns(self) -> int:
        """Wall time."""
        return UNIX_NS + self.elapsed_ns


H100 = """
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 10.0
sm_clock_mhz = 1755
power_watts = 612.5
sm_active = 0.98
dram_active = 0.4
pipes = { hmma = 0.55, imma = 0.05, dmma = 0.01, dfma = 0.02, fp32 = 0.03, integer = 0.1 }
memory_used_mib = 60000
processes = ["train-a"]
[[gpus.phases]]
seconds = 5.5
sm_clock_mhz = 1980
power_watts = 300
sm_active = 0.5
pipes = { any_tensor = 0.25, hmma = 0.25 }
memory_used_mib = 40000
processes = ["train-a", "eval-b"]
shares = { train-a = 3 }
[processes.train-a]
pid = 4242
create_time_unix = 1763999990.5
user = "alice"
command = "python train.py"
[processes.train-a.environ]
FLOPLEDGER_PROJECT = "atlas"
[processes.eval-b]
"""


@contextmanager
def simulated(text: str = H100) -> Generator[tuple[SimulatedDriver, ManualClock]]:
    """A driver on a manual clock with pynvml initialised."""
    clock = ManualClock()
    with install(parse_scenario(text), clock) as driver:
        nvml.nvmlInit()
        yield driver, clock


def read_metrics(first: object, second: object, *ids: int) -> list[tuple[int, float]]:
    """(nvmlReturn, value) of GPM metrics between two samples."""
    request = nvml.c_nvmlGpmMetricsGet_t()
    request.version = nvml.NVML_GPM_METRICS_GET_VERSION
    request.sample1, request.sample2 = first, second
    request.numMetrics = len(ids)
    for position, metric_id in enumerate(ids):
        request.metrics[position].metricId = metric_id
    nvml.nvmlGpmMetricsGet(request)
    return [
        (request.metrics[position].nvmlReturn, request.metrics[position].value)
        for position in range(len(ids))
    ]


def sample(handle: object) -> object:
    """A filled GPM sample of a device."""
    return nvml.nvmlGpmSampleGet(handle, nvml.nvmlGpmSampleAlloc())
