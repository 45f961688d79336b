"""The artefact a user gets: one wheel, complete, and an agent's install that pulls nothing else.

The wheel is built once from a copy of the tree and installed into a fresh environment outside it,
so that what is tested is what is shipped and not the checkout.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.test_house import ROOT, tracked_files

PACKAGES: Final = ("flopledger_core", "flopledger_agent", "flopledger_collector")
BUILD_SECONDS_MAX: Final = 300  # on a busy two-core machine
INSTALL_SECONDS_MAX: Final = 600  # with a slow package index
PROGRAM_SECONDS_MAX: Final = 60
# Distributions of other rooms: none may come with the agent.
NOT_THE_AGENTS: Final = frozenset(
    "alembic grpcio jinja2 litestar opentelemetry-sdk psycopg psycopg-binary pytest sqlalchemy"
    " uvicorn".split()
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, timeout: float) -> str:
    """Run a program that must succeed; its output is the failure's text."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        timeout=timeout,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would commit."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        target = folder / "tree" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, ".", cwd=folder / "tree", timeout=BUILD_SECONDS_MAX)
    (built,) = folder.glob("flopledger-*.whl")
    return built


@pytest.fixture(scope="module")
def agent_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` folder of a fresh environment that holds the wheel with the agent's extra only."""
    folder = tmp_path_factory.mktemp("agent environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder, timeout=BUILD_SECONDS_MAX)
    binaries = folder / "bin"
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    run(*pip, *constraints, f"{wheel}[agent]", cwd=folder, timeout=INSTALL_SECONDS_MAX)
    yield binaries
    shutil.rmtree(folder)


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Code, tables, policies, templates, migrations and the demo's data: nothing is left behind."""
    inside = set(zipfile.ZipFile(wheel).namelist())

    wanted = {
        "/".join(path.relative_to(ROOT).parts[1:])
        for path in tracked_files()
        if path.relative_to(ROOT).parts[1:2] and path.relative_to(ROOT).parts[1] in PACKAGES
    }
    assert wanted - inside == set()
    assert {Path(name).suffix for name in wanted} >= {".py", ".toml", ".csv", ".typed"}
    assert "flopledger_core/data/accelerators.toml" in inside


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    """No tests, no benchmarks, no stray module: three packages, metadata and the licence."""
    names = zipfile.ZipFile(wheel).namelist()

    tops = {name.split("/")[0] for name in names}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tops == {*PACKAGES, f"flopledger-{version}.dist-info"}
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_an_agent_install_pulls_nothing_of_the_collector(agent_environment: Path) -> None:
    """The node gets the bindings and the page, and neither a database nor a web framework."""
    listed = run(
        agent_environment / "python",
        *("-m", "pip", "list", "--format=freeze"),
        cwd=agent_environment,
        timeout=PROGRAM_SECONDS_MAX,
    )

    names = {re.sub(r"[-_.]+", "-", n).lower() for n in re.findall(r"(?m)^([\w.-]+)==", listed)}
    assert {"flopledger", "msgspec", "nvidia-ml-py", "prometheus-client", "psutil"} <= names
    assert names & NOT_THE_AGENTS == set()


@pytest.mark.parametrize("command", ["", "run", "check", "tag", "spool"])
def test_the_installed_agent_answers(agent_environment: Path, command: str) -> None:
    """Every command of the agent starts outside the checkout and explains itself."""
    program = agent_environment / "flopledger-agent"

    said = run(
        program, *command.split(), "--help", cwd=agent_environment, timeout=PROGRAM_SECONDS_MAX
    )

    assert said.startswith("Usage: flopledger-agent")


def test_every_agent_module_imports_from_the_wheel(agent_environment: Path) -> None:
    """With the agent's extra alone, every module of core and agent can be imported."""
    code = (
        "import importlib, pkgutil, flopledger_agent, flopledger_core\n"
        "for package in (flopledger_core, flopledger_agent):\n"
        "    assert 'site-packages' in package.__file__, package.__file__\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not found.name.endswith('__main__'):\n"
        "            importlib.import_module(found.name)\n"
    )

    run(
        *(agent_environment / "python", "-I", "-c", code),
        cwd=agent_environment,
        timeout=PROGRAM_SECONDS_MAX,
    )
