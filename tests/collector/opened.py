"""A ledger opened in a temporary directory, and the two things most tests ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_collector.config import CollectorConfig, parse_config
from flopledger_collector.handle import LedgerHandle, open_ledger
from flopledger_collector.ingest import IngestRequest
from flopledger_core.records import ProjectOpened
from tests.collector.sealing import START_UNIX_MS, TestClock

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_collector.ingest import Answer
    from flopledger_collector.ledger.totals import Totals

DAYS_LATER_UNIX_MS = START_UNIX_MS + 30 * 86_400_000  # after every record the tests seal


def config(directory: Path, more: str = "") -> CollectorConfig:
    """A configuration that keeps everything in one directory; `more` is further TOML."""
    return parse_config(f'{more}\n[state]\ndirectory = "{directory}"\n')


def opened(directory: Path, more: str = "", clock: TestClock | None = None) -> LedgerHandle:
    """An open ledger that trusts loopback on first use."""
    return open_ledger(config(directory, more), clock or TestClock(DAYS_LATER_UNIX_MS))


def send(handle: LedgerHandle, *batches: bytes, loopback: bool = True) -> tuple[Answer, ...]:
    """The answers to one request with these batches."""
    request = IngestRequest(content=b"".join(batches), peer_is_loopback=loopback)
    (answers,) = handle.writer.submit([request])
    return answers


def outcomes(handle: LedgerHandle, *batches: bytes, loopback: bool = True) -> list[str]:
    """Only the outcomes."""
    return [answer.outcome for answer in send(handle, *batches, loopback=loopback)]


def folded(handle: LedgerHandle, project: str | None = None) -> Totals:
    """Totals with everything folded."""
    handle.folder.fold()
    return handle.ledger.totals(project)


def amounts(handle: LedgerHandle) -> bytes:
    """Everything the totals say but for when they were asked: equal means unchanged."""
    totals = folded(handle)
    position = msgspec.structs.replace(totals.position, at_unix_ms=0)
    return msgspec.json.encode(msgspec.structs.replace(totals, position=position))


def opening(
    project: str = "atlas", title: str | None = None, at: int = START_UNIX_MS
) -> ProjectOpened:
    """A person opens a project."""
    return ProjectOpened(
        project=project, entity="example-lab", title=title, at_unix_ms=at, author="ops"
    )
