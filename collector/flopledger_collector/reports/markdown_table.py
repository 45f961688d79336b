"""Markdown's own pieces: escaped text, tables, lists.

Every text that came from outside is escaped, so that a hostile project name or method stays text
in a table cell.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from flopledger_collector.reports import figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>#|~&])")


def text(value: str | None) -> str:
    """Text from outside as one line that Markdown leaves alone; a dash for none."""
    return _SPECIAL.sub(r"\\\1", figures.one_line(value))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table with its titles, and an empty line after it."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def bullets(items: Iterable[str]) -> Iterator[str]:
    """A list, and an empty line after it."""
    for item in items:
        yield f"- {item}"
    yield ""
