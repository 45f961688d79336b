"""Builds the committed dashboard JSON: `python -m dashboards.build`, or `--check` to compare only.

The JSON is Grafana's Classic model, schema version 42, with a fixed uid and the data source as a
variable, so that the same file imports by hand and by file provisioning. The output depends on
nothing but this folder: no clock, no environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from dashboards import health, thresholds, totals
from dashboards.variables import variables

if TYPE_CHECKING:
    from dashboards.panels import AnyPanel

BUILT: Final = Path(__file__).parent / "built"
SCHEMA_VERSION: Final = 42  # the last version of the Classic model
UID: Final = "flopledger-thresholds"


def thresholds_dashboard() -> model.Dashboard:
    """The dashboard "FlopLedger: thresholds"."""
    builder = (
        dashboard.Dashboard("FlopLedger: thresholds")
        .uid(UID)
        .description("Running totals of compute, energy and GPU time against thresholds.")
        .tags(["flopledger"])
        .style("dark")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-24h", "now")
        .refresh("1m")
        .editable()
        .variables([*variables()])
    )
    sections: list[tuple[str, list[AnyPanel]]] = [
        ("Thresholds", [*thresholds.summary(), *thresholds.thresholds()]),
        ("Totals", totals.totals()),
        ("Owned by no project", totals.unowned()),
        ("Metering health: ledger", [*health.ledger(), *health.delivery()]),
        ("Metering health: GPUs", [*health.devices(), *health.sampling()]),
    ]
    for title, panels in sections:
        builder.with_row(dashboard.Row(title))
        for panel in panels:
            builder.with_panel(panel)
    # Collapsed, so that a fleet of projects costs no query until somebody opens one.
    each = dashboard.Row("Project $project").repeat("project").collapsed(collapsed=True)
    for panel in totals.one_project():
        each.with_panel(panel)
    built = builder.with_row(each).build()
    built.schema_version = SCHEMA_VERSION
    _number(built)
    return built


def render(built: model.Dashboard) -> str:
    """The committed form: sorted keys, so that a diff shows what changed and nothing else."""
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """Each committed file with what belongs in it."""
    return {BUILT / f"{UID}.json": render(thresholds_dashboard())}


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` say which differ."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m dashboards.build [--check]", file=sys.stderr)
        return 2
    stale = [
        path
        for path, text in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if arguments:
        for path in stale:
            print(f"{path.name} is stale; run: python -m dashboards.build", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files()[path], encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


def _number(built: model.Dashboard) -> None:
    """Give panels and rows stable ids in reading order, which links to single panels rely on."""
    number = 0
    for panel in built.panels or []:
        number += 1
        panel.id_val = number
        for inner in panel.panels if isinstance(panel, model.RowPanel) else ():
            number += 1
            inner.id_val = number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
