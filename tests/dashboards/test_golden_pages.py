"""Every query of dashboard and rules against a real Prometheus that scrapes the golden pages.

The pages are small enough to read, so a query that finds nothing here is wrong, whatever a
running daemon happens to show.
"""

from collections.abc import Iterator

import pytest

from tests.dashboards.page_server import serving
from tests.dashboards.prometheus_server import (
    Prometheus,
    answers,
    running_prometheus,
    wait_for,
)
from tests.dashboards.queries import Query, Variable, panel_queries, rule_queries, variables

pytestmark = pytest.mark.server

DATA_SECONDS = 30.0


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server that has scraped both pages."""
    folder = tmp_path_factory.mktemp("prometheus")
    with serving("agent") as agent, serving("collector") as collector:
        targets = {"flopledger-agent": [agent], "flopledger-collector": [collector]}
        with running_prometheus(folder, targets) as server:
            wait_for("targets and rules up", lambda: not server.unhealthy(), DATA_SECONDS)
            yield server


@pytest.mark.parametrize("project", [".+", "(atlas|borealis)"], ids=["all", "two"])
@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: str(query.place))
def test_panel_query_returns_data(prometheus: Prometheus, query: Query, project: str) -> None:
    """With all projects and with some, as Grafana fills the variables in."""
    wait_for(
        query.place,
        lambda: answers(prometheus, query, project=project, policy="ec-cumulative"),
        DATA_SECONDS,
    )


@pytest.mark.parametrize("query", rule_queries(), ids=lambda query: str(query.place))
def test_rule_finds_what_the_pages_hold(prometheus: Prometheus, query: Query) -> None:
    """The pages hold a project near its threshold and a node that fell silent."""
    wait_for(
        query.place,
        lambda: answers(prometheus, query, project="", policy=""),
        DATA_SECONDS,
    )


@pytest.mark.parametrize("variable", variables(), ids=lambda variable: str(variable.name))
def test_variable_offers_choices(prometheus: Prometheus, variable: Variable) -> None:
    """Each variable finds values for its label."""
    metric = variable.metric.replace("$project", ".+")
    assert wait_for(variable.name, lambda: prometheus.label_values(variable, metric), DATA_SECONDS)


def test_state_of_each_pair_is_one_number(prometheus: Prometheus) -> None:
    """The timeline's encoding gives every project and instrument exactly one verdict."""
    (query,) = (one for one in panel_queries() if one.place.startswith("Verdict"))
    expr = query.filled(project=".+", policy="", rate_interval="")
    found = {
        (one["metric"]["project"], one["metric"]["instrument"]): one["value"][1]
        for one in prometheus.instant(expr)
    }
    assert found == {("atlas", "eu-aia-51-2"): "1", ("borealis", "eu-aia-51-2"): "3"}
