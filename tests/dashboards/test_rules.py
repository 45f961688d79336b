"""Alert rules: valid, unit-tested, and each with a text and a runbook that name the remedy."""

import re
import subprocess
from typing import Any, Final

import pytest
import yaml

from tests.dashboards.page_server import PAGES
from tests.dashboards.queries import FOLDER, alerts
from tests.programs import require_program

PROMTOOL_SECONDS: Final = 60.0
ALERTS: Final = alerts()


def _promtool(*arguments: str, text: str | None = None) -> None:
    done = subprocess.run(
        [require_program("promtool"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=PROMTOOL_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.server
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint=all", "--lint-fatal", "rules.yml"),
        ("check", "config", "--lint=all", "--lint-fatal", "prometheus.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    """Rules and configuration are valid, and every alert fires and stays quiet when it must."""
    *options, name = arguments
    _promtool(*options, str(FOLDER / name))


@pytest.mark.server
@pytest.mark.parametrize("name", ["agent", "collector"])
def test_golden_page_passes_the_metric_linter(name: str) -> None:
    """Names, units, types and help texts follow Prometheus' own rules."""
    _promtool("check", "metrics", text=(PAGES / f"{name}.prom").read_text(encoding="utf-8"))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_alert_has_severity_text_and_runbook(rule: dict[str, Any]) -> None:
    """Whoever is woken is told how bad it is, what it is, and where the remedy stands."""
    assert re.fullmatch(r"FlopLedger([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"(?m)^## (\w+)$", (FOLDER / path).read_text(encoding="utf-8"))
    assert anchor == rule["alert"].lower()
    assert rule["alert"] in headings


def test_each_alert_is_tested_firing_and_quiet() -> None:
    """The unit tests name every alert, with and without an expected alert."""
    content = yaml.safe_load((FOLDER / "rules_test.yml").read_text(encoding="utf-8"))
    tried: dict[str, set[bool]] = {rule["alert"]: set() for rule in ALERTS}
    for test in content["tests"]:
        for case in test["alert_rule_test"]:
            tried[case["alertname"]].add(bool(case["exp_alerts"]))
    assert all(outcomes == {True, False} for outcomes in tried.values()), tried


def test_every_runbook_section_belongs_to_an_alert() -> None:
    """A runbook of an alert that is gone misleads whoever reads it at night."""
    sections = [
        name
        for path in (FOLDER / "runbooks").glob("*.md")
        for name in re.findall(r"(?m)^## (\w+)$", path.read_text(encoding="utf-8"))
    ]
    assert sorted(sections) == sorted(rule["alert"] for rule in ALERTS)


def test_committed_ports_are_the_daemons_own() -> None:
    """The scrape configuration names the two ports that are fixed for ever."""
    content = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    ports = {
        scrape["job_name"]: {
            target.rpartition(":")[2]
            for group in scrape["static_configs"]
            for target in group["targets"]
        }
        for scrape in content["scrape_configs"]
    }
    assert ports == {"flopledger-collector": {"16180"}, "flopledger-agent": {"16181"}}
