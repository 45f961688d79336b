"""Every query that operations staff will run, read from the committed files.

Reads the built JSON and the rules, never the Python that made them, so that what is tested is what
is shipped.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

FOLDER: Final = Path(__file__).parents[2] / "dashboards"
METRIC: Final = re.compile(r"\bflopledger_[a-z0-9_]+")
_LABEL_VALUES: Final = re.compile(r"label_values\((?P<metric>.+), (?P<label>\w+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression with the place it was found at."""

    place: str
    expr: str
    instant: bool

    @property
    def metrics(self) -> frozenset[str]:
        """The metric names it reads."""
        return frozenset(METRIC.findall(self.expr))

    def filled(self, *, project: str, policy: str, rate_interval: str) -> str:
        """The expression with its variables replaced, as Grafana does before sending it."""
        expr = self.expr.replace("$__rate_interval", rate_interval)
        expr = expr.replace("$project", project).replace("$policy", policy)
        assert "$" not in expr, f"{self.place}: a variable that the dashboard does not have: {expr}"
        return expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One `label_values` variable."""

    name: str
    metric: str
    label: str


def dashboards() -> dict[str, dict[str, Any]]:
    """Each committed dashboard by file name."""
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((FOLDER / "built").glob("*.json"))
    }


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel, those of closed rows included, rows themselves left out."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def panel_queries() -> list[Query]:
    """Every query of every panel."""
    return [
        Query(
            place=f"{panel['title']} [{target['refId']}]",
            expr=target["expr"],
            instant=target["instant"],
        )
        for dashboard in dashboards().values()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def variables() -> list[Variable]:
    """Every query variable, read back from its `label_values(metric, label)`."""
    found: list[Variable] = []
    for dashboard in dashboards().values():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                match = _LABEL_VALUES.fullmatch(variable["query"]["query"])
                assert match, f"variable {variable['name']} is no label_values query"
                found.append(
                    Variable(name=variable["name"], metric=match["metric"], label=match["label"])
                )
    return found


def alerts() -> list[dict[str, Any]]:
    """Every alert rule."""
    content = yaml.safe_load((FOLDER / "rules.yml").read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"] if "alert" in rule]


def rule_queries() -> list[Query]:
    """The expression of every alert rule."""
    return [Query(place=rule["alert"], expr=rule["expr"], instant=True) for rule in alerts()]


def all_metrics() -> frozenset[str]:
    """Every metric name that any panel, variable or rule reads."""
    names = {name for query in [*panel_queries(), *rule_queries()] for name in query.metrics}
    return frozenset(names.union(*(METRIC.findall(variable.metric) for variable in variables())))
