"""The systemd units are accepted by systemd itself, closed enough, and agree with the examples.

Nothing is installed: units are copied to a temporary folder with their program replaced by one that
exists, and systemd-analyze reads them there.
"""

import importlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from tests.programs import require_program

ROOT: Final = Path(__file__).resolve().parents[2]
UNITS: Final = ROOT / "deploy" / "systemd"
# Exposure as systemd scores it, 0 (closed) to 10 (open); an unhardened service scores 9.6. The
# agent must see devices and other users' processes, hence its higher limit.
EXPOSURE_MAX: Final = {"flopledger-agent.service": 2.0, "flopledger-collector.service": 1.3}
CONFIGS: Final = {
    "agent.toml": ("flopledger_agent.config", "AgentConfig"),
    "collector.toml": ("flopledger_collector.config", "CollectorConfig"),
}


def settings(name: str) -> dict[str, list[str]]:
    """Every setting of a unit or drop-in, repeated ones in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def installed_copy(name: str, folder: Path) -> Path:
    """The unit as it would be installed, its program replaced by one that exists here."""
    program = shutil.which("true")
    assert program is not None
    text = (UNITS / name).read_text(encoding="utf-8")
    unit = folder / name
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", text), encoding="utf-8")
    return unit


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; its answer may be a refusal."""
    program = require_program("systemd-analyze")
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.server
@pytest.mark.parametrize("name", sorted(EXPOSURE_MAX))
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    """No unknown setting, no misspelt value, nothing systemd warns about."""
    unit = installed_copy(name, tmp_path)

    done = analyze("verify", "--man=no", "--recursive-errors=no", str(unit))

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.server
@pytest.mark.parametrize("line", ["Restart=sometimes", "ProtectSystme=strict", "MemoryMax=lots"])
def test_systemd_refuses_a_misspelt_unit(line: str, tmp_path: Path) -> None:
    """The check above can fail."""
    unit = installed_copy("flopledger-agent.service", tmp_path)
    text = unit.read_text(encoding="utf-8").replace("[Service]\n", f"[Service]\n{line}\n")
    unit.write_text(text, encoding="utf-8")

    done = analyze("verify", "--man=no", "--recursive-errors=no", str(unit))

    assert done.stdout + done.stderr != ""


@pytest.mark.server
@pytest.mark.parametrize("name", sorted(EXPOSURE_MAX))
def test_the_sandbox_is_closed(name: str, tmp_path: Path) -> None:
    """The score systemd gives to the sandbox stays below the limit."""
    unit = installed_copy(name, tmp_path)
    threshold = round(EXPOSURE_MAX[name] * 10)

    done = analyze(
        "security", "--offline=true", "--no-pager", f"--threshold={threshold}", str(unit)
    )

    assert done.returncode == 0, done.stdout[-400:] + done.stderr


@pytest.mark.parametrize("name", sorted(EXPOSURE_MAX))
def test_every_setting_out_of_the_ordinary_says_why(name: str) -> None:
    """Switched-off protections stand below a comment."""
    lines = (UNITS / name).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.endswith("=no") or line.startswith("DeviceAllow"):
            paragraph = lines[:number]
            while paragraph and paragraph[-1] and not paragraph[-1].startswith("#"):
                paragraph.pop()
            assert paragraph, line
            assert paragraph[-1].startswith("#"), line


def test_the_optional_drop_in_grants_what_it_says() -> None:
    """Two capabilities and no more; the agent alone has none."""
    assert settings("agent-environ.conf")["AmbientCapabilities"] == [
        "CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"
    ]
    assert settings("flopledger-agent.service")["CapabilityBoundingSet"] == [""]
    assert settings("flopledger-collector.service")["CapabilityBoundingSet"] == [""]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_example_configuration_is_accepted(name: str) -> None:
    """The file an operator starts from is valid as it stands."""
    module, struct = CONFIGS[name]
    config: Any = getattr(importlib.import_module(module), struct)
    content = tomllib.loads((UNITS / name).read_text(encoding="utf-8"))

    msgspec.convert(content, config)


def test_examples_and_units_name_the_same_places() -> None:
    """State and sockets lie in the directories that the units create."""
    agent = tomllib.loads((UNITS / "agent.toml").read_text(encoding="utf-8"))
    unit = settings("flopledger-agent.service")
    assert agent["state"]["directory"] == f"/var/lib/{unit['StateDirectory'][0]}"
    assert Path(agent["tags"]["socket"]).parent == Path("/run") / unit["RuntimeDirectory"][0]
    collector = tomllib.loads((UNITS / "collector.toml").read_text(encoding="utf-8"))
    unit = settings("flopledger-collector.service")
    assert collector["state"]["directory"] == f"/var/lib/{unit['StateDirectory'][0]}"
    for name in EXPOSURE_MAX:
        user = settings(name)["User"][0]
        assert f"u {user} " in (UNITS / "flopledger.sysusers.conf").read_text(encoding="utf-8")


def test_the_units_start_what_the_package_installs() -> None:
    """ExecStart names a script that pyproject.toml defines, below the documented prefix."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in EXPOSURE_MAX:
        program = Path(settings(name)["ExecStart"][0].split()[0])
        assert program.parent == Path("/opt/flopledger/bin")
        assert program.name in scripts


def test_the_page_covers_the_whole_life() -> None:
    """Install, verify, upgrade, remove; every file of the folder; and where pynvml comes from."""
    page = (UNITS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^## (.+)$", page) == ["Install", "Verify", "Upgrade", "Remove"]
    for path in UNITS.iterdir():
        assert f"`{path.name}`" in page or path.name == "README.md"
    assert "`nvidia-ml-py`" in page
