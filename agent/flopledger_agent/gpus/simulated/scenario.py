"""The scenario: what each simulated GPU does over time, read from TOML into frozen values.

    driver_version = "595.71.05"      nvml_version = "13.595.71"     cuda_version = "13.2"
    seed = 0                          makes UUIDs and serials; give every simulated node its own
    start_boottime_ns = 1000000000    clock value at the scenario's start (absent: at install)
    missing_functions = []            NVML functions an older driver does not have
    [[faults]]                        faults of calls without a device (nvmlInitWithFlags, ...)
    [[gpus]]                          model, and optionally uuid, serial, gpm, cycle_scale,
                                      sm_count, max_sm_clock_mhz, power_limit_watts, memory_mib,
                                      pci_device_id, compute_capability, idle_sm_clock_mhz,
                                      idle_power_watts, memory_clock_mhz, energy_scope,
                                      other_power_watts, cycles_offset
    [[gpus.phases]]                   seconds, sm_clock_mhz, power_watts, sm_active, pipes,
                                      memory_used_mib, processes, shares, gpu_active,
                                      sm_occupancy, dram_active
    [[gpus.faults]]                   see faults.py
    [[gpus.instances]]                MIG, see instances.py
    [processes.NAME]                  pid, create_time_unix, user, command, parent_pid, real,
                                      environ
    [trace]                           see trace.py

Everything is exact: decimals become Fractions, times whole nanoseconds. Nothing here reads a clock
or calls a driver; a mistake is a ScenarioError that names field, value and remedy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

from flopledger_agent.gpus.simulated.faults import Fault, read_faults
from flopledger_agent.gpus.simulated.instances import Mig, read_mig
from flopledger_agent.gpus.simulated.phases import Phase, idle_phase, read_phase, refuse_twins
from flopledger_agent.gpus.simulated.tables import (
    NS_PER_SECOND,
    ScenarioError,
    Table,
    parse_toml,
)
from flopledger_agent.gpus.simulated.trace import read_trace
from flopledger_core.accelerators import AcceleratorTable, load_table
from flopledger_core.records import PIPES, EnergyScope

Gpm: TypeAlias = Literal["cycles", "util", "none"]
CycleScale: TypeAlias = Literal["sum", "mean"]

DRIVER_WITH_GPM_CYCLES: Final = 595  # nvidia-ml-py 13.595 is the first with ids 248-260
DRIVER_WITH_GPM: Final = 525
MEMORY_CLOCK_MHZ: Final = 2619
# Above the largest pid Linux gives out (4194304): a made-up process is never a real one.
FIRST_SIMULATED_PID: Final = 10_000_001
GPUS_MAX: Final = 128  # PCI bus numbers are two hex digits; no node holds more
UNKNOWN_ARCHITECTURE: Final = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One simulated GPU: its hardware facts, its phases from second 0 on, its faults."""

    model: str
    uuid: str
    serial: str
    pci_device_id: int
    architecture: int  # NVML_DEVICE_ARCH_*
    compute_capability: tuple[int, int]
    cores_per_sm: int
    sm_count: int
    max_sm_clock_mhz: int
    power_limit_watts: int
    memory_mib: int
    memory_clock_mhz: int
    gpm: Gpm
    cycle_scale: CycleScale
    energy_scope: EnergyScope  # what the energy counter, and every phase's power, covers
    other_power_watts: int  # of the module beside the GPU, contained in every phase's power
    cycles_offset: int  # where cumulative cycles (summed over SMs) stand at the start
    idle: Phase
    phases: tuple[Phase, ...]
    faults: tuple[Fault, ...]
    mig: Mig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioProcess:
    """A process of the scenario; when `real`, only its pid counts and the OS knows the rest."""

    name: str
    pid: int
    create_time_unix_ns: int | None  # None: when it first appears on a GPU
    user: str
    command: str
    parent_pid: int
    environ: Mapping[str, str]
    real: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything the simulated driver knows."""

    driver_version: str
    nvml_version: str
    cuda_version: int  # as NVML gives it: 13020 is 13.2
    start_boottime_ns: int | None
    missing_functions: frozenset[str]
    gpus: tuple[Gpu, ...]
    processes: Mapping[str, ScenarioProcess]
    faults: tuple[Fault, ...]


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file; a trace's path is relative to it. Errors: ScenarioError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError("scenario file", str(path), f"give a readable file ({error})") from None
    return parse_scenario(text, directory=path.parent)


def parse_scenario(text: str, *, directory: Path | None = None) -> Scenario:
    """Read a scenario from TOML text. Errors: ScenarioError."""
    return build_scenario(parse_toml(text), directory=directory)


def build_scenario(
    values: Mapping[str, object],
    *,
    directory: Path | None = None,
    accelerators: AcceleratorTable | None = None,
) -> Scenario:
    """Make a scenario from a mapping shaped like the TOML. Errors: ScenarioError."""
    table = Table("", values)
    driver_version = table.text("driver_version", "595.71.05")
    seed = str(table.take("seed") or 0)
    processes = _processes(table.table("processes"))
    rows = table.tables("gpus")
    if not 1 <= len(rows) <= GPUS_MAX:
        raise ScenarioError("gpus", len(rows), f"give 1 to {GPUS_MAX} [[gpus]] tables")
    if "trace" in table:
        traced = read_trace(table.table("trace"), directory or Path(), PIPES, len(rows))
    else:
        traced = {}
    reader = _GpuReader(accelerators or load_table(), _major(driver_version), seed, processes)
    scenario = Scenario(
        driver_version=driver_version,
        nvml_version=table.text("nvml_version", f"13.{driver_version.rpartition('.')[0]}"),
        cuda_version=_cuda_version(table.text("cuda_version", "13.2")),
        start_boottime_ns=(
            table.integer("start_boottime_ns") if "start_boottime_ns" in table else None
        ),
        missing_functions=frozenset(table.texts("missing_functions")),
        gpus=tuple(reader.read(i, row, traced.get(i)) for i, row in enumerate(rows)),
        processes=processes,
        faults=read_faults(table),
    )
    table.finish()
    refuse_twins("uuid", [gpu.uuid for gpu in scenario.gpus])
    return scenario


def _major(driver_version: str) -> int:
    head = driver_version.partition(".")[0]
    if not head.isdecimal():
        raise ScenarioError("driver_version", driver_version, "write it like 595.71.05")
    return int(head)


def _cuda_version(text: str) -> int:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ScenarioError("cuda_version", text, "write it like 13.2")
    return int(major) * 1000 + int(minor) * 10


def _processes(table: Table) -> dict[str, ScenarioProcess]:
    processes: dict[str, ScenarioProcess] = {}
    for position, name in enumerate(table.keys()):
        row = table.table(name)
        environ = row.table("environ")
        described = any(key in row for key in ("user", "command", "environ", "create_time_unix"))
        created = row.number("create_time_unix", 0) * NS_PER_SECOND
        processes[name] = ScenarioProcess(
            name=name,
            pid=row.integer("pid", FIRST_SIMULATED_PID + position, at_least=1),
            create_time_unix_ns=int(created) if "create_time_unix" in row else None,
            user=row.text("user", "user"),
            command=row.text("command", name),
            parent_pid=row.integer("parent_pid", 1),
            environ={key: environ.text(key) for key in environ.keys()},  # noqa: SIM118 (not a dict)
            real=row.boolean("real", default="pid" in row and not described),
        )
        row.finish()
    refuse_twins("processes.pid", [str(process.pid) for process in processes.values()])
    return processes


class _GpuReader:
    """Reads one [[gpus]] table; holds what all of them share."""

    def __init__(
        self,
        accelerators: AcceleratorTable,
        driver_major: int,
        seed: str,
        processes: Mapping[str, ScenarioProcess],
    ) -> None:
        self._accelerators = accelerators
        self._driver_major = driver_major
        self._seed = seed
        self._processes = processes

    def read(self, index: int, row: Table, traced: list[dict[str, object]] | None) -> Gpu:
        """The GPU at `index`, its phases from the trace where there is one."""
        phases = row.tables("phases")
        if traced is not None:
            if phases:
                raise ScenarioError(row.field("phases"), len(phases), "use phases or a trace")
            phases = [Table(f"trace.gpu[{index}][{i}]", phase) for i, phase in enumerate(traced)]
        facts, gpm_offered = self._facts(row)
        identity = hashlib.sha256(f"flopledger simulated gpu {self._seed} {index}".encode())
        digest = identity.digest()
        idle = idle_phase(row)
        own = tuple(read_phase(phase, idle, self._processes) for phase in phases)
        sm_count = row.integer("sm_count", facts.sm_count, at_least=1)
        gpu = Gpu(
            model=row.text("model"),
            uuid=row.text("uuid", f"GPU-{uuid.UUID(bytes=digest[:16], version=4)}"),
            serial=row.text("serial", str(1_000_000_000_000 + int.from_bytes(digest[16:21]))),
            pci_device_id=int(row.text("pci_device_id", facts.pci_device_id), 16),
            architecture=facts.architecture,
            compute_capability=_capability(row, facts.compute_capability),
            cores_per_sm=facts.cores_per_sm,
            sm_count=sm_count,
            max_sm_clock_mhz=row.integer("max_sm_clock_mhz", facts.max_sm_clock_mhz, at_least=1),
            power_limit_watts=row.integer("power_limit_watts", facts.power_limit_watts, at_least=1),
            memory_mib=row.integer("memory_mib", facts.memory_mib, at_least=1),
            memory_clock_mhz=row.integer("memory_clock_mhz", MEMORY_CLOCK_MHZ),
            gpm=cast("Gpm", row.choice("gpm", ("cycles", "util", "none"), gpm_offered)),
            cycle_scale=cast("CycleScale", row.choice("cycle_scale", ("sum", "mean"), "sum")),
            energy_scope=cast(
                "EnergyScope", row.choice("energy_scope", ("gpu", "module"), facts.energy_scope)
            ),
            other_power_watts=row.integer("other_power_watts", 0),
            cycles_offset=row.integer("cycles_offset", 0),
            idle=idle,
            phases=own,
            faults=read_faults(row),
            mig=read_mig(row, own, idle, sm_count, facts.mig_sm_counts, self._processes),
        )
        row.finish()
        return gpu

    def _facts(self, row: Table) -> tuple[_Facts, str]:
        model = row.text("model")
        found = self._accelerators.find(model)
        if found is None:
            for key in ("sm_count", "max_sm_clock_mhz", "power_limit_watts", "memory_mib"):
                if key not in row:
                    remedy = f"name a model of the hardware table or give {key} beside it"
                    raise ScenarioError(row.field("model"), model, remedy)
            return _Facts(), "none"
        architecture = self._accelerators.architecture_of(found)
        offered = "none"
        if architecture.gpm and self._driver_major >= DRIVER_WITH_GPM:
            offered = "cycles" if self._driver_major >= DRIVER_WITH_GPM_CYCLES else "util"
        return _Facts(
            pci_device_id=found.pci_device_ids[0] if found.pci_device_ids else "0000",
            architecture=architecture.nvml_architecture,
            compute_capability=architecture.compute_capabilities[0],
            cores_per_sm=architecture.cores_per_sm,
            sm_count=found.sm_count,
            max_sm_clock_mhz=found.max_sm_clock_mhz,
            power_limit_watts=found.power_limit_watts,
            memory_mib=found.memory_mib,
            energy_scope=found.energy_scope,
            mig_sm_counts=found.mig_sm_counts,
        ), offered


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """Defaults of a model; the plain values are those of a model the hardware table lacks."""

    pci_device_id: str = "0000"
    architecture: int = UNKNOWN_ARCHITECTURE
    compute_capability: str = "9.0"
    cores_per_sm: int = 128
    sm_count: int = 1
    max_sm_clock_mhz: int = 1
    power_limit_watts: int = 1
    memory_mib: int = 1
    energy_scope: EnergyScope = "gpu"
    mig_sm_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _capability(row: Table, default: str) -> tuple[int, int]:
    text = row.text("compute_capability", default)
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ScenarioError(row.field("compute_capability"), text, "write it like 9.0")
    return int(major), int(minor)
