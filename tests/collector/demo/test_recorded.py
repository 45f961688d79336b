"""The demo's extracts are what their README says they are."""

from __future__ import annotations

import csv
import gzip
from importlib import resources

from flopledger_collector.demo.recorded import (
    BIN_SECONDS,
    PROVENANCE,
    RECORDED_SECONDS,
    PowerSeries,
    load_recorded,
)


def test_the_extracts_hold_the_recorded_rows() -> None:
    """Counts named in the README, so that a changed extract is noticed."""
    recorded = load_recorded()

    assert (len(recorded.jobs), len(recorded.pods)) == (67, 19)
    assert {name: len(series.nodes) for name, series in recorded.power.items()} == {
        "gpt3_512gpu": 4,
        "llama2_70b_lora_8gpu": 1,
        "resnet_8gpu": 1,
        "bert_8gpu": 1,
        "dgx_a100_bert_inference": 1,
    }
    assert sorted(recorded.activity) == [
        "kalos gpu_memory_used_pct",
        "kalos sm_active_pct",
        "seren gpu_memory_used_pct",
        "seren sm_active_pct",
    ]


def test_every_job_overlaps_the_recorded_window() -> None:
    """No job outside the six hours, and none that ends before it starts."""
    recorded = load_recorded()

    for job in recorded.jobs:
        assert job.start_seconds < job.end_seconds
        assert job.start_seconds < RECORDED_SECONDS
        assert job.end_seconds > 0


def test_the_failed_run_and_the_good_one_are_in_the_record() -> None:
    """The demo's story is recorded: 16 GPUs fail after 496 s, start again and complete."""
    first, second = [job for job in load_recorded().jobs if job.gpus == 16]

    assert (first.state, first.end_seconds - first.start_seconds) == ("FAILED", 496)
    assert (second.state, second.user) == ("COMPLETED", first.user)


def test_a_position_in_a_power_series_is_a_time() -> None:
    """Every mean stands at its own offset, and a bin without a reading is None, not closed up."""
    data = resources.files("flopledger_collector.demo").joinpath("data", "power.csv.gz")
    rows = list(csv.DictReader(gzip.decompress(data.read_bytes()).decode().splitlines()))
    power = load_recorded().power
    nodes = {(name, str(i)): n for name in power for i, n in enumerate(power[name].nodes, start=1)}

    for row in rows:
        watts = nodes[row["series"], row["node"]][int(row["offset_s"]) // BIN_SECONDS]
        assert watts == int(row["mean_watts"])
    present = [watts for bins in nodes.values() for watts in bins if watts is not None]
    assert len(present) == len(rows) < sum(map(len, nodes.values()))


def test_a_bin_without_a_reading_takes_no_part_in_a_mean() -> None:
    """Absent is not zero: the others decide, else the last reading before."""
    series = PowerSeries(name="x", nodes=((100, None, 300),), lowest_watts=0, highest_watts=400)

    assert series.fraction(0, 0, 30) == 0.5
    assert series.fraction(0, 10, 10) == 0.25


def test_power_is_a_share_of_the_recorded_span() -> None:
    """Means lie within the lowest and highest reading; the series repeats."""
    for series in load_recorded().power.values():
        length = 10 * len(series.nodes[0])
        shares = [series.fraction(0, offset, 30) for offset in range(0, length, 30)]
        assert all(0 <= share <= 1 for share in shares)
        assert series.fraction(0, 0, 10) == series.fraction(len(series.nodes), length, 10)


def test_a_level_between_two_percentiles_lies_on_a_straight_line() -> None:
    """Recorded points come back exactly; outside, the ends hold."""
    curve = load_recorded().activity["kalos sm_active_pct"]

    assert curve.at(80) == 76.947
    assert curve.at(-1) == curve.values[0]
    assert curve.at(101) == curve.values[-1] == 100
    assert min(curve.at(80), curve.at(81)) <= curve.at(80.5) <= curve.at(81)


def test_every_input_names_its_kind_source_and_licence() -> None:
    """The list that demo and statement print is complete, and admits what is invented."""
    assert {entry.kind for entry in PROVENANCE} == {"recorded", "synthetic"}
    for entry in PROVENANCE:
        assert all((entry.what, entry.source, entry.licence, entry.changes))
