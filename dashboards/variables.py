"""The dashboard's variables: data source, project, policy.

All projects is a pattern, not a list, so that the query stays short with thousands of them.
"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model

from dashboards.panels import DATASOURCE

ALL_PROJECTS: Final = ".+"  # never an empty project: series without one belong to no project
DEFAULT_POLICY: Final = (
    "ec-cumulative"  # the scope of the EU's threshold; the first one where absent
)


def variables() -> list[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    """In the order shown."""
    source = (
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .description("The Prometheus that scrapes the collector and the agents.")
        .type("prometheus")
    )
    project = (
        _values("project", "label_values(flopledger_project_info, project)")
        .label("Project")
        .description("Projects known to the ledger.")
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(ALL_PROJECTS)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )
    policy = (
        _values("policy", 'label_values(flopledger_project_flop{project=~"$project"}, policy)')
        .label("Policy")
        .description("What counts. It chooses the view of the FLOP charts, not of verdicts.")
        .current(model.VariableOption(selected=True, text=DEFAULT_POLICY, value=DEFAULT_POLICY))
    )
    return [source, project, policy]


def _values(name: str, expr: str) -> dashboard.QueryVariable:
    """A variable whose options are the values of a label."""
    return (
        dashboard.QueryVariable(name)
        .datasource(DATASOURCE)
        .query({"query": expr, "refId": f"variable-{name}"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_CASE_INSENSITIVE_ASC)
    )
