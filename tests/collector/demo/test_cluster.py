"""The simulated cluster repeats exactly, keeps the record's times and shares only where it says."""

from __future__ import annotations

import re
import tomllib
from itertools import combinations

import pytest

from flopledger_collector.demo.cluster import DemoCluster, build_cluster
from flopledger_collector.demo.placement import GRID_SECONDS, SHARED_GPU, Placed
from flopledger_collector.demo.recorded import RECORDED_SECONDS, load_recorded
from flopledger_core.activities import ACTIVITIES
from flopledger_core.errors import InvalidInput


@pytest.fixture(scope="module", name="cluster")
def _cluster() -> DemoCluster:
    return build_cluster()


def test_the_same_arguments_give_the_same_bytes(cluster: DemoCluster) -> None:
    """Nothing depends on the clock, the machine or the order of calls."""
    assert build_cluster() == cluster
    assert build_cluster(seed=1).nodes[0].scenario != cluster.nodes[0].scenario
    assert build_cluster(seed=1).jobs == cluster.jobs


def test_two_nodes_of_each_model_with_eight_gpus(cluster: DemoCluster) -> None:
    """Names, models and sizes of the default cluster; every scenario is quick to read."""
    assert [(node.name, node.accelerator) for node in cluster.nodes] == [
        ("h100-01", "NVIDIA H100 80GB HBM3"),
        ("h100-02", "NVIDIA H100 80GB HBM3"),
        ("b200-01", "NVIDIA B200"),
        ("b200-02", "NVIDIA B200"),
    ]
    for node in cluster.nodes:
        assert len(node.scenario) < 700_000
        assert len(tomllib.loads(node.scenario)["gpus"]) == 8
        assert node.provenance == cluster.provenance


def test_every_gpu_is_scheduled_for_the_whole_time_in_steps_of_the_grid(
    cluster: DemoCluster,
) -> None:
    """Phases add up to the scenario's length, and every edge falls on a tick."""
    for node in cluster.nodes:
        for gpu in tomllib.loads(node.scenario)["gpus"]:
            lengths = [phase["seconds"] for phase in gpu["phases"]]
            assert sum(lengths) == cluster.virtual_seconds
            assert all(length % GRID_SECONDS == 0 for length in lengths)
            assert len(lengths) < 400


def test_power_and_activity_stay_within_the_hardware(cluster: DemoCluster) -> None:
    """No phase draws more than the limit or uses a pipe more than its SMs."""
    limits = {"NVIDIA H100 80GB HBM3": (700, 1980, 81_559), "NVIDIA B200": (1000, 1965, 183_359)}
    for node in cluster.nodes:
        watts, mhz, mib = limits[node.accelerator]
        for gpu in tomllib.loads(node.scenario)["gpus"]:
            for phase in (phase for phase in gpu["phases"] if "processes" in phase):
                assert gpu["idle_power_watts"] <= phase["power_watts"] <= watts
                assert phase["sm_clock_mhz"] <= mhz
                assert phase["memory_used_mib"] <= mib
                assert max(phase["pipes"].values()) <= phase["sm_active"] <= 1


def test_no_two_jobs_hold_a_gpu_except_the_shared_one(cluster: DemoCluster) -> None:
    """Placement never doubles a GPU; on the shared one the parts fit into one."""
    by_gpu: dict[tuple[int, int], list[Placed]] = {}
    for job in cluster.jobs:
        for key in job.gpus:
            by_gpu.setdefault(key, []).append(job)

    together = 0
    for key, jobs in by_gpu.items():
        for one, other in combinations(jobs, 2):
            if one.start_seconds < other.end_seconds and other.start_seconds < one.end_seconds:
                assert key == SHARED_GPU
                together += 1
    assert together > 0
    for job in by_gpu[SHARED_GPU]:
        beside = [o for o in by_gpu[SHARED_GPU] if o.start_seconds <= job.start_seconds]
        running = [o for o in beside if o.end_seconds > job.start_seconds]
        assert sum(o.gpu_milli for o in running) <= 1000


def test_jobs_keep_their_recorded_times(cluster: DemoCluster) -> None:
    """Starts and ends differ from the record by rounding to the grid only; none is compressed."""
    recorded = {f"slurm-{job.row}": job for job in load_recorded().jobs}

    for job in (job for job in cluster.jobs if job.name in recorded):
        source = recorded[job.name]
        assert len(job.gpus) == source.gpus
        assert abs(job.began_seconds - source.start_seconds) * 2 <= GRID_SECONDS
        assert job.start_seconds == max(0, job.began_seconds)
        end = min(source.end_seconds, cluster.virtual_seconds)
        assert abs(job.end_seconds - end) * 2 <= GRID_SECONDS


def test_every_job_that_starts_in_the_record_finds_room(cluster: DemoCluster) -> None:
    """Only jobs that were running before can be left out within the default scenario."""
    starting = {
        f"slurm-{job.row}"
        for job in load_recorded().jobs
        if 0 <= job.start_seconds < cluster.virtual_seconds
    }

    assert starting <= {job.name for job in cluster.jobs}


def test_the_schedule_shows_what_the_demo_is_for(cluster: DemoCluster) -> None:
    """Within two hours: three projects, a failure, untagged work, several precisions."""
    early = [job for job in cluster.jobs if job.start_seconds < 7200]

    assert {job.work.project for job in early} == {"atlas", "birch", "cedar", None}
    assert {job.work.precision for job in early} >= {"bf16", "fp8", "int8", None}
    assert {job.work.activity for job in early} >= {
        "pretrain",
        "failed_run",
        "ablation",
        "rl_rollout",
        "eval_capability",
        "sft",
        "inference_deploy",
    }
    assert all(job.work.activity in ACTIVITIES for job in cluster.jobs if job.work.project)
    spanning = [job for job in early if len({node for node, _ in job.gpus}) > 1]
    assert [job.work.activity for job in spanning] == ["failed_run", "pretrain"]
    busy = {key for job in early if job.start_seconds <= 600 < job.end_seconds for key in job.gpus}
    assert len(busy) < 32


def test_untagged_processes_say_nothing(cluster: DemoCluster) -> None:
    """Interactive sessions carry no tag at all; all others name project, activity and run."""
    untagged = {job.name for job in cluster.jobs if job.work.project is None}
    seen = 0
    for node in cluster.nodes:
        processes = tomllib.loads(node.scenario)["processes"]
        pids = [process["pid"] for process in processes.values()]
        assert len(set(pids)) == len(pids)
        assert min(pids) > 4_194_304
        for name, process in processes.items():
            if name.rpartition("-")[0] in untagged:
                seen += 1
                assert not any(key.startswith("FLOPLEDGER") for key in process["environ"])
            else:
                tags = {"FLOPLEDGER_PROJECT", "FLOPLEDGER_ACTIVITY", "FLOPLEDGER_RUN"}
                assert tags <= set(process["environ"])
    assert seen > 0


def test_more_nodes_take_jobs_that_found_no_room() -> None:
    """Further nodes run further recorded jobs; the first jobs stay what they were."""
    small, large = build_cluster(4), build_cluster(7)

    assert len(large.nodes) == 7
    assert len({node.name for node in large.nodes}) == 7
    assert {job.name for job in small.jobs} < {job.name for job in large.jobs}
    assert any(node >= 4 for job in large.jobs for node, _ in job.gpus)


def test_a_longer_scenario_repeats_the_record() -> None:
    """After six hours the schedule starts again under other names; the text stays small."""
    cluster = build_cluster(virtual_seconds=2 * RECORDED_SECONDS)

    again = [job for job in cluster.jobs if job.name.endswith("-again1")]
    assert min(job.start_seconds for job in again) == RECORDED_SECONDS
    assert max(job.end_seconds for job in cluster.jobs) == 2 * RECORDED_SECONDS
    assert all(len(node.scenario) < 700_000 for node in cluster.nodes)


def test_processes_are_born_when_their_job_began() -> None:
    """Birth times follow the virtual time at which the scenario starts."""
    cluster = build_cluster(start_unix_seconds=1_000_000_000)
    births = {
        float(text)
        for node in cluster.nodes
        for text in re.findall(r"create_time_unix = (\S+)", node.scenario)
    }

    assert births == {1_000_000_000 + job.began_seconds for job in cluster.jobs}


@pytest.mark.parametrize(
    ("nodes", "seconds"), [(3, 7200), (0, 7200), (65, 7200), (4, 0), (4, 10**9)]
)
def test_a_cluster_outside_the_limits_is_refused(nodes: int, seconds: int) -> None:
    """The sentence names the field and what is possible."""
    with pytest.raises(InvalidInput, match="use"):
        build_cluster(nodes, virtual_seconds=seconds)
