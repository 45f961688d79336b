"""One agent per node: a lock that agents with different state directories cannot both hold.

Two handles, because each alone misses somebody. An abstract socket is seen by everything in one
network namespace, whatever its file system; a locked file by everything that shares /run. An agent
on the host and one in a container with the host's network, or with the host's /run/flopledger-agent
mounted, see each other. What neither can see is a container with a network and a /run of its own:
there the collector's check that a GPU has one stream at a time is what finds the second meter.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.tags import user_name
from flopledger_agent.control import ROOT_UID
from flopledger_agent.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

NODE_LOCK_FILE: Final = Path("/run/flopledger-agent/node.lock")
NODE_LOCK_SOCKET: Final = "flopledger-agent/node"  # abstract: no file, gone with the process
ASKERS_MAX: Final = 128  # starts that are refused between two ticks, and many more
PROBE_SECONDS: Final = 2.0  # a local connection is made at once or not at all
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NodeLock:
    """Holds the node for this process; the kernel lets go when it dies.

    Errors: StateError when another agent holds it, with the remedy.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        file: Path = NODE_LOCK_FILE,
        name: str = NODE_LOCK_SOCKET,
    ) -> None:
        self._socket: socket.socket | None = None
        self._file = _lock_file(file, warn)
        try:
            self._socket = _lock_socket(name, warn, is_nodes_own=self._file is not None)
        except BaseException:
            self.release()
            raise

    def drain(self) -> None:
        """Let go of those who asked whose the lock is, so that the next can; at every tick."""
        held = self._socket
        while held is not None:
            try:
                held.accept()[0].close()
            except OSError:  # nobody asks
                return

    def release(self) -> None:
        """Let another agent have the node."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
        held, self._socket = self._socket, None
        if held is not None:
            held.close()


def _lock_file(path: Path, warn: Callable[[str], None]) -> int | None:
    """The locked file; None, with a warning, where this user may not write there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        warn(
            f"{path} cannot be locked ({error.strerror}): an agent in another network namespace "
            "would not be noticed; run the agent as its service does"
        )
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            warn(f"{path} cannot be locked ({error.strerror})")
            return None
        raise StateError(_refusal(f"an agent that holds {path}")) from error
    return descriptor


def _lock_socket(
    name: str, warn: Callable[[str], None], *, is_nodes_own: bool
) -> socket.socket | None:
    """The bound socket. Any local user can take an abstract name, so it is asked whose it is.

    An agent that may lock the node's file does not give way to a stranger who squats on the name;
    one that may not gives way to everybody.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind("\0" + name)
        held.listen(ASKERS_MAX)
        held.setblocking(False)
    except OSError as error:
        held.close()
        if error.errno != errno.EADDRINUSE:
            warn(f"the node's lock socket cannot be bound ({error.strerror})")
            return None
        pid, uid = _holder(name)
        who = "somebody" if uid is None else f"process {pid or '?'} of user {user_name(uid)}"
        if is_nodes_own and uid not in {ROOT_UID, os.geteuid()}:
            warn(f"{who} holds the node's lock socket and is ignored; stop it")
            return None
        raise StateError(_refusal(who)) from error
    return held


def _holder(name: str) -> tuple[int | None, int | None]:
    """Process and user behind the name; None where the kernel does not tell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect("\0" + name)
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None, None
    pid, uid, _gid = _CREDENTIALS.unpack(found)
    return (pid or None), uid  # the pid of another pid namespace is told as 0


def _refusal(who: str) -> str:
    return (
        f"this node is metered already, by {who}; stop that agent first (systemctl stop "
        "flopledger-agent, or remove its container): two would count every GPU twice"
    )
