"""What commands print: tables for people, JSON for programs.

Text from outside is printed as one line of plain characters, so that nothing in a ledger can move
a terminal's cursor or pretend to be another line. Tables fit 80 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, ParamSpec, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flopledger_collector.reports import figures, json_form

P = ParamSpec("P")
R = TypeVar("R")

STYLES: Final[dict[str, str]] = {
    "exceeds": "bold red",
    "may_exceed": "yellow",
    "undetermined": "yellow",
}


def format_option(*forms: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`--format`: a table for people unless something else is asked for."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(forms or ("table", "json")),
        default=(forms or ("table",))[0],
        show_default=True,
        help="How it is printed; json is stable.",
    )


def print_json(document: json_form.Document | list[json_form.Document]) -> None:
    """A JSON document on standard output."""
    click.echo(json_form.encode(document), nl=False)


def print_line(text: str) -> None:
    """One plain line on standard output."""
    click.echo(figures.one_line(text))


def print_gap() -> None:
    """An empty line."""
    click.echo()


def print_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Iterable[str] = (),
    title: str | None = None,
) -> None:
    """A table no wider than the terminal; titles named in `right` are columns of figures."""
    figures_columns = set(right)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    if title is not None:
        table.title = Text(figures.one_line(title), style="bold")
    for name in titles:
        table.add_column(
            Text(name), justify="right" if name in figures_columns else "left", overflow="fold"
        )
    for row in rows:
        cells = [c if isinstance(c, Text) else Text(figures.one_line(c)) for c in row]
        table.add_row(*cells)
    Console(soft_wrap=False, highlight=False).print(table)


def verdict(word: str) -> Text:
    """A verdict, coloured where the terminal can."""
    return Text(figures.VERDICT_WORDS[word], style=STYLES.get(word, ""))
