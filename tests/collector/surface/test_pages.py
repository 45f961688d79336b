"""The pages for people."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from flopledger_collector.handle import LedgerHandle
from tests.collector.ledgers import HOSTILE, rich_ledger
from tests.collector.opened import opened, opening, send
from tests.collector.sealing import StreamSealer
from tests.collector.surface.served import served

PAGES = (
    "/", "/projects/atlas", "/projects/birch", "/projects/empty", "/projects/stray",
    "/projects/atlas/statement", "/projects/birch/statement", "/projects/empty/statement",
)  # fmt: skip
VOID = {"meta", "link", "rect", "br", "img"}


class Elements(HTMLParser):
    """Every element of a page, and whether they are nested well."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more element."""
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Elements end in the order they began."""
        if tag not in VOID:
            assert self._open.pop() == tag

    def names(self) -> set[str]:
        """The elements in use."""
        return {tag for tag, _ in self.found}


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[LedgerHandle]:
    """The ledger with something of everything."""
    with rich_ledger(tmp_path) as ledger:
        yield ledger


@pytest.fixture
def client(handle: LedgerHandle) -> Iterator[TestClient[Any]]:
    """Its pages."""
    with served(handle) as found:
        yield found


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_whole_and_loads_nothing_foreign(client: TestClient[Any], path: str) -> None:
    """Pages are well-formed, carry no script, and use one style sheet of our own."""
    answer = client.get(path)
    assert answer.status_code == 200
    elements = Elements(answer.text)
    assert not elements.names() & {"script", "iframe", "img", "style", "form", "object"}
    linked = [attrs["href"] for tag, attrs in elements.found if tag == "link"]
    assert linked == ["/flopledger.css"]
    assert not [attrs for _, attrs in elements.found if "style" in attrs or "onclick" in attrs]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/flopledger.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize("path", ["/", "/projects/birch", "/projects/birch/statement"])
def test_hostile_text_is_only_text(client: TestClient[Any], path: str) -> None:
    """A title with markup is shown as what it is."""
    text = client.get(path).text
    assert HOSTILE.partition("|")[0] not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "a" not in {
        tag for tag, attrs in Elements(text).found if "javascript" in (attrs.get("href") or "")
    }


def test_only_the_overview_refreshes_itself(client: TestClient[Any]) -> None:
    """A person reading a statement is not interrupted."""
    refreshing = [
        path for path in PAGES if 'http-equiv="refresh" content="5"' in client.get(path).text
    ]
    assert refreshing == ["/"]


def test_a_bar_stands_for_each_instrument_and_budget(client: TestClient[Any]) -> None:
    """Three instruments, and two budgets for atlas, each with the true share in words."""
    page = client.get("/projects/atlas").text
    assert page.count("<svg") == 5
    assert "Budget compute" in page
    assert "EXCEEDED" in page
    assert "Bars are linear" in client.get("/").text
    assert "94 % [78 %, open]" in client.get("/projects/birch").text


def test_absent_figures_say_so(client: TestClient[Any]) -> None:
    """An unused project shows a dash, and a declared one has no energy of zero."""
    assert "No usage" in client.get("/projects/empty").text
    totals = client.get("/projects/birch").text.split("<dl")[1].split("</dl>")[0]
    assert totals.count("<dd>-</dd>") == 2


def test_a_project_with_slashes_has_a_page(tmp_path: Path) -> None:
    """An id is one segment of a path, whatever is in it."""
    with opened(tmp_path) as handle, served(handle) as client:
        handle.entries.post(opening("lab/model=3:a+b@c"))
        handle.folder.fold()
        overview = client.get("/").text
        assert '"/projects/lab%2Fmodel%3D3%3Aa%2Bb%40c"' in overview
        page = client.get("/projects/lab%2Fmodel%3D3%3Aa%2Bb%40c")
        assert page.status_code == 200
        assert "lab/model=3:a+b@c" in page.text
        assert client.get("/projects/lab%2Fmodel%3D3%3Aa%2Bb%40c/statement").status_code == 200


def test_an_unknown_project_is_a_page_with_the_remedy(client: TestClient[Any]) -> None:
    """A person is told what to do, with a 404."""
    answer = client.get("/projects/%3Cb%3Enope")
    assert answer.status_code == 404
    assert "flopledger project create" in answer.text
    assert "<b>nope" not in answer.text


def test_unfolded_entries_make_figures_provisional(handle: LedgerHandle) -> None:
    """Figures that do not hold everything yet say so."""
    with served(handle) as client:
        assert "Provisional" not in client.get("/").text
        send(handle, StreamSealer(3, node="node-3").minute(0))
        assert "1 journal entries are not in these figures yet" in client.get("/").text


def test_a_demonstration_says_so_on_every_page(tmp_path: Path) -> None:
    """A simulated ledger shows its banner even where it holds nothing."""
    with opened(tmp_path, "[ledger]\nsimulated = true\n") as handle, served(handle) as client:
        assert "Simulated data." in client.get("/").text
        handle.entries.post(opening("atlas"))
        handle.folder.fold()
        for path in ("/", "/projects/atlas", "/projects/atlas/statement"):
            assert "Simulated data." in client.get(path).text


def test_a_statement_page_honours_its_query(client: TestClient[Any]) -> None:
    """Period and policy are read as the API reads them; a wrong one is a sentence."""
    page = client.get("/projects/birch/statement?from=2025-11-25&policy=ec-training")
    assert "from 2025-11-25" in page.text
    assert "training compute in the narrow sense" in page.text
    wrong = client.get("/projects/birch/statement?from=yesterday")
    assert wrong.status_code == 400
    assert "write a UTC day as YYYY-MM-DD" in wrong.text
