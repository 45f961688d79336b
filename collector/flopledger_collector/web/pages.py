"""Renders the pages for people: values in, HTML out.

Templates escape everything, so a project's name is only ever text. A page needs nothing but one
style sheet of our own: no script, no font, no image from anywhere, and it says so in its policy.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from flopledger_collector.reports import figures
from flopledger_collector.reports.markdown import declared_cost, declared_flop, period_text
from flopledger_collector.reports.measured import (
    accelerator_of,
    doubtful,
    energy_cell,
    energy_label,
    methods,
    restatement_cautions,
    restatement_rows,
)
from flopledger_collector.reports.statement import (
    BOUNDARIES,
    ENERGY_BOUNDARY,
    NOTES,
    Statement,
    precision_of,
)
from flopledger_collector.silence import said
from flopledger_collector.usage import integer_operations
from flopledger_collector.web.bars import bar
from flopledger_core import units
from flopledger_core.records import FLAGS

if TYPE_CHECKING:
    from flopledger_collector.status import LedgerStatus, ProjectStatus

REFRESH_SECONDS: Final = 5
STYLE_NAME: Final = "flopledger.css"
# Nothing may be loaded but our style sheet, nothing may be sent anywhere.
SECURITY_HEADERS: Final[dict[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Pages:
    """The templates, loaded once."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=PackageLoader("flopledger_collector.web", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        words: dict[str, Any] = {
            "figures": figures,
            "units": units,
            "bar": bar,
            "integer_operations": integer_operations,
            "precision_of": precision_of,
            "accelerator_of": accelerator_of,
            "energy_cell": energy_cell,
            "energy_label": energy_label,
            "restatement_rows": restatement_rows,
            "restatement_cautions": restatement_cautions,
            "methods": methods,
            "doubtful": doubtful,
            "boundaries": BOUNDARIES,
            "flags": FLAGS,
            "said": said,
            "declared_flop": declared_flop,
            "declared_cost": declared_cost,
            "period_text": period_text,
            "boundary": ENERGY_BOUNDARY,
            "notes": NOTES,
            "segment": _segment,
        }
        self._environment.globals.update(words)
        folder = resources.files("flopledger_collector.web")
        self.style = (folder / STYLE_NAME).read_bytes()

    def ledger(self, status: LedgerStatus, *, simulated: bool) -> str:
        """Every project against its thresholds."""
        return self._render(
            "ledger.html",
            status=status,
            position=status.position,
            simulated=simulated or status.simulated,
            refresh_seconds=REFRESH_SECONDS,
        )

    def project(self, status: ProjectStatus, *, simulated: bool) -> str:
        """One project."""
        return self._render(
            "project.html",
            status=status,
            position=status.position,
            simulated=simulated or status.simulated,
        )

    def statement(self, statement: Statement, *, simulated: bool) -> str:
        """One project's statement."""
        return self._render(
            "statement.html",
            statement=statement,
            position=statement.position,
            simulated=simulated or statement.simulated,
        )

    def problem(self, sentence: str) -> str:
        """A page that could not be shown, and why."""
        return self._render("problem.html", sentence=sentence, position=None, simulated=False)

    def _render(self, name: str, **values: Any) -> str:  # noqa: ANN401 (whatever a template shows)
        return self._environment.get_template(name).render(**values)


def _segment(text: str) -> str:
    """Any text as one segment of a path."""
    return quote(text, safe="")
