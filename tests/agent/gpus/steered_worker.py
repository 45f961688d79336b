"""The worker process as it is, on a simulated driver whose faults a test steers through a file.

Run as `python -m tests.agent.gpus.steered_worker FILE`. The file holds a JSON list of faults that
are in force now, each with `gpu` (scenario position; null: calls without a device); it is looked at
before the first call of the driver and every few milliseconds.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.gpus import simulated, worker
from flopledger_agent.gpus.simulated.faults import Fault, FaultKind

if TYPE_CHECKING:
    from flopledger_agent.gpus.simulated import Clock, Scenario, SimulatedDriver

LOOK_SECONDS = 0.01


class SteeredFault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault in force as long as the file holds it."""

    kind: FaultKind
    gpu: int | None = None
    code: int | None = None
    functions: list[str] = []


def write(path: Path, *faults: SteeredFault) -> None:
    """Put these faults in force, all others out."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(faults))
    fresh.replace(path)


def main() -> None:
    """Serve as the real worker does."""
    path = Path(sys.argv[1])
    install = simulated.install

    def steered(scenario: Scenario, clock: Clock) -> SimulatedDriver:
        driver = install(scenario, clock)
        applied = _apply(driver, path, b"")
        threading.Thread(target=_follow, args=(driver, path, applied), daemon=True).start()
        return driver

    simulated.install = steered
    worker.main()


def _follow(driver: SimulatedDriver, path: Path, applied: bytes) -> None:
    pause = threading.Event()
    while True:
        pause.wait(LOOK_SECONDS)
        applied = _apply(driver, path, applied)


def _apply(driver: SimulatedDriver, path: Path, applied: bytes) -> bytes:
    content = path.read_bytes()
    if content == applied:
        return applied
    driver.clear_faults()
    for item in msgspec.json.decode(content, type=list[SteeredFault]):
        fault = Fault(kind=item.kind, code=item.code, functions=frozenset(item.functions) or None)
        if item.gpu is None:
            driver.inject_system(fault)
        else:
            driver.inject(fault, item.gpu)
    return content


if __name__ == "__main__":
    main()
