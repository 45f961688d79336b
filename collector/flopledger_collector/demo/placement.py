"""Puts the recorded jobs and pods on the GPUs of the simulated nodes, and says whose work they are.

The schedule itself (when, how many GPUs, how it ended) is recorded and never bent: a job that finds
no room on the smaller cluster is left out whole. What is invented is written down here as tables:
which recorded user works for which project, and how hard each kind of work drives the pipes.
A GPU never holds two jobs at once, except the one that the recorded fractional pods share.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flopledger_collector.demo.recorded import RECORDED_SECONDS, Recorded, RecordedJob, RecordedPod

GPUS_PER_NODE: Final = 8
GRID_SECONDS: Final = 5  # the demo's agents tick every 5 virtual seconds: edges fall on ticks
SPANNING_GPUS: Final = 16  # recorded jobs this large fill two whole nodes
SPANNING_NODES: Final = (2, 3)
SHARED_GPU: Final = (0, 7)  # (node, GPU) that the fractional pods share

#: Of the jobs already running at the start, these rows get room before all others: a fine-tuning
#: job and an interactive session, two GPUs each, both running beyond the record's end.
KEPT_RUNNING: Final = (259, 216)


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """How a kind of work drives a GPU: percentiles of the recorded activity, synthetic shares."""

    curve: str  # cluster whose recorded percentiles are used
    lowest: float  # percentiles between which the level moves
    highest: float
    tensor_share: float  # of SM activity, on the floating-point tensor pipe
    integer_tensor_share: float = 0.0
    series: tuple[str, ...]  # power series; a job uses one of them


_SMALL: Final = ("resnet_8gpu", "bert_8gpu", "llama2_70b_lora_8gpu")
PROFILES: Final = {
    "pretrain": Profile(
        curve="kalos", lowest=80, highest=97, tensor_share=0.74, series=("gpt3_512gpu",)
    ),
    "fine_tuning": Profile(
        curve="kalos",
        lowest=60,
        highest=92,
        tensor_share=0.60,
        series=("llama2_70b_lora_8gpu",),
    ),
    "experiment": Profile(curve="seren", lowest=45, highest=90, tensor_share=0.45, series=_SMALL),
    "generation": Profile(
        curve="seren",
        lowest=40,
        highest=80,
        tensor_share=0.30,
        series=("dgx_a100_bert_inference",),
    ),
    "int8_generation": Profile(
        curve="seren",
        lowest=40,
        highest=80,
        tensor_share=0.05,
        integer_tensor_share=0.30,
        series=("dgx_a100_bert_inference",),
    ),
}


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a job's processes say about themselves; `project` None means they say nothing."""

    project: str | None
    activity: str | None = None
    model: str | None = None
    precision: str | None = None
    profile: str


_UNTAGGED: Final = Work(project=None, profile="experiment")
_PRETRAIN: Final = Work(
    project="atlas", activity="pretrain", model="atlas-base", precision="bf16", profile="pretrain"
)
_POD: Final = Work(
    project="cedar", activity="inference_deploy", model="cedar-chat", profile="generation"
)

#: Recorded user -> what the demo lets that user work on. Synthetic; users not named here follow
#: `_OTHERS` by their number.
_USERS: Final = {
    "u08": Work(
        project="atlas",
        activity="rl_update",
        model="atlas-rl",
        precision="bf16",
        profile="fine_tuning",
    ),
    "u10": Work(
        project="cedar",
        activity="eval_safety",
        model="cedar-chat",
        precision="int8",
        profile="int8_generation",
    ),
    "u13": _UNTAGGED,
    "u14": Work(
        project="atlas", activity="data_curation", model="atlas-filter", profile="generation"
    ),
    "u15": Work(
        project="birch",
        activity="ablation",
        model="birch-ft",
        precision="bf16",
        profile="experiment",
    ),
    "u21": Work(
        project="birch", activity="sft", model="birch-ft", precision="fp8", profile="fine_tuning"
    ),
    "u22": Work(
        project="birch", activity="sft", model="birch-ft", precision="bf16", profile="fine_tuning"
    ),
    "u26": _PRETRAIN,
    "u27": Work(
        project="atlas",
        activity="ablation",
        model="atlas-base",
        precision="bf16",
        profile="experiment",
    ),
    "u28": Work(
        project="atlas", activity="eval_capability", model="atlas-base", profile="generation"
    ),
    "u29": Work(
        project="atlas",
        activity="rl_rollout",
        model="atlas-rl",
        precision="bf16",
        profile="generation",
    ),
    "u30": Work(
        project="cedar", activity="eval_capability", model="cedar-chat", profile="generation"
    ),
    "u31": _UNTAGGED,
    "u32": Work(
        project="atlas",
        activity="sft",
        model="atlas-chat",
        precision="bf16",
        profile="fine_tuning",
    ),
}
_OTHERS: Final = (
    Work(
        project="birch", activity="sft", model="birch-ft", precision="bf16", profile="fine_tuning"
    ),
    Work(
        project="atlas",
        activity="ablation",
        model="atlas-base",
        precision="bf16",
        profile="experiment",
    ),
    Work(project="atlas", activity="scaling_validation", model="atlas-base", profile="experiment"),
)


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded job or pod with its GPUs; times in seconds from the scenario's start."""

    name: str  # "slurm-<row>" or the pod's name
    user: str
    work: Work
    run: str
    state: str  # how the record says it ended
    gpus: tuple[tuple[int, int], ...]  # (node, GPU)
    gpu_milli: int  # thousandths of each GPU; 1000 unless it shares
    began_seconds: int  # may be negative: it was running already
    start_seconds: int  # inside the scenario
    end_seconds: int


def place(recorded: Recorded, nodes: int, virtual_seconds: int) -> tuple[Placed, ...]:
    """Everything that runs in the scenario, sorted by start.

    The kept running jobs get room first; then those that start inside the recorded window, in
    recorded order; then the other running ones, those that end soonest first, as room remains.
    A scenario longer than the record repeats it; what runs past the record's end is cut there.
    """
    round_one = _place_jobs(recorded.jobs, nodes) + _place_pods(recorded.pods)
    placed = [
        _shifted(item, round_number, virtual_seconds)
        for round_number in range(-(-virtual_seconds // RECORDED_SECONDS))
        for item in round_one
        if item.start_seconds + round_number * RECORDED_SECONDS < virtual_seconds
    ]
    return tuple(sorted(placed, key=lambda item: (item.start_seconds, item.name)))


def _shifted(item: Placed, round_number: int, virtual_seconds: int) -> Placed:
    shift = round_number * RECORDED_SECONDS
    suffix = f"-again{round_number}" if round_number else ""
    return msgspec.structs.replace(
        item,
        name=item.name + suffix,
        run=item.run + suffix,
        began_seconds=item.began_seconds + shift,
        start_seconds=item.start_seconds + shift,
        end_seconds=min(item.end_seconds + shift, virtual_seconds),
    )


def _on_grid(seconds: int) -> int:
    return (seconds + GRID_SECONDS // 2) // GRID_SECONDS * GRID_SECONDS


class _Occupancy:
    """Which GPU is taken when; the first free GPUs of the emptiest node win."""

    def __init__(self, nodes: int) -> None:
        self.taken: dict[tuple[int, int], list[tuple[int, int]]] = {
            (node, gpu): [] for node in range(nodes) for gpu in range(GPUS_PER_NODE)
        }
        self.taken[SHARED_GPU].append((0, RECORDED_SECONDS))

    def _free(self, node: int, start: int, end: int) -> list[tuple[int, int]]:
        return [
            key
            for key, spans in self.taken.items()
            if key[0] == node and all(end <= a or b <= start for a, b in spans)
        ]

    def take(
        self, count: int, among: tuple[int, ...], start: int, end: int
    ) -> tuple[tuple[int, int], ...]:
        """`count` GPUs free over the whole span, on as few nodes as possible; () if none."""
        free = sorted((self._free(node, start, end) for node in among), key=lambda keys: -len(keys))
        if free and len(free[0]) >= count:
            chosen = free[0][:count]
        elif count > GPUS_PER_NODE:
            chosen = [key for keys in free for key in keys][:count]
        else:
            chosen = []
        if len(chosen) < count:
            return ()
        for key in chosen:
            self.taken[key].append((start, end))
        return tuple(sorted(chosen))


def _order(jobs: tuple[RecordedJob, ...]) -> list[RecordedJob]:
    starting = [job for job in jobs if job.start_seconds >= 0]
    running = [job for job in jobs if job.start_seconds < 0]
    kept = [job for row in KEPT_RUNNING for job in running if job.row == row]
    others = [job for job in running if job.row not in KEPT_RUNNING]
    return kept + starting + sorted(others, key=lambda job: (job.end_seconds, job.row))


def _place_jobs(jobs: tuple[RecordedJob, ...], nodes: int) -> list[Placed]:
    occupancy = _Occupancy(nodes)
    small = tuple(node for node in range(nodes) if node not in SPANNING_NODES)
    placed: list[Placed] = []
    attempts: dict[str, int] = {}
    for job in _order(jobs):
        start = max(0, _on_grid(job.start_seconds))
        end = min(RECORDED_SECONDS, _on_grid(job.end_seconds))
        among = SPANNING_NODES if job.gpus >= SPANNING_GPUS else small
        gpus = occupancy.take(job.gpus, among, start, end) if start < end else ()
        if not gpus:
            continue
        work = _work_of(job)
        attempts[job.user] = attempts.get(job.user, 0) + 1
        placed.append(
            Placed(
                name=f"slurm-{job.row}",
                user=job.user,
                work=work,
                run=f"{work.model or job.user}-{job.user}-a{attempts[job.user]}",
                state=job.state,
                gpus=gpus,
                gpu_milli=1000,
                began_seconds=_on_grid(job.start_seconds),
                start_seconds=start,
                end_seconds=end,
            )
        )
    return placed


def _work_of(job: RecordedJob) -> Work:
    if job.interactive:
        return _UNTAGGED
    work = _USERS.get(job.user) or _OTHERS[int(job.user[1:]) % len(_OTHERS)]
    if job.state == "FAILED" and work.project is not None and job.end_seconds < RECORDED_SECONDS:
        return msgspec.structs.replace(work, activity="failed_run")
    return work


def _place_pods(pods: tuple[RecordedPod, ...]) -> list[Placed]:
    """Pods in recorded order on the one shared GPU, as long as their parts fit together."""
    placed: list[Placed] = []
    for pod in pods:
        start, end = _on_grid(pod.start_seconds), _on_grid(pod.end_seconds)
        beside = sum(other.gpu_milli for other in placed if other.end_seconds > start)
        if start >= end or beside + pod.gpu_milli > 1000:
            continue
        placed.append(
            Placed(
                name=pod.name,
                user="pods",
                work=_POD,
                run=pod.name,
                state=pod.phase,
                gpus=(SHARED_GPU,),
                gpu_milli=pod.gpu_milli,
                began_seconds=start,
                start_seconds=start,
                end_seconds=end,
            )
        )
    return placed
