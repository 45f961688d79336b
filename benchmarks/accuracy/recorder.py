"""Raw readings beside the meter's: every GPM metric the driver answers, and power polled often."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TextIO

from flopledger_agent.gpus.nvml_errors import DriverError

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_agent.gpus.nvml import Handle, Nvml

METRIC_IDS: Final = (*range(1, 14), *range(20, 22), *range(160, 166), *range(248, 261))
POLL_SECONDS: Final = 0.02
TRACE_FILE: Final = "nvml-gpm.ndjson"


class RawRecorder:
    """One line of JSON per sample: what the driver said, unconverted."""

    def __init__(self, nvml: Nvml, handle: Handle, directory: Path | None) -> None:
        self._nvml = nvml
        self._handle = handle
        self._file: TextIO | None = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / TRACE_FILE).open("w", encoding="utf-8")
        self._buffers: list[Any] = []
        self._query: Any = None
        if nvml.gpm_supported(handle):
            self._buffers = [nvml.gpm_allocate(), nvml.gpm_allocate()]
            self._query = nvml.gpm_query(METRIC_IDS)
            nvml.gpm_sample(handle, self._buffers[0])
        self._seen: dict[str, dict[int, float]] = {}  # case -> highest value by metric

    def write(self, case: str) -> None:
        """Read everything now."""
        line: dict[str, object] = {
            "case": case,
            "boot_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        }
        for name, read in (
            ("energy_mj", self._nvml.energy_mj),
            ("power_mw", self._nvml.power_mw),
            ("sm_clock_khz", self._nvml.sm_clock_khz),
            ("utilization_percent", self._nvml.utilization_percent),
        ):
            try:
                line[name] = read(self._handle)
            except DriverError as error:
                line[name] = error.meaning.reason
        if self._query is not None:
            self._nvml.gpm_sample(self._handle, self._buffers[1])
            answers = self._query.answers(*self._buffers)
            self._buffers.reverse()
            line["gpm"] = {
                str(metric): value if code == 0 and math.isfinite(value) else None
                for metric, (code, value) in answers.items()
            }
            line["gpm_codes"] = {str(metric): code for metric, (code, _) in answers.items() if code}
            highest = self._seen.setdefault(case, {})
            for metric, (code, value) in answers.items():
                if code == 0 and math.isfinite(value):
                    highest[metric] = max(value, highest.get(metric, value))
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()

    def findings(self) -> list[str]:
        """Which pipes moved in which case: settles what a metric counts."""
        told: list[str] = []
        for case, highest in self._seen.items():
            moving = ", ".join(
                f"{metric}={highest[metric]:.1f} %" for metric in (2, 4, 5, 6, 7, 8, 9, 11, 12, 13)
                if highest.get(metric, 0) >= 1
            )  # fmt: skip
            told.append(f"GPM maxima in {case}: {moving or 'nothing above 1 %'}")
        counted = sorted(
            {metric for found in self._seen.values() for metric in found if metric >= 248}
        )
        told.append(f"cycle counters answered: {counted or 'none'}")
        return told


class PowerPoll:
    """Power polled often and integrated: a check that shares no counter with the meter."""

    def __init__(self, nvml: Nvml, handle: Handle) -> None:
        self._nvml = nvml
        self._handle = handle
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._integral_mj: float | None = 0.0

    def begin(self) -> None:
        """Poll from now on."""
        self._stop.clear()
        self._integral_mj = 0.0
        self._thread = threading.Thread(target=self._poll, name="bench-power", daemon=True)
        self._thread.start()

    def end_mj(self) -> int | None:
        """Millijoules since `begin`; None where power could not be read."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        return None if self._integral_mj is None else int(self._integral_mj)

    def _poll(self) -> None:
        last: tuple[float, int] | None = None
        total = 0.0
        while not self._stop.is_set():
            try:
                now = (time.monotonic(), self._nvml.power_mw(self._handle))
            except DriverError:
                self._integral_mj = None
                return
            if last is not None:
                total += (now[0] - last[0]) * (now[1] + last[1]) / 2
            last = now
            self._integral_mj = total
            self._stop.wait(POLL_SECONDS)
