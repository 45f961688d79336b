"""Scripted failures of the simulated driver: what real drivers have been seen to do.

A fault is a value: kind, window on the scenario's clock, functions it touches. The gate decides per
call. It never busy-waits: a hang sleeps on a condition until released, over, or uninstalled.

Kinds: `error` (an NVML code on the named functions), `hang` (the call does not return), `lost`
(GPU_IS_LOST on every device call), `vanish` (the device leaves the count and its handles are lost),
`counter_reset` (energy and cumulative cycles restart at zero; the truth goes on), `nan` (GPM
percentages are not a number), `metric_error` (a GPM metric carries an error of its own), `xid`
(the driver reports the XID error `code`, 79 when absent, to whoever registered for it; calls go on
as they do).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Final, Literal, TypeAlias, cast

from flopledger_agent.gpus.simulated.tables import ScenarioError, Table

FaultKind: TypeAlias = Literal[
    "error", "hang", "lost", "vanish", "counter_reset", "nan", "metric_error", "xid"
]
FAULT_KINDS: Final = (
    "error",
    "hang",
    "lost",
    "vanish",
    "counter_reset",
    "nan",
    "metric_error",
    "xid",
)
CODE_SUCCESS: Final = 0
CODE_UNINITIALIZED: Final = 1
CODE_GPU_IS_LOST: Final = 15
CODE_UNKNOWN: Final = 999
# How often a hang with an end looks at the scenario's clock, which may run faster than real time.
HANG_CHECK_SECONDS: Final = 0.02


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fault:
    """One failure; times are nanoseconds since the scenario's start. `at_ns` None: when injected.

    `functions` None: every device call. `for_ns` None: for ever. `metrics` None: every GPM metric.
    """

    kind: FaultKind
    at_ns: int | None = None
    for_ns: int | None = None
    functions: frozenset[str] | None = None
    code: int | None = None
    metrics: frozenset[int] | None = None

    def active(self, now_ns: int) -> bool:
        """Whether the fault's window holds `now_ns` (start included, end excluded)."""
        start_ns = self.at_ns or 0
        return start_ns <= now_ns and (self.for_ns is None or now_ns < start_ns + self.for_ns)

    def touches_metric(self, metric_id: int, now_ns: int) -> bool:
        """Whether a GPM metric read at `now_ns` is affected."""
        return self.active(now_ns) and (self.metrics is None or metric_id in self.metrics)


def read_faults(table: Table) -> tuple[Fault, ...]:
    """The `faults` array of a GPU or of the scenario, ordered by time."""
    faults = [_read_fault(row) for row in table.tables("faults")]
    return tuple(sorted(faults, key=lambda fault: fault.at_ns or 0))


def _read_fault(row: Table) -> Fault:
    kind = row.choice("kind", FAULT_KINDS)
    functions = frozenset(row.texts("functions"))
    metrics = frozenset(row.integers("metrics"))
    for name in sorted(functions):
        if not name.startswith("nvml"):
            raise ScenarioError(row.field("functions"), name, "give NVML function names (nvml...)")
    fault = Fault(
        kind=cast("FaultKind", kind),
        at_ns=row.nanoseconds("at_seconds") if "at_seconds" in row else 0,
        for_ns=row.nanoseconds("for_seconds") if "for_seconds" in row else None,
        functions=functions or None,
        code=row.integer("code", at_least=1) if "code" in row else None,
        metrics=metrics or None,
    )
    row.finish()
    return fault


class FaultGate:
    """Decides, call by call, whether a fault answers in the driver's place."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._condition = threading.Condition()
        self._ended: set[Fault] = set()
        self._closed = False
        self.hanging = 0  # calls blocked at this moment

    def check(self, name: str, faults: tuple[Fault, ...], now_ns: int) -> int:
        """The code a call of `name` must return at once, or success; blocks while it hangs."""
        for fault in faults:
            if not fault.active(now_ns):
                continue
            if fault.functions is not None and name not in fault.functions:
                continue
            if fault.kind in ("lost", "vanish"):
                return CODE_GPU_IS_LOST
            if fault.kind == "error":
                return CODE_UNKNOWN if fault.code is None else fault.code
            if fault.kind == "hang" and fault not in self._ended:
                self._hang(fault)
                if self._closed:
                    return CODE_UNINITIALIZED
                if fault.code is not None:
                    return fault.code
        return CODE_SUCCESS

    def _hang(self, fault: Fault) -> None:
        pause = None if fault.for_ns is None else HANG_CHECK_SECONDS
        with self._condition:
            self.hanging += 1
            try:
                while not (self._closed or fault in self._ended) and fault.active(self._now_ns()):
                    self._condition.wait(pause)
            finally:
                self.hanging -= 1

    def release(self, faults: tuple[Fault, ...]) -> None:
        """End the hangs among `faults` that are active now; their calls go on."""
        now_ns = self._now_ns()
        with self._condition:
            self._ended.update(f for f in faults if f.kind == "hang" and f.active(now_ns))
            self._condition.notify_all()

    def close(self) -> None:
        """Let every blocked call return: the driver is being taken away."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
