"""Every metric that a dashboard or rule reads is one that a daemon shows."""

import re
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.dashboards.page_server import page
from tests.dashboards.queries import FOLDER, all_metrics

ROOT: Final = FOLDER.parent
SOURCES: Final = {
    "agent": ROOT / "agent" / "flopledger_agent" / "exposition.py",
    "collector": ROOT / "collector" / "flopledger_collector" / "exposition.py",
}
PROMETHEUS_OWN: Final = {"job", "instance"}  # labels that Prometheus sets on what it scrapes


def _families(name: str) -> list[Metric]:
    return list(text_string_to_metric_families(page(name)))


def _sample_names(name: str) -> set[str]:
    return {sample.name for family in _families(name) for sample in family.samples}


def _source(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path.name} of {path.parent.name} is not written yet")
    return path.read_text(encoding="utf-8")


def test_every_metric_read_is_on_a_golden_page() -> None:
    """No panel, variable or rule reads a metric that nobody shows."""
    assert all_metrics() <= _sample_names("agent") | _sample_names("collector")


@pytest.mark.parametrize("name", SOURCES)
def test_every_golden_metric_is_shown_by_its_daemon(name: str) -> None:
    """The golden pages hold no metric that the exposition module does not name."""
    shown = set(re.findall(r"\bflopledger_[a-z0-9_]+", _source(SOURCES[name])))
    for family in _families(name):
        # prometheus_client may be given a counter with or without its suffix
        assert {family.name, f"{family.name}_total"} & shown, family.name


@pytest.mark.parametrize("name", SOURCES)
def test_no_metric_carries_a_label_of_prometheus_own(name: str) -> None:
    """Prometheus would rename it to exported_job and break every query."""
    for family in _families(name):
        for sample in family.samples:
            assert not PROMETHEUS_OWN & sample.labels.keys(), sample.name


@pytest.mark.parametrize("name", SOURCES)
def test_quantities_that_can_fall_are_gauges(name: str) -> None:
    """Counters end in _total and only they do; ledger totals may fall and are gauges."""
    for family in _families(name):
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
