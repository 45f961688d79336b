"""Registered tags: what jobs told the agent about themselves, and the local socket they use.

A tag belongs to a process by pid and create time, and to all its descendants. Nothing is persisted:
the same tags stand in the job's environment, which is read when the agent has forgotten. Any local
user may tag, but only processes of his own; the kernel says who is asking, not the asker. A client
can neither hold the server up nor fill its memory.
"""

from __future__ import annotations

import contextlib
import pwd
import socket
import socketserver
import stat
import struct
import threading
from typing import TYPE_CHECKING, Final, Protocol, cast

import msgspec

from flopledger_agent.attribution.tag_values import Tags, require_tags
from flopledger_agent.errors import StateError
from flopledger_core.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flopledger_agent.attribution.interface import Process, ProcessTable

TAGS_MAX: Final = 4096  # live tagged processes of one node; an honest one has a few hundred at most
REQUEST_BYTES_MAX: Final = 16 * 1024  # eight short ids; anything longer is not a tag
RECEIVES_MAX: Final = 8  # pieces a request may come in: bounds how long a client can keep a thread
READ_TIMEOUT_SECONDS: Final = 0.5  # for each piece
CONNECTIONS_MAX: Final = 32  # clients served at once; the next ones are turned away at once
SOCKET_PATH_BYTES_MAX: Final = 107  # sockaddr_un.sun_path without its final zero
SOCKET_MODE: Final = 0o666  # every local user may tag processes of his own
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class TagRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line from a client; `pid` None is the client itself."""

    tags: Tags
    pid: int | None = None


class TagAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line back: the process registered, or a sentence why not."""

    registered_pid: int | None = msgspec.field(default=None, name="registered")
    error: str | None = None


class RegisteredTag(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent was told about one process."""

    pid: int
    create_time_ms: int
    user: str | None
    tags: Tags


class TagRegistry:
    """The tags registered since the agent started; usable from several threads."""

    def __init__(self, processes: ProcessTable, tags_max: int = TAGS_MAX) -> None:
        self.processes = processes
        self._tags_max = tags_max
        self._entries: dict[tuple[int, int], RegisteredTag] = {}
        self._lock = threading.Lock()
        self.version = 0  # grows with every change, so that judgements can be remembered

    def register(self, process: Process, tags: Tags) -> RegisteredTag:
        """Tag a process and its descendants. Errors: InvalidInput for tags or for want of room."""
        entry = RegisteredTag(
            pid=process.pid,
            create_time_ms=process.create_time_ms,
            user=process.user,
            tags=require_tags(tags),
        )
        key = (entry.pid, entry.create_time_ms)
        with self._lock:
            if key not in self._entries and len(self._entries) >= self._tags_max:
                self._forget_ended()
            if key not in self._entries and len(self._entries) >= self._tags_max:
                raise InvalidInput(
                    "registered tags",
                    len(self._entries),
                    "end tagged processes, or tag by FLOPLEDGER_ variables",
                )
            self._entries[key] = entry
            self.version += 1
        return entry

    def find(self, process: Process) -> RegisteredTag | None:
        """The tag of a process, else of its nearest ancestor that has one."""
        with self._lock:
            if not self._entries:
                return None
            for key in ((process.pid, process.create_time_ms), *process.ancestors):
                entry = self._entries.get(key)
                if entry is not None:
                    return entry
        return None

    def tagged_pids(self) -> frozenset[int]:
        """Pids that were registered, ended ones included; `find` says whether a tag still holds."""
        with self._lock:
            return frozenset(pid for pid, _create_time_ms in self._entries)

    def entries(self) -> tuple[RegisteredTag, ...]:
        """Every tag of a process that still lives, by pid."""
        with self._lock:
            self._forget_ended()
            return tuple(entry for _, entry in sorted(self._entries.items()))

    def _forget_ended(self) -> None:
        """Drop tags whose process is gone; its orphans still carry them in their environment."""
        for pid, create_time_ms in list(self._entries):
            process = self.processes.identify(pid)
            if process is None or process.create_time_ms != create_time_ms:
                del self._entries[pid, create_time_ms]
                self.version += 1


class OtherRequests(Protocol):
    """Answers what comes through the same socket and is no tag."""

    def answer(self, line: bytes, uid: int) -> bytes | None:
        """The answer to a line from user `uid`; None when the line is not for it."""
        ...


class TagServer:
    """Listens on a local socket and registers what clients say.

    `registered` is called after each registration, from any thread; `others` is asked first.
    """

    def __init__(
        self,
        path: Path,
        registry: TagRegistry,
        *,
        registered: Callable[[], None] | None = None,
        others: OtherRequests | None = None,
    ) -> None:
        self._path = path
        self._registry = registry
        self._registered = registered
        self._others = others
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen. Errors: StateError names the path and the remedy."""
        _require_short(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self._path)
            self._server = _Server(str(self._path), _Handler)
            self._path.chmod(SOCKET_MODE)
        except OSError as error:
            self.stop()
            raise StateError(
                f"tags.socket is {str(self._path)!r}: {error.strerror or error}; choose a path "
                "in a directory the agent may write to"
            ) from error
        self._server.registry = self._registry
        self._server.registered = self._registered
        self._server.others = self._others
        self._thread = threading.Thread(target=self._server.serve_forever, name="tags", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and remove the socket; connections in progress are left to end."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._thread is not None:
            server.shutdown()
        server.server_close()
        self._path.unlink(missing_ok=True)


def answer(line: bytes, *, pid: int, uid: int, registry: TagRegistry) -> TagAnswer:
    """What a request from process `pid` of user `uid` leads to; never raises for bad input."""
    try:
        request = msgspec.json.decode(line, type=TagRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return TagAnswer(error=f"the request is not a tag request ({error}); update the client")
    target = pid if request.pid is None else request.pid
    process = registry.processes.identify(target) if target > 0 else None
    if process is None:
        return TagAnswer(
            error=f"process {target} is not visible to the agent; run both in one pid namespace"
        )
    # The client's own process is checked, too: by now its pid may be somebody else's.
    if not _is_of(process, uid) and (target == pid or uid != 0):
        return TagAnswer(error=f"process {target} belongs to somebody else; tag only your own")
    try:
        registry.register(process, request.tags)
    except InvalidInput as error:
        return TagAnswer(error=str(error))
    return TagAnswer(registered_pid=target)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread per connection, up to a limit."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    registry: TagRegistry
    registered: Callable[[], None] | None = None
    others: OtherRequests | None = None

    def __init__(self, path: str, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(path, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of ours."""


class _Handler(socketserver.BaseRequestHandler):
    """One connection: one line in, one line out."""

    request: socket.socket

    def handle(self) -> None:
        """Answer, if there is a place for one more."""
        server = cast("_Server", self.server)
        if not server.places.acquire(blocking=False):
            return  # closed without an answer: the client runs its command untagged by us
        try:
            self.request.settimeout(READ_TIMEOUT_SECONDS)
            reply = self._reply(server)
            with contextlib.suppress(OSError):
                self.request.sendall(reply + b"\n")
        finally:
            server.places.release()

    def _reply(self, server: _Server) -> bytes:
        size = _CREDENTIALS.size
        credentials = self.request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _gid = _CREDENTIALS.unpack(credentials)
        received = b""
        for _ in range(RECEIVES_MAX):
            try:
                piece = self.request.recv(REQUEST_BYTES_MAX + 1)
            except OSError:
                break
            received += piece
            if not piece or b"\n" in piece or len(received) > REQUEST_BYTES_MAX:
                break
        line, newline, _rest = received.partition(b"\n")
        if len(received) > REQUEST_BYTES_MAX:
            reply = TagAnswer(error=f"the request is longer than {REQUEST_BYTES_MAX} bytes")
        elif not newline:
            reply = TagAnswer(error="the request did not end in time; send one line")
        else:
            other = None if server.others is None else server.others.answer(line, uid)
            if other is not None:
                return other
            reply = answer(line, pid=pid, uid=uid, registry=server.registry)
            if reply.registered_pid is not None and server.registered is not None:
                server.registered()
        return msgspec.json.encode(reply)


def _is_of(process: Process, uid: int) -> bool:
    """Whether a process runs for a user, by number where the table knows it."""
    if process.uid is not None:
        return process.uid == uid
    return process.user == user_name(uid)


def user_name(uid: int) -> str:
    """A user's name as the process table tells it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _require_short(path: Path) -> None:
    length = len(bytes(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise StateError(
            f"tags.socket is {str(path)!r}: {length} bytes are more than the "
            f"{SOCKET_PATH_BYTES_MAX} a socket path may have; choose a shorter path"
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of an agent that died; refuse to touch anything else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StateError(
            f"tags.socket is {str(path)!r}: a file that is no socket is there; move it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(READ_TIMEOUT_SECONDS)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise StateError(
        f"tags.socket is {str(path)!r}: another agent listens there; stop that one first"
    )
