"""Loads the demo's committed extracts of real data: jobs, pods, node power, activity percentiles.

It exists so that the demo's inputs are one honest list: each recorded input has its source, its
licence and what was changed, and each invented one says that it is synthetic. This module only
reads and looks up; it never fills a hole with a made-up value, and never rounds what was recorded.
"""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_left
from collections.abc import Iterator
from importlib import resources
from typing import Final, Literal

import msgspec

BIN_SECONDS: Final = 10  # the power extract holds means over bins of this length
RECORDED_SECONDS: Final = 21_600  # the length of the job extract; a longer demo repeats it

InputKind = Literal["recorded", "synthetic"]


class InputProvenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where one input of the demo comes from, in words fit for a statement."""

    what: str
    kind: InputKind
    source: str
    licence: str
    changes: str


class RecordedJob(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU job of the scheduler record; times in seconds from the window's start."""

    row: int  # data row in the origin file, which makes the job's name
    user: str
    gpus: int
    nodes: int
    start_seconds: int  # negative: it was already running
    end_seconds: int
    state: str  # Slurm: COMPLETED, CANCELLED, FAILED, TIMEOUT
    interactive: bool


class RecordedPod(msgspec.Struct, frozen=True, kw_only=True):
    """One pod that asked for a part of a GPU; times in seconds from the pod window's start."""

    name: str
    gpu_milli: int  # thousandths of one GPU
    start_seconds: int
    end_seconds: int
    phase: str


class PowerSeries(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded power of whole 8-GPU nodes during one benchmark run."""

    name: str
    #: Per node, mean watts of each ten-second bin; None where there was no reading.
    nodes: tuple[tuple[int | None, ...], ...]
    lowest_watts: int  # single readings of the whole file, which span 0 to 1
    highest_watts: int

    def fraction(self, node: int, offset_seconds: int, seconds: int) -> float:
        """Mean power over `seconds` from `offset_seconds`, as a share of the recorded span.

        0 is the lowest single reading of the run, 1 the highest. Bins without a reading are left
        out; where all are, the last one before counts. The series starts again after its end, and
        nodes after the last one.
        """
        bins = self.nodes[node % len(self.nodes)]
        first = offset_seconds // BIN_SECONDS
        last = max(first, (offset_seconds + seconds - 1) // BIN_SECONDS)
        found: list[int] = []
        while not found:
            watts = (bins[index % len(bins)] for index in range(first, last + 1))
            found = [value for value in watts if value is not None]
            first -= 1
        mean = sum(found) / len(found)
        return (mean - self.lowest_watts) / (self.highest_watts - self.lowest_watts)


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded distribution: values at rising percentiles, straight lines between them."""

    percentiles: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, percentile: float) -> float:
        """The value at `percentile` (0 to 100)."""
        above = min(bisect_left(self.percentiles, percentile), len(self.percentiles) - 1)
        below = max(above - 1, 0)
        span = self.percentiles[above] - self.percentiles[below]
        share = (percentile - self.percentiles[below]) / span if span else 0.0
        step = self.values[above] - self.values[below]
        return self.values[below] + min(max(share, 0.0), 1.0) * step


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """All extracts, loaded."""

    jobs: tuple[RecordedJob, ...]
    pods: tuple[RecordedPod, ...]
    power: dict[str, PowerSeries]
    activity: dict[str, Percentiles]  # "<cluster> <metric>", percent


SLURM_STATES: Final = {
    "3": "COMPLETED",
    "4": "CANCELLED",
    "5": "FAILED",
    "6": "TIMEOUT",
    "7": "NODE_FAIL",
    "11": "OUT_OF_MEMORY",
}


def load_recorded() -> Recorded:
    """The extracts shipped inside the package."""
    return Recorded(jobs=tuple(_jobs()), pods=tuple(_pods()), power=_power(), activity=_activity())


def _rows(name: str) -> Iterator[dict[str, str]]:
    data = resources.files("flopledger_collector.demo").joinpath("data", name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return csv.DictReader(text.splitlines())


def _jobs() -> Iterator[RecordedJob]:
    for row in _rows("jobs.csv"):
        yield RecordedJob(
            row=int(row["row"]),
            user=row["user"],
            gpus=int(row["gpus"]),
            nodes=int(row["nodes"]),
            start_seconds=int(row["start_s"]),
            end_seconds=int(row["end_s"]),
            state=SLURM_STATES[row["state"]],
            interactive=row["job_type"] == "LLSUB:INTERACTIVE",
        )


def _pods() -> Iterator[RecordedPod]:
    for row in _rows("pods.csv"):
        yield RecordedPod(
            name=row["name"],
            gpu_milli=int(row["gpu_milli"]),
            start_seconds=int(row["start_s"]),
            end_seconds=int(row["end_s"]),
            phase=row["phase"],
        )


def _power() -> dict[str, PowerSeries]:
    nodes: dict[str, dict[str, dict[int, int]]] = {}
    for row in _rows("power.csv.gz"):
        bins = nodes.setdefault(row["series"], {}).setdefault(row["node"], {})
        bins[int(row["offset_s"]) // BIN_SECONDS] = int(row["mean_watts"])
    return {
        span["series"]: PowerSeries(
            name=span["series"],
            nodes=tuple(
                tuple(bins.get(index) for index in range(max(bins) + 1))
                for bins in nodes[span["series"]].values()
            ),
            lowest_watts=int(span["lowest_watts"]),
            highest_watts=int(span["highest_watts"]),
        )
        for span in _rows("power_spans.csv")
    }


def _activity() -> dict[str, Percentiles]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in _rows("activity.csv"):
        curve = curves.setdefault(f"{row['cluster']} {row['metric']}", [])
        curve.append((float(row["percentile"]), float(row["value"])))
    return {
        name: Percentiles(percentiles=tuple(p for p, _ in curve), values=tuple(v for _, v in curve))
        for name, curve in curves.items()
    }


PROVENANCE: Final = (
    InputProvenance(
        what="job schedule: starts, ends, GPU counts, users, end states",
        kind="recorded",
        source="MIT Supercloud Dataset (Samsi et al., IEEE HPEC 2021), Slurm accounting of "
        "2021-03-10 06:26 to 12:26 UTC, through a cleaned public sample",
        licence="MIT, (c) 2022 USAF - MIT Artificial Intelligence Accelerator",
        changes="time origin moved to the start of the demo, no compression; users renumbered; "
        "jobs placed on other nodes and GPU models than they ran on; jobs for which the "
        "smaller cluster has no room left out; times rounded to 5 s",
    ),
    InputProvenance(
        what="jobs sharing one GPU",
        kind="recorded",
        source="Alibaba GPU-sharing trace (Weng et al., USENIX ATC 2023), pods with gpu_milli "
        "below 1000",
        licence="Apache-2.0",
        changes="time origin moved to the start of the demo; pods put together on one GPU as "
        "long as their gpu_milli fit (the trace does not say which GPU a pod had); "
        "the others left out; times rounded to 5 s",
    ),
    InputProvenance(
        what="power of training jobs",
        kind="recorded",
        source="MLPerf Training v4.0 power submissions of Sustainable Metal Cloud, nodes of 8 x "
        "H100, DC side, about 2 s between readings (gpt3, llama2_70b_lora, resnet, bert)",
        licence="Apache-2.0 (MLCommons; not an official MLPerf result)",
        changes="node power averaged over 10 s, then over the phases of the scenario; mapped in "
        "a straight line from [lowest, highest] reading of the run to [idle, power limit] "
        "of each GPU; series repeats after its end",
    ),
    InputProvenance(
        what="power of inference on shared GPUs",
        kind="recorded",
        source="MLPerf Inference v1.0 power submission of NVIDIA, DGX A100, bert-99.9 Offline, "
        "wall side, one reading a second",
        licence="Apache-2.0 (MLCommons; not an official MLPerf result)",
        changes="as for training, and multiplied by the share of the GPU that was asked for",
    ),
    InputProvenance(
        what="activity and memory levels",
        kind="recorded",
        source="AcmeTrace (Hu et al., NSDI 2024): percentiles of SM activity and GPU memory of "
        "the LLM clusters Seren and Kalos",
        licence="CC BY 4.0",
        changes="only the distribution is recorded: which percentile a GPU has at which moment "
        "is synthetic",
    ),
    InputProvenance(
        what="order of activity levels, shares of the tensor and other pipes, SM clocks, idle "
        "power",
        kind="synthetic",
        source="invented for the demo, repeatable from its seed",
        licence="Apache-2.0",
        changes="pipe activity is a fixed share of SM activity per kind of work",
    ),
    InputProvenance(
        what="projects, activities, models, runs and precisions",
        kind="synthetic",
        source="invented for the demo: the traces name no project; `failed_run` marks jobs whose "
        "recorded state is FAILED, known only afterwards",
        licence="Apache-2.0",
        changes="recorded users are assigned to projects by a fixed table; some jobs stay untagged",
    ),
)
