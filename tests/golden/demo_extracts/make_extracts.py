"""Cuts the demo's committed extracts out of the full recorded data, so that anyone can redo it.

Usage: `python make_extracts.py DATA_DIRECTORY OUTPUT_DIRECTORY`. The data directory holds the
folders `jobs`, `telemetry` and `training` described in the README beside this file. The script
only cuts, shifts time origins, renumbers users and averages power over ten seconds; it never
invents a value. The same input gives the same bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

WINDOW_START_UNIX: Final = (
    1_615_357_560  # 2021-03-10T06:26:00Z: a failed 16-GPU run, then the good one
)
WINDOW_SECONDS: Final = 21_600
POD_WINDOW_START: Final = 11_838_113  # trace seconds: two fractional pods overlap for two hours
BIN_SECONDS: Final = 10

SLURM_FILE: Final = "jobs/mit_supercloud_slurm_2021-03-08_2021-03-17.csv.gz"
PODS_FILE: Final = "jobs/alibaba_openb_pods_gpuspec33_rows0-5499.csv.gz"
PERCENTILES_FILE: Final = "telemetry/distributions/acme_percentiles.csv"
SMC: Final = "training/mlperf_training_v4.0_smc"
TRAINING_SERIES: Final = (  # (series, file, nodes kept)
    (
        "gpt3_512gpu",
        f"{SMC}/gpt3_512gpu_5848-240517221859825376616_2_power.csv.gz",
        ("1", "2", "3", "4"),
    ),
    (
        "llama2_70b_lora_8gpu",
        f"{SMC}/llama2_70b_lora_8gpu_4951-240509201759121728742_1_power.csv.gz",
        ("0",),
    ),
    ("resnet_8gpu", f"{SMC}/resnet_8gpu_5759-240517075402311260012_2_power.csv.gz", ("1",)),
    ("bert_8gpu", f"{SMC}/bert_8gpu_5119-240510190348838227199_06_power.csv.gz", ("0",)),
)
INFERENCE_SERIES: Final = "dgx_a100_bert_inference"
INFERENCE_FILE: Final = "telemetry/series/mlperf_v1.0_dgx-a100_8xA100-80GB_maxq_node_power.csv.gz"
INFERENCE_SEGMENT: Final = "bert-99.9/Offline/run_1"


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """The data rows of a CSV file, gzipped or not."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)


def write(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """One CSV file, gzipped when the name says so, with no time stamp inside."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data = text.getvalue().encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=9, mtime=0)
    path.write_bytes(data)


def gpu_count(tres: str) -> int:
    """GPUs of a Slurm TRES string by id: 1001 is gpu:tesla, 1002 gpu:volta."""
    counts = dict(item.split("=", 1) for item in tres.split(",") if "=" in item)
    return int(counts.get("1001", 0)) + int(counts.get("1002", 0))


def cut_jobs(data: Path, out: Path) -> None:
    """Every GPU job that overlaps the window, its times relative to the window's start."""
    kept = []
    for number, row in enumerate(rows_of(data / SLURM_FILE)):
        gpus = gpu_count(row["tres_alloc"])
        start = int(row["time_start"]) - WINDOW_START_UNIX
        end = int(row["time_end"]) - WINDOW_START_UNIX
        if gpus and start < WINDOW_SECONDS and end > 0:
            kept.append((start, number, row, gpus, end))
    kept.sort(key=lambda item: item[:2])
    users: dict[str, str] = {}
    for _, _, row, _, _ in kept:
        users.setdefault(row["id_user"], f"u{len(users) + 1:02d}")
    write(
        out / "jobs.csv",
        ("row", "user", "gpus", "nodes", "start_s", "end_s", "state", "job_type"),
        [
            (n, users[r["id_user"]], gpus, r["nodes_alloc"], start, end, r["state"], r["job_type"])
            for start, n, r, gpus, end in kept
        ],
    )


def cut_pods(data: Path, out: Path) -> None:
    """Every pod that asked for a part of one GPU and lived inside the pod window."""
    kept: list[tuple[object, ...]] = []
    for number, row in enumerate(rows_of(data / PODS_FILE)):
        if not row["scheduled_time"] or row["num_gpu"] != "1" or int(row["gpu_milli"]) >= 1000:
            continue
        start = int(row["scheduled_time"]) - POD_WINDOW_START
        end = int(row["deletion_time"]) - POD_WINDOW_START
        if start >= 0 and end <= WINDOW_SECONDS:
            kept.append((start, number, row["name"], row["gpu_milli"], end, row["pod_phase"]))
    kept.sort(key=lambda item: (item[0], item[1]))
    write(
        out / "pods.csv",
        ("row", "name", "gpu_milli", "start_s", "end_s", "phase"),
        [(n, name, milli, start, end, phase) for start, n, name, milli, end, phase in kept],
    )


def training_readings(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Per node, (time_ms, DC watts): the power after the node's supplies, nearest to the GPUs."""
    readings: dict[str, list[tuple[int, int]]] = {}
    for row in rows_of(path):
        if row["dc_watts"]:
            node = readings.setdefault(row["node"], [])
            node.append((int(row["time_ms"]), int(row["dc_watts"])))
    return readings


def inference_readings(path: Path) -> list[tuple[int, int]]:
    """(time_ms since midnight, AC watts rounded) of one benchmark segment within one day."""
    readings = []
    for row in rows_of(path):
        if row["segment"] == INFERENCE_SEGMENT:
            hours, minutes, seconds = row["t"].split("T")[1].split(":")
            time_ms = (int(hours) * 60 + int(minutes)) * 60_000 + round(float(seconds) * 1000)
            readings.append((time_ms, round(float(row["watts"]))))
    return readings


def binned(readings: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset seconds, mean watts) per ten-second bin; a bin without a reading is left out."""
    first = readings[0][0]
    bins: dict[int, list[int]] = {}
    for time_ms, watts in readings:
        bins.setdefault((time_ms - first) // (BIN_SECONDS * 1000), []).append(watts)
    return [
        (index * BIN_SECONDS, round(sum(values) / len(values)))
        for index, values in sorted(bins.items())
    ]


def cut_power(data: Path, out: Path) -> None:
    """Ten-second means of node power, with the lowest and highest single reading per series."""
    rows: list[tuple[object, ...]] = []
    spans: list[tuple[object, ...]] = []
    for series, file, nodes in TRAINING_SERIES:
        readings = training_readings(data / file)
        watts = [value for node in readings.values() for _, value in node]
        spans.append((series, "dc", min(watts), max(watts), len(readings)))
        for place, node in enumerate(nodes, start=1):
            rows += [(series, place, at, mean) for at, mean in binned(readings[node])]
    everything = [round(float(row["watts"])) for row in rows_of(data / INFERENCE_FILE)]
    spans.append((INFERENCE_SERIES, "ac", min(everything), max(everything), 1))
    segment = inference_readings(data / INFERENCE_FILE)
    rows += [(INFERENCE_SERIES, 1, at, mean) for at, mean in binned(segment)]
    write(out / "power.csv.gz", ("series", "node", "offset_s", "mean_watts"), rows)
    write(
        out / "power_spans.csv",
        ("series", "boundary", "lowest_watts", "highest_watts", "nodes_read"),
        spans,
    )


def cut_activity(data: Path, out: Path) -> None:
    """SM activity and memory percentiles of the two LLM clusters, values untouched."""
    kept = ("sm_active_pct", "gpu_memory_used_pct")
    write(
        out / "activity.csv",
        ("cluster", "metric", "percentile", "value"),
        [
            (row["cluster"], row["metric"], row["percentile"], row["value"])
            for row in rows_of(data / PERCENTILES_FILE)
            if row["cluster"] in ("seren", "kalos") and row["metric"] in kept
        ],
    )


def main(arguments: list[str]) -> int:
    """Cut everything; 2 when not given exactly the two directories."""
    if len(arguments) != 2:
        sys.stderr.write("usage: make_extracts.py DATA_DIRECTORY OUTPUT_DIRECTORY\n")
        return 2
    data, out = Path(arguments[0]), Path(arguments[1])
    out.mkdir(parents=True, exist_ok=True)
    cut_jobs(data, out)
    cut_pods(data, out)
    cut_power(data, out)
    cut_activity(data, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
