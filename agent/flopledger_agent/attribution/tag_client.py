"""The client of tags: tells the agent about this process and becomes the user's command.

The command keeps this process's pid, its exit status is the command's own, and the tags are set in
its environment too, which every child inherits. A job never fails because of the agent: when it
cannot be reached, one sentence is printed and the command runs all the same.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.tag_values import Tags, require_tags
from flopledger_agent.attribution.tags import TagAnswer, TagRequest
from flopledger_agent.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

CLIENT_TIMEOUT_SECONDS: Final = 2.0  # for each step; a job's start waits for nothing longer
ANSWER_BYTES_MAX: Final = 4096
NOT_FOUND_STATUS: Final = 127  # what shells exit with when there is no such command
NOT_EXECUTABLE_STATUS: Final = 126


class TagNotRegistered(AgentError):
    """The agent did not take the tag; the environment variables still say it."""


class CommandNotStarted(AgentError):
    """The command could not be executed; `status` is what a shell would exit with."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def register(path: Path, tags: Tags, *, pid: int | None = None) -> None:
    """Tell the agent about a process (None: this one). Errors: TagNotRegistered."""
    request = msgspec.json.encode(TagRequest(tags=tags, pid=pid))
    try:
        answer = msgspec.json.decode(ask(path, request), type=TagAnswer)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TagNotRegistered(f"the agent does not answer at {path} ({reason})") from error
    except msgspec.DecodeError as error:
        raise TagNotRegistered(f"the agent at {path} gave no answer") from error
    if answer.error is not None:
        raise TagNotRegistered(answer.error)


def ask(path: Path, request: bytes, timeout_seconds: float = CLIENT_TIMEOUT_SECONDS) -> bytes:
    """One line to the agent, one line back, empty when it said nothing. Errors: OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        connection.connect(str(path))
        connection.sendall(request + b"\n")
        return _line(connection)


def run_tagged(
    path: Path,
    tags: Tags,
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    warn: Callable[[str], None],
) -> None:
    """Register this process and become `command`; returns only by an error.

    Errors: InvalidInput for tags that cannot be used, CommandNotStarted for the command.
    """
    require_tags(tags)
    try:
        register(path, tags)
    except TagNotRegistered as error:
        warn(f"{error}; the command runs all the same, tagged by its environment")
    try:
        os.execvpe(command[0], list(command), {**environ, **tags.environment()})  # noqa: S606
    except FileNotFoundError as error:
        raise CommandNotStarted(
            NOT_FOUND_STATUS, f"{command[0]}: no such command; check its spelling and PATH"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandNotStarted(
            NOT_EXECUTABLE_STATUS, f"{command[0]}: {reason}; check that it is an executable"
        ) from error


def _line(connection: socket.socket) -> bytes:
    received = b""
    while b"\n" not in received and len(received) <= ANSWER_BYTES_MAX:
        piece = connection.recv(ANSWER_BYTES_MAX)
        if not piece:
            break
        received += piece
    return received.partition(b"\n")[0]
