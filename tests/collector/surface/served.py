"""The HTTP surface over a ledger, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from litestar.testing import TestClient

from flopledger_collector.app import create_app
from flopledger_core.batch import MEDIA_TYPE

if TYPE_CHECKING:
    from flopledger_collector.handle import LedgerHandle

BATCHES = {"content-type": MEDIA_TYPE}


class Ticks:
    """A monotonic clock that a test moves; it passes a second at each reading by default."""

    def __init__(self, step_ns: int = 1_000_000_000) -> None:
        self.now_ns = 0
        self.step_ns = step_ns

    def __call__(self) -> int:
        """One reading."""
        self.now_ns += self.step_ns
        return self.now_ns


@contextmanager
def served(handle: LedgerHandle, ticks: Ticks | None = None) -> Iterator[TestClient[Any]]:
    """A client of the application over `handle`; every reading is fresh unless told otherwise."""
    app: Any = create_app(handle, monotonic_ns=ticks or Ticks())
    with TestClient(app) as client:
        yield client
