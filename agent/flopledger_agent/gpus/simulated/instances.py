"""GPU instances of a partitioned GPU (MIG), read from a scenario.

    [[gpus]]
    mig_slices = 7                    compute slices of the whole GPU (as the hardware table says)
    mig_from_seconds = 0              MIG is on from here (absent: 0 with instances, else never)
    mig_until_seconds = 60            until here (absent: for ever)
    [[gpus.instances]]
    id, slices                        the GPU instance's id (1, 2, ...) and compute slices (1)
    sm_count                          SMs (its share of all, as drivers cut it)
    compute_instances                 how many share it (1); at 0 the driver shows no MIG device
    from_seconds, until_seconds       when it is made and destroyed (as long as MIG is on)
    [[gpus.instances.phases]]         as of a GPU; the clock is the GPU's, power adds to the GPU's
    [[gpus.instances.faults]]         faults of this instance's calls

While MIG is on the GPU's own phases give its clock and the power that no instance causes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from fractions import Fraction
from typing import Final

from flopledger_agent.gpus.simulated.faults import Fault, read_faults
from flopledger_agent.gpus.simulated.phases import Phase, read_phase
from flopledger_agent.gpus.simulated.tables import ScenarioError, Table
from flopledger_core.records import PIPES

SLICES: Final = 7  # of most models; the hardware table knows
INSTANCE_ID_MAX: Final = 63
NOTHING: Final = Phase(
    duration_ns=0,
    sm_clock_mhz=0,
    power_watts=Fraction(0),
    sm_active=Fraction(0),
    pipes=dict.fromkeys(PIPES, Fraction(0)),
    memory_used_mib=0,
    owners=(),
    gpu_active=Fraction(0),
    sm_occupancy=Fraction(0),
    dram_active=Fraction(0),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One GPU instance from when it is made until it is destroyed; `until_ns` None: never."""

    instance_id: int
    slices: int
    sm_count: int
    compute_instance_count: int
    from_ns: int
    until_ns: int | None
    phases: tuple[Phase, ...]  # from second 0 on, with the GPU's clock; nothing before `from_ns`
    idle: Phase
    faults: tuple[Fault, ...]

    def alive(self, now_ns: int) -> bool:
        """Whether it exists (start included, end excluded)."""
        return self.from_ns <= now_ns and (self.until_ns is None or now_ns < self.until_ns)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mig:
    """When a GPU is partitioned, and into what."""

    slices: int
    sms_by_slices: Mapping[int, int]  # of the GPU instances that can be made
    from_ns: int | None  # None: never
    until_ns: int | None  # None: for ever
    instances: tuple[Instance, ...]

    def enabled(self, now_ns: int) -> bool:
        """Whether MIG is on."""
        if self.from_ns is None or now_ns < self.from_ns:
            return False
        return self.until_ns is None or now_ns < self.until_ns


def sms_by_slices(slices: int, sm_count: int, known: Mapping[str, int]) -> dict[int, int]:
    """SMs by compute slices of a GPU instance: the `known` ones ("3g"), else about their share."""
    share = sm_count // (slices + 1)
    found = {count: max(1, count * share) for count in (1, 2, 3, 4) if count < slices}
    found[slices] = sm_count
    return found | {int(name.rstrip("g")): sms for name, sms in known.items()}


def read_mig(  # noqa: PLR0913, PLR0917 (one fact of the GPU an argument)
    row: Table,
    phases: tuple[Phase, ...],
    idle: Phase,
    sm_count: int,
    known_sms: Mapping[str, int],
    processes: Container[str],
) -> Mig:
    """The MIG part of a [[gpus]] table whose own `phases` are read. Errors: ScenarioError.

    `known_sms` are the SMs of the model's MIG profiles, by name.
    """
    default = max((int(name.rstrip("g")) for name in known_sms), default=SLICES)
    slices = row.integer("mig_slices", default, at_least=1)
    if slices != default or "sm_count" in row:
        known_sms = {}  # another GPU than the table's
    rows = row.tables("instances")
    from_ns = row.nanoseconds("mig_from_seconds") if "mig_from_seconds" in row else None
    if rows and from_ns is None:
        from_ns = 0
    until_ns = row.nanoseconds("mig_until_seconds") if "mig_until_seconds" in row else None
    empty = Mig(
        slices=slices,
        sms_by_slices=sms_by_slices(slices, sm_count, known_sms),
        from_ns=from_ns,
        until_ns=until_ns,
        instances=(),
    )
    if from_ns is not None:
        _require_no_work(row, phases, empty)
    reader = _InstanceReader(empty, phases, idle, processes)
    instances = tuple(reader.read(number, table) for number, table in enumerate(rows, start=1))
    _require_room(row, slices, instances)
    return dataclasses.replace(empty, instances=instances)


def _require_no_work(row: Table, phases: tuple[Phase, ...], mig: Mig) -> None:
    start_ns = 0
    for phase in phases:
        end_ns = start_ns + phase.duration_ns
        busy = phase.owners or phase.sm_active or any(phase.pipes.values())
        first_ns = max(start_ns, mig.from_ns or 0)
        if busy and first_ns < end_ns and mig.enabled(first_ns):
            remedy = "give the work to instances while MIG is on"
            raise ScenarioError(row.field("phases"), float(phase.sm_active), remedy)
        start_ns = end_ns


def _require_room(row: Table, slices: int, instances: tuple[Instance, ...]) -> None:
    for made in instances:
        living = [item for item in instances if item.alive(made.from_ns)]
        if sum(item.slices for item in living) > slices:
            used = sum(item.slices for item in living)
            remedy = f"use at most {slices} slices at a time, or give mig_slices"
            raise ScenarioError(row.field("instances.slices"), used, remedy)
        if sum(item.instance_id == made.instance_id for item in living) > 1:
            remedy = "give each living instance its own"
            raise ScenarioError(row.field("instances.id"), made.instance_id, remedy)


class _InstanceReader:
    """Reads the [[gpus.instances]] tables of one GPU."""

    def __init__(
        self,
        mig: Mig,
        phases: tuple[Phase, ...],
        idle: Phase,
        processes: Container[str],
    ) -> None:
        self._mig = mig
        self._gpu_phases = phases
        self._gpu_idle = idle
        self._processes = processes

    def read(self, number: int, row: Table) -> Instance:
        """One instance. Errors: ScenarioError."""
        mig = self._mig
        slices = row.integer("slices", 1, at_least=1)
        instance_id = row.integer("id", number)
        if instance_id > INSTANCE_ID_MAX:
            raise ScenarioError(row.field("id"), instance_id, f"use at most {INSTANCE_ID_MAX}")
        from_ns = row.nanoseconds("from_seconds") if "from_seconds" in row else mig.from_ns or 0
        until_ns = row.nanoseconds("until_seconds") if "until_seconds" in row else mig.until_ns
        ends_late = mig.until_ns is not None and (until_ns is None or until_ns > mig.until_ns)
        if not mig.enabled(from_ns) or ends_late:
            remedy = "let the instance live while MIG is on"
            raise ScenarioError(row.field("from_seconds"), from_ns, remedy)
        if until_ns is not None and until_ns <= from_ns:
            raise ScenarioError(row.field("until_seconds"), until_ns, "end after from_seconds")
        phases: list[Phase] = []
        for table in row.tables("phases"):
            if "sm_clock_mhz" in table:
                remedy = "give it to the GPU: instances share its clock"
                raise ScenarioError(table.field("sm_clock_mhz"), "given", remedy)
            phases.append(read_phase(table, NOTHING, self._processes))
        instance = Instance(
            instance_id=instance_id,
            slices=slices,
            sm_count=row.integer("sm_count", mig.sms_by_slices.get(slices), at_least=1),
            compute_instance_count=row.integer("compute_instances", 1),
            from_ns=from_ns,
            until_ns=until_ns,
            phases=tuple(self._clocked(from_ns, until_ns, phases)),
            idle=NOTHING if until_ns is not None else self._under_clock(NOTHING, self._gpu_idle),
            faults=read_faults(row),
        )
        row.finish()
        return instance

    def _clocked(self, from_ns: int, until_ns: int | None, phases: list[Phase]) -> Iterator[Phase]:
        """The instance's phases with the GPU's clock, cut wherever either of them changes."""
        own = [dataclasses.replace(NOTHING, duration_ns=from_ns), *phases]
        own_ends = _ends(own)
        gpu_ends = _ends(self._gpu_phases)
        edges = {*own_ends, *gpu_ends, from_ns}
        if until_ns is not None:
            edges = {edge for edge in edges if edge < until_ns} | {until_ns}
        start_ns = 0
        for end_ns in sorted(edges - {0}):
            mine = _at(own, own_ends, start_ns) or NOTHING
            gpu = _at(self._gpu_phases, gpu_ends, start_ns) or self._gpu_idle
            if start_ns >= from_ns:
                mine = self._under_clock(mine, gpu)
            yield dataclasses.replace(mine, duration_ns=end_ns - start_ns)
            start_ns = end_ns

    @staticmethod
    def _under_clock(phase: Phase, gpu: Phase) -> Phase:
        return dataclasses.replace(phase, sm_clock_mhz=gpu.sm_clock_mhz)


def _ends(phases: list[Phase] | tuple[Phase, ...]) -> list[int]:
    ends: list[int] = []
    for phase in phases:
        ends.append((ends[-1] if ends else 0) + phase.duration_ns)
    return ends


def _at(phases: list[Phase] | tuple[Phase, ...], ends: list[int], at_ns: int) -> Phase | None:
    return next((phase for phase, end in zip(phases, ends, strict=True) if at_ns < end), None)
