"""What declarations do not say: absent is not zero, so a quantity left unsaid is open upwards.

A meter speaks of every quantity, within bounds. A person speaks only of what they state; work that
is declared by its hours, its energy, its bill or its architecture executed FLOP all the same, and
work whose FLOP is stated may have done integer operations too. Stating zero is speaking.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_collector.ledger.hosts import cpu_time_was_read
from flopledger_core.bounds import Bounds
from flopledger_core.units import MS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_collector.ledger.totals import JobLine, Line
    from flopledger_core.flop import Work

DECLARED: Final = "declared"  # the tier whose lines hold nothing but declarations
CPU_TIME: Final = "cpu_time_ms"

# Quantity -> the sum that counts the declarations which state it, zero included.
COUNTED: Final[dict[str, str]] = {
    "flop": "declared_flop_records",
    "integer_operations": "declared_integer_records",
}
# Quantity -> the sum that is positive where a declaration states it.
STATED: Final[dict[str, str]] = {
    "energy_mj": "declared_energy_mj",
    "gpu_time_ms": "declared_gpu_time_ms",
}
QUANTITIES: Final[dict[str, str]] = {
    "flop": "executed FLOP",
    "energy_mj": "energy",
    "gpu_time_ms": "GPU time",
    "integer_operations": "integer operations",
    CPU_TIME: "CPU time",
}


def silent_records(line: Line, quantity: str) -> int:
    """How many records of a line say nothing of a quantity.

    Meters and gaps of GPUs speak of everything but CPU time, nodes of nothing else. An energy
    counter that reads a whole module does not speak of its GPU, and the counters of a device that
    the hardware table lacks do not speak of operations.
    """
    if quantity == CPU_TIME:
        return 0 if line.is_host and cpu_time_was_read(line.sums) else line.records
    if line.is_host or (quantity == "energy_mj" and line.energy_boundary == "module"):
        return line.records
    if line.tier != DECLARED:
        # Nothing says what a device did that the hardware table lacks: raw counters alone.
        lacking = line.accelerator is None and bool(line.device_name)
        return line.records if lacking and quantity in COUNTED else 0
    if quantity in COUNTED:
        return max(0, line.records - line.sums.get(COUNTED[quantity], 0))
    return 0 if line.sums.get(STATED[quantity]) else line.records


def speaks_of(line: Line, quantity: str) -> bool:
    """Whether at least one record of a line says anything of a quantity."""
    return silent_records(line, quantity) < line.records


def leaves_open(line: Line, quantity: str) -> bool:
    """Whether a record of a line declares work and leaves the quantity unsaid."""
    if line.tier != DECLARED or quantity == CPU_TIME:
        return False  # no declaration has a place to state CPU time
    return silent_records(line, quantity) > 0


def said(line: Line, quantity: str, amount: Bounds | None) -> Bounds | None:
    """`amount` where the line speaks of the quantity, else None: absent is not zero."""
    return amount if speaks_of(line, quantity) else None


def unlimited(bounds: Bounds) -> Bounds:
    """The same low and central, and nothing known that limits the high end."""
    return Bounds(low=bounds.low, central=bounds.central, high=None)


def opened(line: Line) -> Line:
    """The line with what its declarations leave unsaid open upwards, and the reasons."""
    return msgspec.structs.replace(line, work=_opened_work(line))


def opened_job(line: JobLine) -> JobLine:
    """The same for the line of one job."""
    return msgspec.structs.replace(line, work=_opened_work(line))


def reasons_of_silence(line: Line) -> tuple[str, ...]:
    """One sentence for each quantity that the declarations of a line leave open."""
    return tuple(
        f"{name} of the declaration of {_named(line)} {verb} not stated: open upwards"
        for quantity, name in QUANTITIES.items()
        if leaves_open(line, quantity)
        for verb in ("are" if quantity == "integer_operations" else "is",)
    )


def _opened_work(line: Line) -> Work:
    work = line.work
    if leaves_open(line, "flop"):
        work = msgspec.structs.replace(work, flop=unlimited(work.flop))
    if leaves_open(line, "integer_operations"):
        work = msgspec.structs.replace(work, integer_operations=unlimited(work.integer_operations))
    reasons = (*work.reasons, *reasons_of_silence(line))
    return msgspec.structs.replace(work, reasons=tuple(dict.fromkeys(reasons)))


def _named(line: Line) -> str:
    """Which declaration, or group of them, as a person finds it again on the statement."""
    day = datetime.fromtimestamp(line.first_unix_ms // MS_PER_SECOND, tz=UTC).date()
    marks = [f"{key} {value}" for key, value in (("model", line.model), ("run", line.run)) if value]
    which = f" ({', '.join(marks)})" if marks else ""
    return f"{line.activity} work from {day.isoformat()}{which}"
