"""The wire to the collector: plain HTTP requests with explicit timeouts, nothing remembered.

It only moves bytes: what an answer means is the shipper's business.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Final, Protocol, TypeVar

import msgspec

from flopledger_agent.errors import CollectorUnreachable
from flopledger_agent.shipper import Answers
from flopledger_core.batch import MEDIA_TYPE

T = TypeVar("T")
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024  # answers are about 300 bytes a batch


class LedgerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the collector says about its ledger."""

    ledger_id: str


class Collector(Protocol):
    """The far end, as the agent needs it."""

    def ledger_id(self) -> str:
        """The ledger that batches will be posted to; raises `CollectorUnreachable`."""
        ...

    def send(self, content: bytes) -> Answers:
        """Send batches and return the answers; raises `CollectorUnreachable`."""
        ...


class HttpCollector:
    """A collector behind a URL."""

    def __init__(self, url: str, timeout_seconds: float, agent: str) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._agent = agent
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ledger_id(self) -> str:
        """GET /v1/ledger."""
        return self._ask("/v1/ledger", None, LedgerInfo).ledger_id

    def send(self, content: bytes) -> Answers:
        """POST /v1/batches."""
        return self._ask("/v1/batches", content, Answers)

    def _ask(self, path: str, content: bytes | None, kind: type[T]) -> T:
        request = urllib.request.Request(  # noqa: S310 (the configuration allows http and https only)
            self._url + path,
            data=content,
            headers={"User-Agent": self._agent, "Content-Type": MEDIA_TYPE},
        )
        try:
            with self._opener.open(request, timeout=self._timeout_seconds) as response:
                body = response.read(ANSWER_BYTES_MAX)
        except urllib.error.HTTPError as error:
            detail = error.read(2048).decode("utf-8", "replace").strip()
            raise CollectorUnreachable(
                f"http_{error.code}", f"{self._url}{path} answered {error.code}: {detail}"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise CollectorUnreachable("unreachable", f"{self._url}{path}: {reason}") from error
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CollectorUnreachable(
                "not_a_collector", f"{self._url}{path} is no collector's answer: {error}"
            ) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry signed batches to somewhere nobody configured."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        """Refuse."""
        return
