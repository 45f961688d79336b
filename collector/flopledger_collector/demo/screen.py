"""What the demo shows in the terminal: one live table, or a line now and then where there is none.

It shows figures of the collector's own status document and computes nothing but their formatting.
"""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flopledger_core.units import NS_PER_SECOND, gpu_hours, kilowatt_hours, scientific

if TYPE_CHECKING:
    from rich.console import RenderableType

    from flopledger_collector.demo.stage import Stage

BAR_WIDTH: Final = 16
TIMES_FROM: Final = 10  # a thousand percent says less than ten times
INSTRUMENT_NAMES: Final[dict[str, str]] = {
    "eu-gpai-1e23": "EU 1e23",
    "eu-aia-51-2": "EU 1e25",
    "us-ca-sb53": "CA 1e26",
}
STYLES: Final = {"below": "green", "may_exceed": "yellow", "exceeds": "red"}


def render(stage: Stage, status: dict[str, Any] | None, elapsed: float, seconds: int) -> Group:
    """The whole screen at one moment."""
    now = datetime.fromtimestamp(stage.virtual_unix_ns() // NS_PER_SECOND, UTC)
    head = Text.assemble(
        ("FlopLedger demo", "bold"),
        "  simulated GPUs, real agents, one clock ",
        f"at {stage.clock.speed}x: {now:%H:%M} UTC",
    )
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        ProgressBar(total=seconds, completed=min(elapsed, seconds), width=40),
        f"{min(elapsed, seconds):.0f} of {seconds} s",
    )
    pages = Text(f"pages: {stage.url}/   metrics: {stage.url}/metrics")
    if status is None:
        waiting = Text("waiting for the first sealed minute ...")
        return Group(head, progress, pages, waiting)
    return Group(head, progress, pages, projects(status), thresholds(status), Text(footer(status)))


def projects(status: dict[str, Any]) -> RenderableType:
    """What each project used."""
    table = Table(title="metered so far (executed FLOP: low .. central .. high)")
    for column in ("project", "low", "central", "high", "GPU-hours", "kWh"):
        table.add_column(column, justify="left" if column == "project" else "right")
    for project in status["projects"]:
        flop, own = project["flop"], project["own"]
        table.add_row(
            project["project"]["project"],
            number(flop["low"]),
            number(flop["central"]),
            number(flop["high"]),
            gpu_hours(int(own["gpu_time_ms"]["central"])),
            kilowatt_hours(int(own["energy_mj"]["central"]), 2),
        )
    for account in ("unattributed", "idle"):
        usage = status[account]
        table.add_row(
            f"({account})",
            number(usage["flop"]["low"]),
            number(usage["flop"]["central"]),
            number(usage["flop"]["high"]),
            gpu_hours(int(usage["gpu_time_ms"]["central"])),
            kilowatt_hours(int(usage["energy_mj"]["central"]), 2),
            style="dim",
        )
    return table


def thresholds(status: dict[str, Any]) -> RenderableType:
    """How close each project is to each budget and each legal threshold."""
    table = Table(title="against thresholds (central value; bars are linear)")
    for column in ("project", "threshold", "limit", "reached", "", "verdict"):
        table.add_column(column)
    for project in status["projects"]:
        name = project["project"]["project"]
        for budget in project["budgets"]:
            limit = budget["limit"]
            shown = scientific(int(limit)) if budget["quantity"] == "flop" else kwh(limit)
            row(table, name, f"budget {budget['name']}", shown, budget["ratio"], budget["verdict"])
        for instrument in project["instruments"]:
            identifier: str = instrument["instrument"]
            label = INSTRUMENT_NAMES.get(identifier, identifier)
            row(table, name, label, number(instrument["threshold"]), instrument["ratio"],
                instrument["verdict"])  # fmt: skip
    return table


def row(  # noqa: PLR0913, PLR0917 (one cell an argument)
    table: Table, project: str, label: str, limit: str, ratio: dict[str, Any] | None, verdict: str
) -> None:
    """One threshold: its share as text, because a small bar shows nothing."""
    share = Fraction(0) if ratio is None else Fraction(ratio["central"])
    style = STYLES.get(verdict, "cyan")
    bar = ProgressBar(total=100, completed=min(100.0, float(share * 100)), width=BAR_WIDTH,
                      complete_style=style, finished_style=style)  # fmt: skip
    table.add_row(project, label, limit, percent(share), bar, Text(verdict, style=style))


def footer(status: dict[str, Any]) -> str:
    """What the figures cover."""
    position = status["position"]
    return (
        f"journal: {position['entries']} entries folded, "
        f"{position['provisional_entries']} more waiting; every batch is signed as simulated"
    )


def one_line(status: dict[str, Any] | None, elapsed: float) -> str:
    """The state of things where no terminal is attached."""
    if status is None:
        return f"{elapsed:4.0f} s  waiting for the first sealed minute"
    parts = [
        f"{project['project']['project']} {number(project['flop']['central'])} FLOP"
        for project in status["projects"]
    ]
    return f"{elapsed:4.0f} s  " + ", ".join(parts)


def number(text: str | None) -> str:
    """An exact amount for people; an open bound says so."""
    return "open" if text is None else scientific(int(text))


def kwh(text: str) -> str:
    """Millijoules as kWh."""
    return f"{kilowatt_hours(int(text), 0)} kWh"


def scientific_share(share: Fraction) -> str:
    """A tiny share in percent, two significant digits: 1.1e-4."""
    digits, _, exponent = f"{float(share * 100):.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def percent(share: Fraction) -> str:
    """A share as percent with three significant digits, however small."""
    if share == 0:
        return "0 %"
    if share >= TIMES_FROM:
        return f"{float(share):.3g} times"
    if share >= Fraction(1, 1000):
        return f"{float(share * 100):.3g} %"
    return f"{scientific_share(share)} %"
