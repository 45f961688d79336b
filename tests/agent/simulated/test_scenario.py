"""A scenario is read exactly, and a mistake in it is named where it stands."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from flopledger_agent.gpus.simulated.scenario import (
    FIRST_SIMULATED_PID,
    build_scenario,
    load_scenario,
    parse_scenario,
)
from flopledger_agent.gpus.simulated.tables import ScenarioError
from tests.agent.simulated.worlds import H100


def test_decimals_stay_exact() -> None:
    """0.98 is 98/100, not the double nearest to it."""
    phase = parse_scenario(H100).gpus[0].phases[0]
    assert phase.sm_active == Fraction(98, 100)
    assert phase.power_watts == Fraction(6125, 10)
    assert phase.duration_ns == 10_000_000_000


def test_any_tensor_defaults_to_the_sum_with_the_larger_fp64_pipe() -> None:
    """Hmma + imma + max(dmma, dfma), never dmma + dfma."""
    assert parse_scenario(H100).gpus[0].phases[0].pipes["any_tensor"] == Fraction(62, 100)


def test_hardware_facts_come_from_the_table_and_can_be_overridden() -> None:
    """The model resolves SMs, clocks and limits; the scenario has the last word."""
    assert parse_scenario(H100).gpus[0].sm_count == 132
    text = H100.replace('HBM3"', 'HBM3"\nsm_count = 60\npower_limit_watts = 500')
    gpu = parse_scenario(text).gpus[0]
    assert (gpu.sm_count, gpu.power_limit_watts, gpu.max_sm_clock_mhz) == (60, 500, 1980)


def test_gpm_follows_model_and_driver() -> None:
    """Cycle counters need R595, percentages R525, and both a Hopper or newer."""
    for version, expected in (("595.71.05", "cycles"), ("580.1.2", "util"), ("470.1.2", "none")):
        text = f'driver_version = "{version}"\n{H100}'
        assert parse_scenario(text).gpus[0].gpm == expected
    a100 = H100.replace("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    assert parse_scenario(a100).gpus[0].gpm == "none"


def test_identities_are_deterministic_and_differ_by_seed_and_index() -> None:
    """Two nodes with their own seeds never share a UUID."""
    two = '[[gpus]]\nmodel = "NVIDIA H100 80GB HBM3"\n' * 2
    first, again, other = (parse_scenario(f"seed = {s}\n{two}").gpus for s in (1, 1, 2))
    assert [gpu.uuid for gpu in first] == [gpu.uuid for gpu in again]
    assert len({gpu.uuid for gpu in (*first, *other)}) == 4


def test_made_up_processes_get_pids_that_no_real_process_has() -> None:
    """Linux gives out pids up to 4194304."""
    processes = parse_scenario(H100).processes
    assert processes["train-a"].pid == 4242
    assert processes["eval-b"].pid == FIRST_SIMULATED_PID + 1 > 4_194_304


def test_only_a_bare_pid_means_a_real_process() -> None:
    """A process that is described is simulated; one that only has a pid is the OS's."""
    text = f"{H100}\n[processes.real-c]\npid = 99\n"
    processes = parse_scenario(text).processes
    assert processes["real-c"].real
    assert not processes["train-a"].real
    assert not processes["eval-b"].real


def test_floats_of_a_mapping_mean_what_they_print() -> None:
    """A scenario built in Python with 0.1 is the one written 0.1 in TOML."""
    gpu = {"model": "NVIDIA H100 80GB HBM3", "phases": [{"seconds": 0.1, "sm_active": 0.3}]}
    phase = build_scenario({"gpus": [gpu]}).gpus[0].phases[0]
    assert (phase.duration_ns, phase.sm_active) == (100_000_000, Fraction(3, 10))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("sm_active = 0.98", "sm_active = 1.2", "gpus[0].phases[0].sm_active"),
        ("sm_active = 0.98", "sm_active = nan", "nan"),
        ("sm_active = 0.98", "sm_activ = 0.98", "gpus[0].phases[0].sm_activ"),
        ("sm_active = 0.98", "sm_active = true", "gpus[0].phases[0].sm_active"),
        ("hmma = 0.55", "hmma = 0.99", "gpus[0].phases[0].pipes.any_tensor"),
        ("hmma = 0.55", "qmma = 0.55", "gpus[0].phases[0].pipes.qmma"),
        ("seconds = 10.0", "seconds = 0", "gpus[0].phases[0].seconds"),
        ("seconds = 10.0", "seconds = 0.1234567891", "gpus[0].phases[0].seconds"),
        ("sm_clock_mhz = 1755", "sm_clock_mhz = 1755.5", "gpus[0].phases[0].sm_clock_mhz"),
        ('["train-a"]', '["train-z"]', "gpus[0].phases[0].processes"),
        ("train-a = 3", "train-z = 3", "gpus[0].phases[1].shares.train-z"),
        ("train-a = 3", "train-a = 0", "gpus[0].phases[1].shares.train-a"),
        ("pid = 4242", "pid = 0", "processes.train-a.pid"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA Z9", "gpus[0].model"),
        ("[[gpus]]", 'driver_version = "new"\n[[gpus]]', "driver_version"),
        ("[[gpus]]", "[[gpus]]\ngpm = 'all'", "gpus[0].gpm"),
        ("[[gpus.phases]]", "[[gpus.phases", "scenario"),
    ],
)
def test_a_mistake_is_named_with_field_and_remedy(old: str, new: str, field: str) -> None:
    """The error says where and what to do."""
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(H100.replace(old, new, 1))
    assert field in str(caught.value)
    assert caught.value.remedy


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    """No traceback of the operating system."""
    with pytest.raises(ScenarioError, match="scenario file"):
        load_scenario(tmp_path / "none.toml")


TRACED = """
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[trace]
file = "x.csv"
[processes.a]
[processes.b]
"""


def test_trace_rows_become_phases(tmp_path: Path) -> None:
    """A row holds until the GPU's next row; the last row of a GPU marks the end."""
    (tmp_path / "x.csv").write_text(
        "seconds,gpu,sm_clock_mhz,power_watts,sm_active,hmma,process\n"
        "0,0,1755,500.5,0.9,0.5,a\n"
        "1.5,1,1980,300,0.4,,a:3;b\n"
        "2,0,,,,,\n"
        "2.5,1,1980,300,0.4,,b\n"
    )
    path = tmp_path / "s.toml"
    path.write_text(TRACED)
    first, second = load_scenario(path).gpus
    assert [(p.duration_ns, p.sm_clock_mhz) for p in first.phases] == [(2_000_000_000, 1755)]
    assert first.phases[0].pipes["any_tensor"] == Fraction(1, 2)
    assert [p.duration_ns for p in second.phases] == [1_500_000_000, 1_000_000_000]
    assert second.phases[0].owners == ()
    assert second.phases[1].owners == (("a", Fraction(3, 4)), ("b", Fraction(1, 4)))


def test_trace_end_gives_the_last_row_its_length(tmp_path: Path) -> None:
    """With end_seconds every row is a phase."""
    (tmp_path / "x.csv").write_text("seconds,gpu,power_watts\n0,0,500\n1,0,400\n")
    text = TRACED.replace('"x.csv"', '"x.csv"\nend_seconds = 4')
    phases = parse_scenario(text, directory=tmp_path).gpus[0].phases
    assert [(p.duration_ns, p.power_watts) for p in phases] == [
        (1_000_000_000, Fraction(500)),
        (3_000_000_000, Fraction(400)),
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("seconds,gpu,watts\n", "trace column"),
        ("seconds,gpu\n0,7\n", "trace.line[2].gpu"),
        ("seconds,gpu\n1,0\n1,0\n", "trace.line[3].seconds"),
        ("seconds,gpu\n0,0,5\n", "trace.line[2]"),
        ("seconds,gpu,hmma\n0,0,x\n", "trace.line[2].hmma"),
    ],
)
def test_a_broken_trace_names_the_line(tmp_path: Path, rows: str, words: str) -> None:
    """Line and column are in the sentence."""
    (tmp_path / "x.csv").write_text(rows)
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(TRACED, directory=tmp_path)
    assert words in str(caught.value)
