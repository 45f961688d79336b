"""The committed dashboard is what the Python builds, and has a form that every Grafana imports."""

import re
import subprocess
import sys
from typing import Any, Final, get_args

import pytest

from dashboards import build
from flopledger_collector.instruments.evaluation import Verdict
from tests.dashboards.queries import FOLDER, dashboards, panel_queries, panels, variables

PANEL_TYPES: Final = {"bargauge", "stat", "state-timeline", "table", "timeseries"}
BUILD_SECONDS: Final = 120.0
GRID_COLUMNS: Final = 24
ALL: Final = dashboards()
EVERY_PANEL: Final = [panel for one in ALL.values() for panel in panels(one)]


def test_committed_json_is_what_the_python_builds() -> None:
    """Regenerating changes nothing, and no built file lacks its Python."""
    assert {path.name for path in build.files()} == set(ALL)
    for path, text in build.files().items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m dashboards.build"


def test_build_check_agrees_with_the_committed_json() -> None:
    """The command of the README exits 0 on the committed files, and 2 on misuse."""
    command = [sys.executable, "-m", "dashboards.build"]
    for argument, status in (("--check", 0), ("--chekc", 2)):
        done = subprocess.run(
            [*command, argument], cwd=FOLDER.parent, timeout=BUILD_SECONDS, check=False
        )
        assert done.returncode == status


@pytest.mark.parametrize("name", ALL)
def test_dashboard_imports_by_hand_and_by_file(name: str) -> None:
    """Classic model, fixed uid, no inputs, no server's ids, data source as a variable."""
    dashboard = ALL[name]
    assert dashboard["schemaVersion"] in {41, 42}
    assert dashboard["uid"] == name.removesuffix(".json")
    assert not {"__inputs", "__requires", "__elements", "id"} & dashboard.keys()
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "project", "policy"]
    assert dashboard["templating"]["list"][0]["type"] == "datasource"


@pytest.mark.parametrize("panel", EVERY_PANEL, ids=lambda panel: str(panel["title"]))
def test_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    """An allowed type, a title, a description that is a sentence, a unit, and our data source."""
    assert panel["type"] in PANEL_TYPES
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert len(panel["description"]) > len(panel["title"])
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"], "a panel without a query"
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("name", ALL)
def test_panels_have_ids_titles_and_places_of_their_own(name: str) -> None:
    """No two panels share an id or a title, none leaves the grid, none covers another."""
    everything = [*panels(ALL[name]), *(p for p in ALL[name]["panels"] if p["type"] == "row")]
    for key in ("id", "title"):
        values = [panel[key] for panel in everything]
        assert len(set(values)) == len(values)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_COLUMNS
        own = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} covers another panel"
        cells |= own


def test_every_query_uses_only_variables_that_exist() -> None:
    """A misspelt variable would reach Prometheus as text."""
    known = {"__rate_interval", *(variable.name for variable in variables())}
    for query in panel_queries():
        used = set(re.findall(r"\$\{?(\w+)", query.expr))
        assert used <= known, query.place


def test_counters_are_read_as_rates_over_grafanas_interval() -> None:
    """A bare counter draws its resets; a fixed interval breaks with another scrape interval."""
    for query in panel_queries():
        for counter in re.findall(r"\w+_(?:total|sum|count)\b", query.expr):
            assert re.search(
                rf"rate\({counter}(\{{[^}}]*\}})?\[\$__rate_interval\]\)", query.expr
            ), query.place


def test_every_verdict_of_the_collector_has_a_colour() -> None:
    """A verdict that the timeline does not know would leave a hole that reads as no data."""
    timeline = next(panel for panel in EVERY_PANEL if panel["type"] == "state-timeline")
    drawn = set(re.findall(r'state="(\w+)"', timeline["targets"][0]["expr"]))
    assert drawn == set(get_args(Verdict))
    assert len(timeline["fieldConfig"]["defaults"]["mappings"][0]["options"]) == len(drawn)
