"""Programs that know nothing of FlopLedger run unchanged on the simulated driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 60
SOURCE_ROOTS = [str(Path(__file__).parents[3] / room) for room in ("core", "agent")]

SCENARIO = """
cuda_version = "13.2"
[[gpus]]
model = "NVIDIA H100 80GB HBM3"
[[gpus.phases]]
seconds = 36000
sm_clock_mhz = 1755
power_watts = 612.5
sm_active = 0.98
dram_active = 0.4
pipes = {{ hmma = 0.55 }}
memory_used_mib = 60000
processes = ["train"]
[[gpus]]
model = "NVIDIA A100-SXM4-80GB"
[processes.train]
pid = {pid}
"""

NVITOP = """
import json
from nvitop import Device, libnvml
from nvitop.api.libnvml import UNKNOWN_FUNCTIONS
import time
time.sleep(0.05)  # 3 s of the scenario: the first readings are those of its first instant
rows = []
for device in Device.all():
    with device.oneshot():
        snapshot = device.as_snapshot()
        processes = device.processes()
    rows.append({
        "name": snapshot.name, "uuid": snapshot.uuid, "bus_id": snapshot.bus_id,
        "power": snapshot.power_usage, "limit": snapshot.power_limit,
        "memory_used": snapshot.memory_used, "gpu": snapshot.gpu_utilization,
        "sm_clock": snapshot.clock_infos.sm, "mig": snapshot.mig_mode,
        "persistence": snapshot.persistence_mode,
        "ecc": snapshot.total_volatile_uncorrected_ecc_errors,
        "capability": list(device.cuda_compute_capability()),
        "processes": [
            {"pid": p.pid, "memory": p.gpu_memory(), "sm": p.gpu_sm_utilization(), "type": p.type,
             "command": p.command()}
            for p in processes.values()
        ],
    })
print(json.dumps({
    "driver": Device.driver_version(), "cuda": Device.cuda_driver_version(), "devices": rows,
    "unknown": sorted(map(str, UNKNOWN_FUNCTIONS)),
}))
"""


def _run(scenario: Path, *program: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *("-m", "flopledger_agent.gpus.simulated", "--scenario", str(scenario), "--speed", "60"),
        "--",
        *program,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*SOURCE_ROOTS, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env=environment,
    )


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    """Two GPUs; the process on the first is this test's own, so that it exists."""
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO.format(pid=os.getpid()))
    return path


def test_gpustat_shows_the_scenario(scenario: Path) -> None:
    """`gpustat --json`, started as a module with its own arguments."""
    done = _run(scenario, "-m", "gpustat", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["driver_version"] == "595.71.05"
    busy, idle = shown["gpus"]
    assert busy["name"] == "NVIDIA H100 80GB HBM3"
    assert (busy["power.draw"], busy["enforced.power.limit"]) == (612, 700)
    assert busy["utilization.gpu"] == 100
    assert busy["memory.used"] == 60_000
    (process,) = busy["processes"]
    assert (process["pid"], process["gpu_memory_usage"]) == (os.getpid(), 60_000)
    assert (idle["name"], idle["power.draw"], idle["processes"]) == (
        "NVIDIA A100-SXM4-80GB",
        75,
        [],
    )


def test_nvitop_shows_the_scenario(scenario: Path, tmp_path: Path) -> None:
    """Nvitop's API in a script file; not one NVML function it wants is missing."""
    script = tmp_path / "show.py"
    script.write_text(NVITOP)
    done = _run(scenario, str(script))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["driver"], shown["cuda"], shown["unknown"]) == ("595.71.05", "13.2", [])
    busy, idle = shown["devices"]
    assert busy["bus_id"] == "00000000:10:00.0"
    assert (busy["power"], busy["limit"], busy["gpu"]) == (612_500, 700_000, 100)
    assert (busy["memory_used"], busy["sm_clock"]) == (60_000 * 1024**2, 1755)
    assert (busy["capability"], idle["capability"]) == ([9, 0], [8, 0])
    (process,) = busy["processes"]
    assert (process["pid"], process["memory"]) == (os.getpid(), 60_000 * 1024**2)
    assert (process["sm"], process["type"]) == (98, "C")
    assert (idle["power"], idle["processes"], idle["sm_clock"]) == (75_000, [], 345)


def test_nvitop_once_prints_a_page(scenario: Path) -> None:
    """The program itself, not only its API."""
    done = _run(scenario, "-m", "nvitop", "--once", "--ascii")
    assert done.returncode == 0, done.stderr
    assert "612W / 700W" in done.stdout
    assert "595.71.05" in done.stdout


def test_a_programs_exit_status_is_passed_on(scenario: Path, tmp_path: Path) -> None:
    """Arguments reach the program as its own, and what it returns is what the caller sees."""
    script = tmp_path / "leave.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['--a', 'b']\nsys.exit(7)\n")
    assert _run(scenario, str(script), "--a", "b").returncode == 7


def test_misuse_is_one_sentence(scenario: Path, tmp_path: Path) -> None:
    """A wrong scenario or no program: status 2 and no traceback."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[[gpus]]\nmodel = 5\n")
    for done in (_run(broken, "x.py"), _run(scenario)):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    assert "gpus[0].model" in _run(broken, "x.py").stderr
