"""The pages' handlers: `/`, `/projects/{id}`, `/projects/{id}/statement` and the style sheet."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

from litestar import Request, Response, get

from flopledger_collector.web.api import (
    EndDay,
    FirstDay,
    Policies,
    ProjectId,
    asked_statement,
    surface_of,
)
from flopledger_collector.web.pages import SECURITY_HEADERS, STYLE_NAME

AnyRequest = Request[Any, Any, Any]
HTML: Final = "text/html"  # the server adds the character set
STYLE_AGE_SECONDS: Final = 3600


def html(text: str, status_code: int = 200) -> Response[bytes]:
    """A page with its policy."""
    return Response(
        text.encode(), media_type=HTML, headers=SECURITY_HEADERS, status_code=status_code
    )


@get("/", sync_to_thread=True, include_in_schema=False)
def ledger_page(request: AnyRequest) -> Response[bytes]:
    """Every project against its thresholds."""
    surface = surface_of(request)
    return html(surface.pages.ledger(surface.ledger_status(), simulated=surface.handle.simulated))


@get("/projects/{project_id:str}", sync_to_thread=True, include_in_schema=False)
def project_page(request: AnyRequest, project_id: ProjectId) -> Response[bytes]:
    """One project."""
    surface = surface_of(request)
    status = surface.project_status(unquote(project_id))
    return html(surface.pages.project(status, simulated=surface.handle.simulated))


@get("/projects/{project_id:str}/statement", sync_to_thread=True, include_in_schema=False)
def statement_page(
    request: AnyRequest,
    project_id: ProjectId,
    policy: Policies = None,
    first_day: FirstDay = None,
    end_day: EndDay = None,
) -> Response[bytes]:
    """One project's statement, of the policies and the period that the query names."""
    surface = surface_of(request)
    statement = asked_statement(request, project_id, policy, first_day, end_day)
    return html(surface.pages.statement(statement, simulated=surface.handle.simulated))


@get(f"/{STYLE_NAME}", sync_to_thread=False, include_in_schema=False)
def style(request: AnyRequest) -> Response[bytes]:
    """The style sheet."""
    return Response(
        surface_of(request).pages.style,
        media_type="text/css",
        headers={"Cache-Control": f"max-age={STYLE_AGE_SECONDS}"},
    )


HANDLERS: Final = (ledger_page, project_page, statement_page, style)
