"""Builds the demo's simulated cluster: one scenario text per node, for the simulated driver.

The same arguments give the same bytes. Job times, GPU counts, power and the distribution of
activity levels are recorded; everything invented is named in the provenance that the cluster
carries. Scenario edges fall on multiples of five seconds. Nothing here starts a process.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Final

import msgspec

from flopledger_collector.demo.placement import (
    GPUS_PER_NODE,
    GRID_SECONDS,
    PROFILES,
    Placed,
    place,
)
from flopledger_collector.demo.recorded import (
    PROVENANCE,
    InputProvenance,
    Recorded,
    load_recorded,
)
from flopledger_core.errors import InvalidInput

NODES_MIN: Final = 4  # two of each model: the recorded 16-GPU job needs two whole nodes
NODES_MAX: Final = 64  # one machine runs every agent of the demo; more would starve each other
VIRTUAL_SECONDS: Final = 14_400  # four hours: twice what the demo shows by default
VIRTUAL_SECONDS_MAX: Final = 2_592_000  # a month; more is not a demo
PHASES_PER_GPU: Final = 360  # keeps a scenario near half a megabyte whatever its length
PHASE_SECONDS_MIN: Final = 30
PID_FIRST: Final = 10_000_001  # above the kernel's largest pid (2^22): never a real process
RECORDED_START_UNIX: Final = 1_615_357_560  # 2021-03-10T06:26:00Z, when the record begins

CLOCK_STEP_MHZ: Final = 15  # NVIDIA clocks move in steps of 15 MHz
CLOCK_STEPS: Final = 10  # from the power limit down to the lowest recorded power; synthetic
FP32_SHARE: Final = 0.04  # of SM activity; synthetic
MEMORY_PERCENTILE_MIN: Final = 40.0  # jobs hold memory: the lower part are empty GPUs
MEMORY_PERCENTILE_MAX: Final = 95.0

DRIVER_VERSION: Final = "595.71.05"
NVML_VERSION: Final = "13.595.71"


class GpuModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the scenario must know of a GPU model; clocks and idle power are synthetic."""

    name: str
    prefix: str
    power_limit_watts: int
    idle_watts: float
    lowest_busy_mhz: int  # at the power limit; rises as power falls
    memory_mib: int


H100: Final = GpuModel(
    name="NVIDIA H100 80GB HBM3",
    prefix="h100",
    power_limit_watts=700,
    idle_watts=69.6,  # an idle H100's reading in the nvidia-smi captures
    lowest_busy_mhz=1695,
    memory_mib=81_559,
)
B200: Final = GpuModel(
    name="NVIDIA B200",
    prefix="b200",
    power_limit_watts=1000,
    idle_watts=140.0,  # synthetic: no recorded idle B200 was found
    lowest_busy_mhz=1770,
    memory_mib=183_359,
)


class DemoNode(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated node: what its agent is configured with."""

    name: str
    cluster: str
    accelerator: str
    scenario: str  # TOML for the simulated driver
    provenance: tuple[InputProvenance, ...]


class DemoCluster(msgspec.Struct, frozen=True, kw_only=True):
    """The whole simulated cluster and the schedule that drives it."""

    nodes: tuple[DemoNode, ...]
    jobs: tuple[Placed, ...]
    provenance: tuple[InputProvenance, ...]
    virtual_seconds: int
    phase_seconds: int


def build_cluster(
    nodes: int = NODES_MIN,
    seed: int = 0,
    *,
    virtual_seconds: int = VIRTUAL_SECONDS,
    start_unix_seconds: int = RECORDED_START_UNIX,
) -> DemoCluster:
    """The simulated cluster: pairs of H100 and B200 nodes with eight GPUs each.

    `virtual_seconds` is the scenario's length; past the six recorded hours the record repeats, and
    after the scenario everything is idle. `start_unix_seconds` is the virtual time of its start
    (processes need absolute birth times). Raises `InvalidInput` outside the limits.
    """
    if not NODES_MIN <= nodes <= NODES_MAX:
        raise InvalidInput("nodes", nodes, f"use {NODES_MIN} to {NODES_MAX}")
    if not PHASE_SECONDS_MIN <= virtual_seconds <= VIRTUAL_SECONDS_MAX:
        remedy = f"use {PHASE_SECONDS_MIN} to {VIRTUAL_SECONDS_MAX} seconds"
        raise InvalidInput("virtual_seconds", virtual_seconds, remedy)
    recorded = load_recorded()
    jobs = place(recorded, nodes, virtual_seconds)
    on_grid = -(-virtual_seconds // (PHASES_PER_GPU * GRID_SECONDS)) * GRID_SECONDS
    phase_seconds = max(PHASE_SECONDS_MIN, on_grid)
    writer = _Writer(
        recorded=recorded,
        jobs=jobs,
        seed=seed,
        virtual_seconds=virtual_seconds,
        phase_seconds=phase_seconds,
        start_unix_seconds=start_unix_seconds,
    )
    return DemoCluster(
        nodes=tuple(writer.node(index) for index in range(nodes)),
        jobs=jobs,
        provenance=PROVENANCE,
        virtual_seconds=virtual_seconds,
        phase_seconds=phase_seconds,
    )


def _model_of(node: int) -> GpuModel:
    return B200 if node % 4 >= 2 else H100


def _name_of(node: int) -> str:
    return f"{_model_of(node).prefix}-{node // 4 * 2 + node % 2 + 1:02d}"


class _Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU of the cluster."""

    node_index: int
    gpu_index: int
    model: GpuModel


class _Writer(msgspec.Struct, frozen=True, kw_only=True):
    """Writes scenario text; every draw depends only on the seed and on what it is drawn for."""

    recorded: Recorded
    jobs: tuple[Placed, ...]
    seed: int
    virtual_seconds: int
    phase_seconds: int
    start_unix_seconds: int

    def node(self, node: int) -> DemoNode:
        """One node with its scenario."""
        model, name = _model_of(node), _name_of(node)
        lines = [
            f'driver_version = "{DRIVER_VERSION}"',
            f'nvml_version = "{NVML_VERSION}"',
            f'seed = "demo {self.seed} {name}"',
            "",
        ]
        for gpu in range(GPUS_PER_NODE):
            lines += self._gpu(_Slot(node_index=node, gpu_index=gpu, model=model))
        lines += self._processes(node)
        return DemoNode(
            name=name,
            cluster="demo",
            accelerator=model.name,
            scenario="\n".join(lines) + "\n",
            provenance=PROVENANCE,
        )

    def _draw(self, *about: object) -> float:
        """A number in [0, 1) fixed by the seed and by what it is about."""
        text = ":".join(map(str, (self.seed, *about)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48

    def _gpu(self, slot: _Slot) -> list[str]:
        jobs = [job for job in self.jobs if (slot.node_index, slot.gpu_index) in job.gpus]
        edges = self._edges(jobs)
        lines = [
            "[[gpus]]",
            f'model = "{slot.model.name}"',
            f"idle_power_watts = {slot.model.idle_watts}",
            "phases = [",
        ]
        for start, end in pairwise(edges):
            running = [job for job in jobs if job.start_seconds <= start < job.end_seconds]
            if running:
                lines.append(self._phase(slot, start, end, running))
            else:
                lines.append(f"  {{ seconds = {end - start} }},")
        return [*lines, "]", ""]

    def _edges(self, jobs: list[Placed]) -> list[int]:
        """Phase edges: starts and ends of jobs, and the grid while a job runs."""
        edges = {0, self.virtual_seconds}
        for job in jobs:
            first = job.start_seconds // self.phase_seconds * self.phase_seconds
            grid = range(first + self.phase_seconds, job.end_seconds, self.phase_seconds)
            edges |= {job.start_seconds, job.end_seconds, *grid}
        return sorted(edges)

    def _phase(self, slot: _Slot, start: int, end: int, running: list[Placed]) -> str:
        model = slot.model
        power = active = hmma = imma = memory = 0.0
        for job in running:
            profile, share = PROFILES[job.work.profile], job.gpu_milli / 1000
            load = self._load(job, slot, start, end)
            level = share * self._level(job, slot, start, load)
            power += share * load
            active += level
            hmma += level * profile.tensor_share
            imma += level * profile.integer_tensor_share
            memory += share * self._memory(job) * model.memory_mib
        watts = model.idle_watts + power * (model.power_limit_watts - model.idle_watts)
        clock = model.lowest_busy_mhz + CLOCK_STEP_MHZ * round(CLOCK_STEPS * (1 - power))
        hmma, imma = round(hmma, 4), round(imma, 4)
        pipes = f"hmma = {hmma}, any_tensor = {round(hmma + imma, 4)}, "
        pipes += f"imma = {imma}, " if imma else ""
        pipes += f"fp32 = {active * FP32_SHARE:.4f}"
        names = ", ".join(f'"{_process(job, slot.gpu_index)}"' for job in running)
        shares = ""
        if len(running) > 1:
            weights = (f'"{_process(job, slot.gpu_index)}" = {job.gpu_milli}' for job in running)
            shares = f", shares = {{ {', '.join(weights)} }}"
        return (
            f"  {{ seconds = {end - start}, sm_clock_mhz = {clock}, power_watts = {watts:.1f}, "
            f"sm_active = {active:.4f}, pipes = {{ {pipes} }}, "
            f"memory_used_mib = {round(memory)}, processes = [{names}]{shares} }},"
        )

    def _load(self, job: Placed, slot: _Slot, start: int, end: int) -> float:
        """Recorded node power over the phase, as a share of its recorded span."""
        names = PROFILES[job.work.profile].series
        name = names[int(self._draw("series", job.name) * len(names))]
        place_in_job = sorted({node for node, _ in job.gpus}).index(slot.node_index)
        series = self.recorded.power[name]
        return series.fraction(place_in_job, start - job.began_seconds, end - start)

    def _level(self, job: Placed, slot: _Slot, start: int, load: float) -> float:
        """SM activity, 0 to 1: a recorded level, at a percentile that half follows the power."""
        profile = PROFILES[job.work.profile]
        mixed = (load + self._draw("level", job.name, slot.node_index, slot.gpu_index, start)) / 2
        percentile = profile.lowest + mixed * (profile.highest - profile.lowest)
        return self.recorded.activity[f"{profile.curve} sm_active_pct"].at(percentile) / 100

    def _memory(self, job: Placed) -> float:
        """The job's share of GPU memory: one recorded level for its whole life."""
        curve = PROFILES[job.work.profile].curve
        percentile = MEMORY_PERCENTILE_MIN + self._draw("memory", job.name) * (
            MEMORY_PERCENTILE_MAX - MEMORY_PERCENTILE_MIN
        )
        return self.recorded.activity[f"{curve} gpu_memory_used_pct"].at(percentile) / 100

    def _processes(self, node: int) -> list[str]:
        """A process table per job and GPU: one rank each, as training programs run."""
        ranks = [(job, gpu) for job in self.jobs for at, gpu in job.gpus if at == node]
        lines: list[str] = []
        for pid, (job, gpu) in enumerate(ranks, start=PID_FIRST):
            table = f"processes.{_process(job, gpu)}"
            lines += [
                f"[{table}]",
                f"pid = {pid}",
                f"create_time_unix = {self.start_unix_seconds + job.began_seconds}",
                f'user = "{job.user}"',
                f'command = "python {job.work.profile}.py"',
                f"[{table}.environ]",
                *(f'{name} = "{value}"' for name, value in _environ(job)),
                "",
            ]
        return lines


def _process(job: Placed, gpu: int) -> str:
    return f"{job.name}-{gpu}"


def _environ(job: Placed) -> list[tuple[str, str]]:
    work = job.work
    if work.project is None:
        return [("HOME", f"/home/{job.user}")]
    tags = [
        ("FLOPLEDGER_PROJECT", work.project),
        ("FLOPLEDGER_ACTIVITY", work.activity),
        ("FLOPLEDGER_RUN", job.run),
        ("FLOPLEDGER_MODEL", work.model),
        ("FLOPLEDGER_PRECISION", work.precision),
        ("FLOPLEDGER_JOB", job.name),
    ]
    return [(name, value) for name, value in tags if value is not None]
