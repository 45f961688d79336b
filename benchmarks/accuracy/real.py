"""The accuracy cases on a real GPU: PyTorch does the work, the agent's own reader meters it.

Run by `make bench-accuracy` in a process of its own. Every case runs for a few seconds in pieces
of about a second with a sample between them, so the meter sees what an agent at 1 Hz sees. The
truth is 2MNK per product, or PyTorch's FLOP counter for a training step. Settings of the GPU are
never changed. The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import datetime as dt
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from benchmarks.accuracy.cases import Outcome, Run
from benchmarks.accuracy.metered import Amounts, Meter
from benchmarks.accuracy.recorder import PowerPoll, RawRecorder
from flopledger_agent.clocks import SystemClock
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.nvml_errors import DriverError
from flopledger_agent.gpus.source import NvmlSource
from flopledger_core.accelerators import load_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.accuracy.workloads import Workload

CASE_SECONDS: Final = 5.0
PIECE_SECONDS: Final = 1.0  # of work between two samples
SETTLE_SECONDS: Final = 0.4  # GPM wants 100 ms between samples; energy follows within as much
WARM_UP_SAMPLES: Final = 4
MISSING: Final = 3  # exit status: nothing to measure on


class Bench:
    """One device, metered by the agent's reader while cases run on it."""

    def __init__(self, record: Path | None) -> None:
        self._nvml = Nvml()
        self.driver = self._nvml.open() or "unknown"
        self._handle = self._nvml.handle_by_index(0)
        self._recorder = RawRecorder(self._nvml, self._handle, record)
        self.meter = Meter(NvmlSource(SystemClock(), load_table()))
        self.power = PowerPoll(self._nvml, self._handle)
        self._checks: dict[str, int | None] = {}

    @property
    def device(self) -> str:
        """The product name."""
        return self._nvml.name(self._handle)

    def warm_up(self) -> None:
        """Let the reader learn the counters' scale before anything counts."""
        for _ in range(WARM_UP_SAMPLES):
            self._sample("warm-up")
            time.sleep(SETTLE_SECONDS)

    def run(self, workload: Workload, synchronise: Callable[[], object]) -> int:
        """Work for a few seconds under the meter; how many repetitions were carried out."""
        one = workload.repeat
        one(1)
        synchronise()
        began = time.perf_counter()
        one(3)
        synchronise()
        each = max(1e-6, (time.perf_counter() - began) / 3)
        piece = max(1, int(PIECE_SECONDS / each))
        time.sleep(SETTLE_SECONDS)
        self.meter.begin(workload.case, workload.precision)
        self._recorder.write(workload.case)
        self.power.begin()
        done = 0
        until = time.perf_counter() + CASE_SECONDS
        while time.perf_counter() < until:
            one(piece)
            synchronise()
            done += piece
            self._sample(workload.case)
        self._checks[workload.case] = self.power.end_mj()
        self.meter.end()
        return done

    def rest(self, case: str, seconds: float) -> None:
        """Nothing runs, under the meter."""
        self.meter.begin(case, None)
        self.power.begin()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            time.sleep(PIECE_SECONDS)
            self._sample(case)
        self._checks[case] = self.power.end_mj()
        self.meter.end()

    def outcome(self, workload: Workload, repetitions: int, amounts: Amounts) -> Outcome:
        """The case held against its truth."""
        work = amounts.work
        bounds = work.flop if workload.quantity == "flop" else work.tensor_integer_operations
        note = workload.note if not amounts.gaps else f"{workload.note} ({amounts.gaps} gaps)"
        return Outcome(
            case=workload.case,
            precision=workload.precision,
            tier="+".join(amounts.tiers),
            seconds=amounts.time_ms / 1000,
            quantity=workload.quantity,
            truth=workload.amount * repetitions,
            truth_method=workload.method,
            low=bounds.low,
            central=bounds.central,
            high=bounds.high,
            energy_mj=amounts.energy_mj,
            energy_check_mj=self._checks[workload.case],
            note=note,
        )

    def findings(self) -> list[str]:
        """What the raw readings say of this device and driver."""
        return [*self._call_costs(), *self._energy_period(), *self._recorder.findings()]

    def _sample(self, case: str) -> None:
        self.meter.tick()
        self._recorder.write(case)

    def _call_costs(self) -> list[str]:
        calls: dict[str, Callable[[], object]] = {
            "energy counter": lambda: self._nvml.energy_mj(self._handle),
            "SM clock": lambda: self._nvml.sm_clock_khz(self._handle),
            "power": lambda: self._nvml.power_mw(self._handle),
            "processes": lambda: self._nvml.compute_pids(self._handle),
            "one whole sample of the agent": self.meter.tick,
        }
        costs: list[str] = []
        for name, call in calls.items():
            durations: list[float] = []
            for _ in range(30):
                began = time.perf_counter()
                try:
                    call()
                except DriverError as error:
                    costs.append(f"{name}: {error.meaning.reason}")
                    break
                durations.append(time.perf_counter() - began)
                time.sleep(0.02)
            if durations:
                costs.append(f"{name}: median {statistics.median(durations) * 1e6:.0f} us a call")
        return costs

    def _energy_period(self) -> list[str]:
        changes: list[float] = []
        last = self._nvml.energy_mj(self._handle)
        until = time.perf_counter() + 2
        while (now := time.perf_counter()) < until:
            value = self._nvml.energy_mj(self._handle)
            if value != last:
                changes.append(now)
                last = value
        gaps = [later - earlier for earlier, later in itertools.pairwise(changes)]
        if not gaps:
            return ["the energy counter did not move in two seconds"]
        return [f"the energy counter moves every {statistics.median(gaps) * 1000:.0f} ms (median)"]


def measure(record: Path | None) -> Run:
    """Every case. Errors: DriverError without a driver, ImportError without PyTorch."""
    from benchmarks.accuracy import workloads  # noqa: PLC0415  (needs PyTorch, which may be absent)

    bench = Bench(record)
    torch = workloads.load_torch()
    bench.warm_up()
    bench.rest("at-rest", 4.0)
    counts: dict[str, tuple[Workload, int]] = {}
    findings: list[str] = []
    for make in workloads.WORKLOADS:
        try:
            workload = make(torch)
            counts[workload.case] = (workload, bench.run(workload, torch.cuda.synchronize))
        except Exception as error:  # noqa: BLE001  (a case this build cannot run is a finding)
            findings.append(f"{make.__name__}: not run: {type(error).__name__}: {error}"[:300])
        finally:
            torch.cuda.empty_cache()
    amounts = bench.meter.amounts()
    outcomes = tuple(
        bench.outcome(workload, repetitions, amounts[case])
        for case, (workload, repetitions) in counts.items()
    )
    return Run(
        device=bench.device,
        driver=bench.driver,
        method=(
            f"PyTorch {torch.__version__}, {CASE_SECONDS:.0f} s a case, one sample a second, truth "
            "2MNK or PyTorch's FLOP counter, energy against power polled every 20 ms"
        ),
        date=dt.datetime.now(dt.UTC).date().isoformat(),
        outcomes=outcomes,
        findings=(*findings, *bench.findings()),
    )


@click.command()
@click.option("--record", type=click.Path(path_type=Path), help="Folder for raw traces.")
def main(record: Path | None) -> None:
    """Measure on the first GPU; one line of JSON, or one sentence why not."""
    try:
        run: Any = measure(record)
    except DriverError as error:
        print(f"no NVIDIA driver: {error}", file=sys.stderr)
        sys.exit(MISSING)
    except ImportError as error:
        print(f"no PyTorch in this Python: {error}; name another with --python", file=sys.stderr)
        sys.exit(MISSING)
    print(msgspec.json.encode(run).decode())


if __name__ == "__main__":
    main()
