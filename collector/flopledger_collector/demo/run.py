"""`flopledger demo`: a small cluster with simulated GPUs, metered by real agents, live.

It starts a collector and the agents as processes of their own, shows what the collector says, and
ends with the statements. Whatever ends it, no process and no temporary file stays behind; only a
demo that ran to its end leaves results, in the directory it names.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from flopledger_collector.demo import screen
from flopledger_collector.demo.processes import Family
from flopledger_collector.demo.stage import (
    post_opening_entries,
    provenance_toml,
    set_stage,
    write_agents,
)
from flopledger_collector.errors import CollectorError

if TYPE_CHECKING:
    from flopledger_collector.demo.stage import Stage

SECONDS_DEFAULT: Final = 120
START_SECONDS: Final = 60.0  # a loaded machine may be slow to import everything
SETTLE_SECONDS: Final = 20.0
REQUEST_SECONDS: Final = 10.0
REFRESH_SECONDS: Final = 1.0
LINE_SECONDS: Final = 10.0
PROJECTS: Final = ("atlas", "birch", "cedar")
INTERRUPTED: Final = 130


class DemoFailed(CollectorError):
    """The demonstration cannot go on."""


def run(seconds: int | None, nodes: int, output: Path, seed: int = 0) -> int:
    """Run the demo for `seconds`; the exit status."""
    if importlib.util.find_spec("flopledger_agent") is None or not _has_driver_bindings():
        raise DemoFailed("the agent is not installed: pip install 'flopledger[agent]'")
    console = Console()
    family = Family()
    directory = Path(tempfile.mkdtemp(prefix="flopledger-demo-"))
    previous = [(number, signal.signal(number, _interrupt))
                for number in (signal.SIGTERM, signal.SIGHUP)]  # fmt: skip
    try:
        _play(console, family, directory, seconds or SECONDS_DEFAULT, nodes, output, seed)
    except KeyboardInterrupt:
        console.print("\nstopped: no process and no file is left behind")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the clean-up
        family.stop_all()
        shutil.rmtree(directory, ignore_errors=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, handler in previous:
            signal.signal(number, handler)
    return 0


def _play(  # noqa: PLR0913, PLR0917 (the demo's whole cast)
    console: Console,
    family: Family,
    directory: Path,
    seconds: int,
    nodes: int,
    output: Path,
    seed: int,
) -> None:
    console.print(f"setting up a collector and {nodes} simulated 8-GPU nodes ...")
    stage = set_stage(directory, nodes, seconds, seed)
    post_opening_entries(stage)
    family.start(
        "collector", "flopledger_collector", ["serve", "--config", str(stage.collector_file)],
        directory / "collector.log",
    )  # fmt: skip
    _await_health(stage, family)
    write_agents(stage)
    agents = [
        family.start(node.name, "flopledger_agent",
                     ["run", "--config", str(stage.agent_file(node.name))],
                     directory / f"{node.name}.log")
        for node in stage.cluster.nodes
    ]  # fmt: skip
    _say_inputs(console, stage)
    began = time.monotonic()
    _show(console, stage, family, began, seconds)
    console.print("stopping the agents; each seals and delivers its open minute ...")
    family.stop(agents)
    status = _settled(stage)
    console.print(screen.render(stage, status, seconds, seconds))
    _save(stage, output)
    family.stop_all()
    shutil.copytree(directory / "collector", output / "ledger", dirs_exist_ok=True)
    console.print(Markdown((output / "statement-atlas.md").read_text(encoding="utf-8")))
    _say_where(console, output)


def _show(console: Console, stage: Stage, family: Family, began: float, seconds: int) -> None:
    """The live table, or a line every ten seconds."""
    pause = threading.Event()
    crossed = False
    said = began - LINE_SECONDS
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (elapsed := time.monotonic() - began) < seconds:
            family.check()
            status = _status(stage)
            if console.is_terminal:
                live.update(screen.render(stage, status, elapsed, seconds), refresh=True)
            elif time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                console.print(screen.one_line(status, elapsed))
            if status is not None and not crossed and _budget_exceeded(status):
                crossed = True
                live.console.print(
                    f"after {elapsed:.0f} s the central value of atlas passed its compute budget"
                )
            pause.wait(min(REFRESH_SECONDS, max(0.0, seconds - elapsed)))


def _budget_exceeded(status: dict[str, Any]) -> bool:
    """True when atlas's compute budget is passed by its central value."""
    for project in status["projects"]:
        for budget in project["budgets"]:
            if budget["name"] == "compute" and project["project"]["project"] == "atlas":
                return int(budget["used"]["central"]) > int(budget["limit"])
    return False


def _status(stage: Stage) -> dict[str, Any] | None:
    """The collector's status once a sealed minute is in it."""
    found: dict[str, Any] = json.loads(_get(f"{stage.url}/v1/status"))
    metered = any(int(project["own"]["gpu_time_ms"]["central"]) for project in found["projects"])
    return found if metered else None


def _settled(stage: Stage) -> dict[str, Any] | None:
    """The status when everything delivered is folded."""
    pause = threading.Event()
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        found: dict[str, Any] = json.loads(_get(f"{stage.url}/v1/status"))
        if found["position"]["provisional_entries"] == 0:
            return found
        pause.wait(0.2)
    raise DemoFailed("the collector did not fold what the agents delivered; run the demo again")


def _await_health(stage: Stage, family: Family) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        family.check()
        try:
            _get(f"{stage.url}/healthz")
        except (OSError, urllib.error.URLError):
            pause.wait(0.1)
        else:
            return
    raise DemoFailed(f"the collector did not answer at {stage.url} within {START_SECONDS:.0f} s")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=REQUEST_SECONDS) as response:  # noqa: S310 (ours)
        body: bytes = response.read()
        return body


def _save(stage: Stage, output: Path) -> None:
    """Statements, the inputs' provenance and the configuration, in a directory that is kept."""
    output.mkdir(parents=True, exist_ok=True)
    for project in PROJECTS:
        for form, ending in (("markdown", "md"), ("json", "json")):
            content = _get(f"{stage.url}/v1/projects/{project}/statement?format={form}")
            (output / f"statement-{project}.{ending}").write_bytes(content)
    (output / "collector.toml").write_text(
        f"# The ledger of a demonstration, to be read on the calendar's own time.\n"
        f'[state]\ndirectory = "{output.resolve()}/ledger"\n[ledger]\nsimulated = true\n'
        f"provenance = {provenance_toml()}\n",
        encoding="utf-8",
    )


def _say_inputs(console: Console, stage: Stage) -> None:
    for item in stage.cluster.provenance:
        console.print(f"  {item.kind}: {item.what}", highlight=False)


def _say_where(console: Console, output: Path) -> None:
    for line in (
        f"everything is in {output}/",
        f"  {output}/statement-atlas.md   the statement above",
        f"  {output}/statement-*.json     all three, with exact integers",
        f"  {output}/ledger/              the ledger itself; ask it:",
        f"      flopledger status --config {output}/collector.toml",
        "  dashboards/README.md   how to see these figures in Grafana",
    ):
        console.print(line, soft_wrap=True, highlight=False)


def _has_driver_bindings() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pynvml", "psutil"))


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def default_output() -> Path:
    """Where results go unless told otherwise."""
    return Path("flopledger-demo")
