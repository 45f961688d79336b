"""The reading part of the HTTP API, /metrics and /healthz: what programs ask.

Documents are those of `reports/json_form.py`, the same that the command line prints. A project id
may contain slashes; in a path it is percent-encoded as one segment.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final
from urllib.parse import unquote

from litestar import HttpMethod, Request, Response, get, route
from litestar.params import PathParameter, QueryParameter

from flopledger_collector.exposition import CONTENT_TYPE
from flopledger_collector.reports import json_form
from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.statement import Period, Statement
from flopledger_collector.web.surface import Surface
from flopledger_core import __version__
from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.units import MS_PER_SECOND

AnyRequest = Request[Any, Any, Any]
ProjectId = Annotated[str, PathParameter(description="Project id, percent-encoded as one segment.")]
Policies = Annotated[
    list[str] | None,
    QueryParameter(description="Policy ids; the adopted ones by default.", required=False),
]
FirstDay = Annotated[
    str | None,
    QueryParameter(name="from", description="First UTC day, YYYY-MM-DD.", required=False),
]
EndDay = Annotated[
    str | None,
    QueryParameter(name="to", description="First UTC day after it, YYYY-MM-DD.", required=False),
]
POLICIES_ASKED_MAX: Final = 32  # more than exist; a longer list is not a question
MARKDOWN: Final = "text/markdown"  # the server adds the character set
JSON: Final = "application/json"
READ_METHODS: Final = (HttpMethod.GET, HttpMethod.HEAD)  # probes ask with HEAD
FORMS: Final = ("json", "markdown")


def surface_of(request: AnyRequest) -> Surface:
    """The state behind the handlers."""
    surface: Surface = request.app.state.surface
    return surface


def _json(document: json_form.Document) -> Response[bytes]:
    return Response(json_form.encode(document), media_type=JSON)


@get("/v1/ledger", sync_to_thread=True, summary="The ledger and how it is doing")
def get_ledger(request: AnyRequest) -> Response[bytes]:
    """Position, streams, disputed records, conflicts."""
    handle = surface_of(request).handle
    health = handle.ledger.health()
    return _json(
        {
            "ledger_id": handle.ledger_id,  # what an agent binds its stream to
            "position": json_form.position_document(handle.ledger.position()),
            "version": __version__,
            "simulated": health.simulated,
            "journal_entries": health.journal_entries,
            "fold_lag_entries": health.fold_lag_entries,
            "clear_records": health.clear_records,
            "disputed_records": health.disputed_records,
            "gap_time_ms": str(health.gap_time_ms),
            "audit_counts": health.audit_counts,
            "streams": [
                {
                    "stream_id": stream.stream_id,
                    "node": stream.node,
                    "cluster": stream.cluster,
                    "author": stream.author,
                    "simulated": stream.simulated,
                    "head_sequence": stream.head_sequence,
                    "last_received_unix_ms": stream.last_received_unix_ms,
                    "last_window_end_unix_ms": stream.last_window_end_unix_ms,
                }
                for stream in health.streams
            ],
        }
    )


@get("/v1/status", sync_to_thread=True, summary="Every project against its thresholds")
def get_status(request: AnyRequest) -> Response[bytes]:
    """All projects, the idle and the unattributed account."""
    return _json(json_form.ledger_document(surface_of(request).ledger_status()))


@get("/v1/projects", sync_to_thread=True, summary="Every known project")
def get_projects(request: AnyRequest) -> Response[bytes]:
    """Opened projects, and those that nobody opened."""
    projects = surface_of(request).handle.ledger.projects()
    return _json({"projects": [json_form.project_document(info) for info in projects]})


@get("/v1/projects/{project_id:str}", sync_to_thread=True, summary="One project's status")
def get_project(request: AnyRequest, project_id: ProjectId) -> Response[bytes]:
    """Totals, policies, instruments and budgets of one project."""
    status = surface_of(request).project_status(unquote(project_id))
    return _json(json_form.status_document(status))


@get(
    "/v1/projects/{project_id:str}/statement",
    sync_to_thread=True,
    summary="One project's itemised statement",
)
def get_statement(  # noqa: PLR0913, PLR0917 - each is a parameter of the query
    request: AnyRequest,
    project_id: ProjectId,
    form: Annotated[
        str, QueryParameter(name="format", description="Written as json or markdown.")
    ] = "json",
    policy: Policies = None,
    first_day: FirstDay = None,
    end_day: EndDay = None,
) -> Response[bytes]:
    """The statement as JSON or Markdown."""
    if form not in FORMS:
        raise UnknownName("format", form, f"use one of: {', '.join(FORMS)}")
    statement = asked_statement(request, project_id, policy, first_day, end_day)
    if form == "markdown":
        return Response(statement_markdown(statement).encode(), media_type=MARKDOWN)
    return _json(json_form.statement_document(statement))


def asked_statement(
    request: AnyRequest,
    project_id: str,
    policy: list[str] | None,
    first_day: str | None,
    end_day: str | None,
) -> Statement:
    """The statement that a query asks for; the page and the API read one query in one way."""
    policies = tuple(policy or ())
    if len(policies) > POLICIES_ASKED_MAX:
        raise InvalidInput("policy", len(policies), f"ask for at most {POLICIES_ASKED_MAX}")
    period = Period(
        start_unix_ms=day_unix_ms("from", first_day), end_unix_ms=day_unix_ms("to", end_day)
    )
    return surface_of(request).statement(unquote(project_id), policies, period)


@route("/metrics", http_method=READ_METHODS, sync_to_thread=True, summary="Prometheus page")
def get_metrics(request: AnyRequest) -> Response[bytes]:
    """The ledger's folded state in Prometheus's text format."""
    return Response(surface_of(request).exposition.page(), media_type=CONTENT_TYPE)


@route(
    "/healthz",
    http_method=READ_METHODS,
    sync_to_thread=True,
    summary="Whether the collector can do its work",
)
def get_health(request: AnyRequest) -> Response[bytes]:
    """200 while the database answers and folding goes well, else 503."""
    handle = surface_of(request).handle
    position = handle.ledger.position()
    failure = handle.folder.failure
    document: json_form.Document = {
        "status": "ok" if failure is None else "failing",
        "journal_entries": position.entries + position.provisional_entries,
        "fold_lag_entries": position.provisional_entries,
        "fold_error": None if failure is None else str(failure),
    }
    status_code = 200 if failure is None else 503
    return Response(json_form.encode(document), media_type=JSON, status_code=status_code)


def day_unix_ms(field: str, text: str | None) -> int | None:
    """The first millisecond of a UTC day written YYYY-MM-DD; None for none."""
    if text is None:
        return None
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise InvalidInput(field, text, "write a UTC day as YYYY-MM-DD") from error
    seconds = int(day.timestamp())
    if seconds < 0:
        raise InvalidInput(field, text, "name a day from 1970 on")
    return seconds * MS_PER_SECOND


HANDLERS: Final = (
    get_ledger,
    get_status,
    get_projects,
    get_project,
    get_statement,
    get_metrics,
    get_health,
)
