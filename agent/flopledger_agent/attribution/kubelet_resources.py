"""Asks kubelet which pod holds which device, over its local socket, in a thread of its own.

`v1.PodResourcesLister/List` is called at an interval with a deadline, and less and less often while
it fails. What kubelet says are grants, whether or not anything runs on them. grpcio is an extra and
costs some memory: it is loaded when the first question is asked, and not by agents elsewhere.
"""

from __future__ import annotations

import errno
import logging
import random
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

import msgspec

from flopledger_agent.attribution.kubelet_messages import (
    LIST_METHOD,
    LIST_REQUEST,
    NotAPodList,
    PodGrants,
    decode_pod_list,
)
from flopledger_core.errors import FlopLedgerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.attribution.kubernetes_section import KubernetesSection
    from flopledger_agent.clocks import Clock

MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024  # what kubelet's own client allows
BACKOFF_SECONDS_MAX: Final = 60.0
_OPTIONS: Final = (
    # A socket's path is no host name, and strict servers refuse it as one.
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # A channel that failed would otherwise wait for minutes before it connects again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
)
_REMEDIES: Final = {
    "UNAVAILABLE": "is kubelet running, and is this its pod-resources socket?",
    "DEADLINE_EXCEEDED": "kubelet is overloaded, or raise kubernetes.timeout_seconds",
    "UNIMPLEMENTED": "kubelet before 1.20, or another program's socket: see "
    "kubernetes.kubelet_socket",
    "RESOURCE_EXHAUSTED": "kubelet limits its callers: raise kubernetes.interval_seconds",
    "PERMISSION_DENIED": "kubelet does not let the agent ask",
}

log = logging.getLogger("flopledger.agent")


class KubeletUnreachable(FlopLedgerError):
    """kubelet did not give its list; the sentence says why and what helps."""


class KubeletView(msgspec.Struct, frozen=True, kw_only=True):
    """kubelet's newest list, and why the newest attempt failed, if it did."""

    pods: tuple[PodGrants, ...] = ()
    as_of_boot_ns: int | None = None  # when it was told; None: never yet
    sequence: int = 0  # counts lists
    failure: str | None = None


class Kubelet(Protocol):
    """Something that has kubelet's newest list at hand."""

    def latest(self) -> KubeletView:
        """What is known now; returns at once."""
        ...

    def close(self) -> None:
        """Ask nothing more."""
        ...


class _Call(Protocol):
    def __call__(self, request: bytes, *, timeout: float, wait_for_ready: bool) -> bytes: ...


class _Channel(Protocol):
    """The part of grpc.Channel that is used: one call, without serializers."""

    def unary_unary(self, method: str, /) -> _Call: ...

    def close(self) -> None: ...


class KubeletClient:
    """One question over one socket; the channel is kept between questions and made anew after an
    error, because kubelet replaces its socket when it restarts.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._channel: _Channel | None = None
        self._lock = threading.Lock()
        self._closed = False

    def list_pods(self, timeout_seconds: float) -> tuple[PodGrants, ...]:
        """Ask now. Errors: KubeletUnreachable, at the latest after the deadline."""
        _require_socket(self._path)
        errors = _grpc_errors()
        try:
            call = self._open().unary_unary(LIST_METHOD)
            message = call(LIST_REQUEST, timeout=timeout_seconds, wait_for_ready=False)
        except errors as error:
            self._drop()
            raise KubeletUnreachable(_refusal(self._path, error)) from error
        try:
            return decode_pod_list(message)
        except NotAPodList as error:
            raise KubeletUnreachable(
                f"kubelet's answer at {self._path} is no list of pod resources ({error}): is "
                "kubernetes.kubelet_socket the right socket?"
            ) from error

    def close(self) -> None:
        """Ask nothing more; a question under way fails at once."""
        with self._lock:
            self._closed = True
        self._drop()

    def _open(self) -> _Channel:
        import grpc  # type: ignore[import-untyped] # noqa: PLC0415 (an extra; see the module)

        with self._lock:
            if self._closed:
                raise ValueError("closed")
            if self._channel is None:
                opened = grpc.insecure_channel(  # pyright: ignore[reportUnknownMemberType]
                    f"unix:{self._path}", options=_OPTIONS
                )
                self._channel = cast("_Channel", opened)
            return self._channel

    def _drop(self) -> None:
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


class KubeletPoller:
    """kubelet's list, asked again and again; implements `Kubelet`."""

    def __init__(
        self,
        section: KubernetesSection,
        clock: Clock,
        *,
        chance: random.Random | None = None,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self._section = section
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311 (spreads questions, keeps no secret)
        self._client = KubeletClient(section.kubelet_socket)
        self._changed = changed  # told when the list differs; must return at once
        self._view = KubeletView()
        self._failures = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def latest(self) -> KubeletView:
        """What is known now; the first call begins to ask, in a thread."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._work, name="kubelet", daemon=True)
            self._thread.start()
        return self._view

    def close(self) -> None:
        """Ask nothing more; a question under way fails at once and is not waited for."""
        self._stop.set()
        self._client.close()

    def poll_once(self) -> None:
        """Ask now, in this thread."""
        last = self._view
        try:
            pods = self._client.list_pods(self._section.timeout_seconds)
        except KubeletUnreachable as error:
            self._failures += 1
            if last.failure is None and not self._stop.is_set():
                log.warning("%s", error, extra={"action": "kubelet_unreadable"})
            self._view = msgspec.structs.replace(last, failure=str(error))
            return
        if last.failure is not None:
            log.info("kubelet answers again", extra={"action": "kubelet_readable"})
        self._failures = 0
        self._view = KubeletView(
            pods=pods, as_of_boot_ns=self._clock.boottime_ns(), sequence=last.sequence + 1
        )
        if self._changed is not None and pods != last.pods:
            self._changed()

    def wait_seconds(self) -> float:
        """How long to wait before the next question, by this clock."""
        interval = self._section.interval_seconds
        if not self._failures:
            return interval
        longest = max(interval, BACKOFF_SECONDS_MAX)
        return min(longest, interval * 2.0 ** min(self._failures, 10)) * (
            0.5 + self._chance.random() / 2
        )

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll_once()
            except Exception:  # nothing may end this thread
                if self._view.failure is None:
                    log.exception("kubelet", extra={"action": "unexpected_error"})
                self._failures += 1
                self._view = msgspec.structs.replace(
                    self._view, failure="kubelet could not be asked: a defect, see the log"
                )
            self._stop.wait(self._clock.sleep_seconds(self.wait_seconds()))


def _require_socket(path: str) -> None:
    """Say what is wrong before gRPC says that it is unavailable."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            raise KubeletUnreachable(
                f"kubelet's socket {path} may not be used: it is root's; run the agent as root "
                "(no capability is needed) or give its user access"
            ) from error
        raise KubeletUnreachable(
            f"kubelet's socket {path} is not there: mount its directory from the host, or name it "
            "in kubernetes.kubelet_socket"
        ) from error
    if not stat.S_ISSOCK(mode):
        raise KubeletUnreachable(
            f"{path} is no socket: name kubelet's in kubernetes.kubelet_socket"
        )


def _grpc_errors() -> tuple[type[Exception], ...]:
    """What grpcio raises when a call fails. Errors: KubeletUnreachable without grpcio."""
    try:
        import grpc  # noqa: PLC0415 (an extra; see the module)
    except ImportError as error:
        raise KubeletUnreachable(
            "grpcio is not installed, so kubelet cannot be asked: install flopledger[kubernetes]"
        ) from error
    return (cast("type[Exception]", grpc.RpcError), ValueError)  # ValueError: closed meanwhile


def _refusal(path: str, error: Exception) -> str:
    code = getattr(error, "code", None)
    name = "closed"
    if callable(code):
        answer = cast("Callable[[], object]", code)()
        name = str(getattr(answer, "name", "UNKNOWN"))
    remedy = _REMEDIES.get(name)
    return f"kubelet at {path} answers {name}" + (f": {remedy}" if remedy else "")
