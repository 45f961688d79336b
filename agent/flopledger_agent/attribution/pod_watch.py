"""Objects of this node, kept current by one watch on the API server, in a thread of its own.

List once, then watch from there: the server tells every change, so nothing is polled. A watch ends
by itself after some minutes and is resumed where it stopped; when the server no longer knows that
place (410) the list is read again. While the server is away the last known objects stay, and the
view says since when and why.
"""

from __future__ import annotations

import logging
import random
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import msgspec

from flopledger_agent.attribution.api_server import GONE, ApiTrouble, Cut, get
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_agent.attribution.api_server import ApiServer
    from flopledger_agent.clocks import Clock

T = TypeVar("T")

PAGE_OBJECTS: Final = 500
OBJECTS_MAX: Final = 4096  # kubelet runs some hundreds of pods at most
LIST_BYTES_MAX: Final = 32 * 1024 * 1024  # one page; a pod is some ten kilobytes
LINE_BYTES_MAX: Final = 8 * 1024 * 1024  # an object is 1.5 MiB at most in the server's own store
# A watch is asked to end after a time between these, so that a fleet's do not end together.
WATCH_SECONDS_MIN: Final = 300
WATCH_SECONDS_MAX: Final = 600
WATCH_GRACE_SECONDS: Final = 30
BRIEF_SECONDS: Final = 60  # a watch that ends sooner without a word is a failure
BRIEF_WATCHES_MAX: Final = 3  # in a row, before people are told
BACKOFF_SECONDS_MAX: Final = 120.0

log = logging.getLogger("flopledger.agent")


class WatchView(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """The objects as the API server told them last."""

    objects: Mapping[str, T]
    synced: bool = False  # a whole list was read at least once
    as_of_boot_ns: int | None = None  # when the server last said anything
    sequence: int = 0  # counts changes
    failure: str | None = None  # why it is not current; None: it is
    overfull: bool = False  # there were more objects than are kept


class Watched(Protocol[T]):
    """Something that has the current objects at hand."""

    def latest(self) -> WatchView[T]:
        """What is known now; returns at once."""
        ...

    def close(self) -> None:
        """Ask nothing more."""
        ...


class WatchTarget(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What is watched, and how an object's bytes become what is kept of it.

    `read` gives a key and what is kept; None for an object that is none of ours. It raises
    msgspec.DecodeError for bytes that are no such object.
    """

    path: str  # /api/v1/pods
    field_selector: str
    read: Callable[[bytes], tuple[str, T] | None]
    entries_max: int = OBJECTS_MAX  # kept; more are said, not kept


class _ListMeta(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    resource_version: str = ""
    continue_: str | None = msgspec.field(default=None, name="continue")


class _List(msgspec.Struct, frozen=True, kw_only=True):
    metadata: _ListMeta
    items: tuple[msgspec.Raw, ...] | None = ()


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct, frozen=True, kw_only=True):
    metadata: _ListMeta


class _Status(msgspec.Struct, frozen=True, kw_only=True):
    code: int | None = None
    reason: str | None = None


class Watch(Generic[T]):
    """One list and watch; implements `Watched`."""

    def __init__(
        self,
        server: ApiServer,
        target: WatchTarget[T],
        clock: Clock,
        *,
        chance: random.Random | None = None,
    ) -> None:
        self._server = server
        self._target = target
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311 (spreads a fleet, keeps no secret)
        self._view: WatchView[T] = WatchView(objects={})
        self._version: str | None = None  # where to resume; None: list first
        self._fresh = False  # the next list must not come from a cache that may lag
        self._failures = 0
        self._heard = False  # the present watch has told something
        self._brief_watches = 0  # in a row
        self._cut = Cut()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def latest(self) -> WatchView[T]:
        """What is known now; the first call begins to watch, in a thread."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._work, name="pods", daemon=True)
            self._thread.start()
        return self._view

    def close(self) -> None:
        """Ask nothing more; a request under way is cut and not waited for."""
        self._stop.set()
        self._cut.close()

    def run_once(self) -> None:
        """List where that is needed, then watch until the server or the deadline ends it.

        Errors: ApiTrouble.
        """
        if self._version is None:
            self._list()
        version = self._version
        assert version is not None, "a list tells where to watch from"
        seconds = self._chance.randint(WATCH_SECONDS_MIN, WATCH_SECONDS_MAX)
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        limit = float(seconds + WATCH_GRACE_SECONDS)
        try:
            with get(self._server, self._url(query), limit, self._cut) as answer:
                if self._brief_watches <= BRIEF_WATCHES_MAX:
                    self._healthy()
                for line in answer.lines(LINE_BYTES_MAX):
                    if self._stop.is_set():
                        return
                    self._event(line)
        except ApiTrouble as error:
            if error.status == GONE:
                self._relist()
                return
            raise

    # --- the list ---------------------------------------------------------------------------------

    def _list(self) -> None:
        objects: dict[str, T] = {}
        token: str | None = None
        overfull = False
        while True:
            query = {"limit": str(PAGE_OBJECTS)}
            if token:
                query["continue"] = token
            elif not self._fresh:
                query["resourceVersion"] = "0"  # from the server's memory, which spares its store
            page = self._page(query)
            for item in page.items or ():
                found = self._read(bytes(item))
                if found is None:
                    continue
                if len(objects) >= self._target.entries_max:
                    overfull = True
                    break
                objects[found[0]] = found[1]
            token = page.metadata.continue_ or None
            if token is None or overfull:
                break
        if not page.metadata.resource_version:
            raise self._nonsense("a list without a resourceVersion")
        self._version, self._fresh = page.metadata.resource_version, False
        self._publish(objects, overfull=overfull)

    def _page(self, query: dict[str, str]) -> _List:
        limit = self._server.timeout_seconds * 3
        try:
            with get(self._server, self._url(query), limit, self._cut) as answer:
                body = answer.body(LIST_BYTES_MAX)
        except ApiTrouble as error:
            if error.status == GONE:  # the pages' own snapshot is gone
                self._fresh = True
            raise
        try:
            return msgspec.json.decode(body, type=_List)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._nonsense("no list") from error

    # --- the watch --------------------------------------------------------------------------------

    def _event(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._nonsense("a line that is no event") from error
        content = bytes(event.object)
        if event.type == "ERROR":
            self._refusal(content)
        if event.type not in {"ADDED", "MODIFIED", "DELETED", "BOOKMARK"}:
            raise self._nonsense(f"an event of the type {event.type[:32]!r}")
        try:
            version = msgspec.json.decode(content, type=_Versioned).metadata.resource_version
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._nonsense("an event without an object") from error
        if not version:
            raise self._nonsense("an event without a resourceVersion")
        self._heard = True
        self._brief_watches = 0
        if event.type != "BOOKMARK":
            self._change(content, gone=event.type == "DELETED")
        else:
            self._healthy()
        self._version = version

    def _change(self, content: bytes, *, gone: bool) -> None:
        found = self._read(content)
        if found is None:
            self._healthy()
            return
        objects = dict(self._view.objects)
        overfull = self._view.overfull
        if gone:
            objects.pop(found[0], None)
        elif found[0] in objects or len(objects) < self._target.entries_max:
            objects[found[0]] = found[1]
        else:
            overfull = True
        self._publish(objects, overfull=overfull)

    def _refusal(self, content: bytes) -> None:
        """What an ERROR event says: expired, which asks for a new list, or something worse."""
        try:
            status = msgspec.json.decode(content, type=_Status)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._nonsense("an error without a status") from error
        if status.code == GONE or status.reason in {"Expired", "Gone"}:
            raise ApiTrouble("the place to resume the watch is gone", status=GONE)
        raise ApiTrouble(
            f"the API server {self._server.url} ends the watch with {status.code}: it is asked "
            "again"
        )

    def _read(self, content: bytes) -> tuple[str, T] | None:
        """One object; one that cannot be read is no reason to lose the others."""
        try:
            return self._target.read(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    # --- state ------------------------------------------------------------------------------------

    def _publish(self, objects: dict[str, T], *, overfull: bool) -> None:
        self._failures = 0
        self._view = WatchView(
            objects=objects,
            synced=True,
            as_of_boot_ns=self._clock.boottime_ns(),
            sequence=self._view.sequence + 1,
            failure=self._view.failure if self._brief_watches > BRIEF_WATCHES_MAX else None,
            overfull=overfull,
        )

    def _healthy(self) -> None:
        self._failures = 0
        if self._view.failure is not None:
            log.info("the API server answers again", extra={"action": "api_server_readable"})
        self._view = msgspec.structs.replace(
            self._view, failure=None, as_of_boot_ns=self._clock.boottime_ns()
        )

    def _relist(self) -> None:
        self._version, self._fresh = None, True

    def _nonsense(self, what: str) -> ApiTrouble:
        self._relist()
        return ApiTrouble(
            f"the API server {self._server.url} sent {what}: is kubernetes.api_url an API server?"
        )

    def _url(self, query: dict[str, str]) -> str:
        query = {"fieldSelector": self._target.field_selector, **query}
        return f"{self._target.path}?{urllib.parse.urlencode(query)}"

    def _failed(self, error: ApiTrouble) -> float:
        """Note a failure; how long to wait, by this clock."""
        self._failures += 1
        if self._view.failure is None:
            log.warning("%s", error, extra={"action": "api_server_unreadable"})
        self._view = msgspec.structs.replace(self._view, failure=str(error))
        return max(float(error.retry_after_seconds or 0), self._backoff(self._failures))

    def _backoff(self, count: int) -> float:
        """Anywhere in a growing span: ten thousand agents lose the server in the same instant."""
        longest = min(BACKOFF_SECONDS_MAX, self._server.backoff_seconds * 2.0 ** min(count, 10))
        return self._chance.uniform(0.05 * longest, longest)

    def _ended(self, lasted_seconds: float) -> float:
        """How long to wait after a watch that ended by itself; no circle is ever tight."""
        if self._heard or lasted_seconds >= BRIEF_SECONDS:
            self._brief_watches = 0
            return self._chance.uniform(0.1, 1.0)
        self._brief_watches += 1
        if self._brief_watches > BRIEF_WATCHES_MAX:
            sentence = f"the API server {self._server.url} ends every watch at once: it is asked"
            if self._view.failure is None:
                log.warning("%s less often", sentence, extra={"action": "api_server_unreadable"})
            self._view = msgspec.structs.replace(self._view, failure=f"{sentence} less often")
        return self._backoff(self._brief_watches)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._heard = False
            began_ns = self._clock.boottime_ns()
            try:
                self.run_once()
                lasted_seconds = (self._clock.boottime_ns() - began_ns) / NS_PER_SECOND
                wait_seconds = self._ended(lasted_seconds)
            except ApiTrouble as error:
                if self._stop.is_set():
                    return
                wait_seconds = self._failed(error)
            except Exception:  # nothing may end this thread
                log.exception("watch of pods", extra={"action": "unexpected_error"})
                self._relist()
                wait_seconds = self._failed(ApiTrouble("the watch failed: a defect, see the log"))
            self._stop.wait(self._clock.sleep_seconds(wait_seconds))
