"""The disk port: whole files that are either durably there or not there at all.

Files are written to a temporary name, synchronised, renamed, and their directory synchronised, so
that a crash leaves the old file, the new file, or a temporary one that is swept at start. The
in-memory disk keeps the same promises and can crash, fill up and tear, for simulations.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from flopledger_agent.errors import SpoolFull, StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPORARY_SUFFIX: Final = ".tmp"
DIRECTORY_MODE: Final = 0o700  # the key and users' names live here
FILE_MODE: Final = 0o600


class Disk(Protocol):
    """A directory tree of small files."""

    def write(self, name: str, content: bytes, *, durable: bool) -> None:
        """Replace the file `name`; durable also survives power loss. Raises `SpoolFull`."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content of `name`; None where there is no such file. Raises `StateError`."""
        ...

    def names(self, directory: str) -> list[str]:
        """A directory's finished files, sorted, each with the directory in front.

        Raises `StateError`.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file; it is no error if it is gone. Raises `SpoolFull`."""
        ...

    def rename(self, name: str, new_name: str) -> None:
        """Rename durably, replacing the new name. Raises `SpoolFull`."""
        ...


class DirectoryDisk:
    """A directory of the node's file system, private to the agent's user."""

    def __init__(self, root: Path, directories: Sequence[str] = ()) -> None:
        """`directories` are those below `root` that files will be written to."""
        self.root = root
        try:
            for directory in (root, *(root / name for name in directories)):
                directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
                for path in directory.iterdir():
                    if path.name.endswith(TEMPORARY_SUFFIX):
                        path.unlink()
        except OSError as error:
            raise unusable(root, error) from error

    def write(self, name: str, content: bytes, *, durable: bool) -> None:
        """Write to a temporary name, synchronise if durable, rename."""
        path = self.root / name
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            path.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _sync_directory(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _refused(path, error) from error

    def read(self, name: str) -> bytes | None:
        """The file's bytes."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.root / name}: {error.strerror}; make it readable") from error

    def names(self, directory: str) -> list[str]:
        """Finished files only."""
        folder = self.root / directory
        try:
            return sorted(
                f"{directory}/{path.name}"
                for path in folder.iterdir()
                if path.is_file() and not path.name.endswith(TEMPORARY_SUFFIX)
            )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateError(f"{folder}: {error.strerror}; make it readable") from error

    def remove(self, name: str) -> None:
        """Unlink; the space is the point, so no synchronisation."""
        path = self.root / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _refused(path, error) from error

    def rename(self, name: str, new_name: str) -> None:
        """Atomic within the directory tree."""
        path = self.root / new_name
        try:
            path.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            (self.root / name).replace(path)
            _sync_directory(path.parent)
        except OSError as error:
            raise _refused(path, error) from error


class MemoryDisk:
    """A disk in memory that keeps the port's promises and can be made to fail.

    `crash()` forgets what was not durable; `room_bytes` limits it; both are for simulations.
    """

    def __init__(self, room_bytes: int | None = None) -> None:
        self.room_bytes = room_bytes
        self._files: dict[str, bytes] = {}
        self._durable: dict[str, bytes] = {}

    def write(self, name: str, content: bytes, *, durable: bool) -> None:
        """Keep the file unless there is no room."""
        used = sum(len(kept) for other, kept in self._files.items() if other != name)
        if self.room_bytes is not None and used + len(content) > self.room_bytes:
            raise SpoolFull(f"{name}: no space left on device; free space")
        self._files[name] = content
        if durable:
            self._durable[name] = content

    def read(self, name: str) -> bytes | None:
        """The file's bytes."""
        return self._files.get(name)

    def names(self, directory: str) -> list[str]:
        """Files of a directory."""
        return sorted(name for name in self._files if name.startswith(f"{directory}/"))

    def remove(self, name: str) -> None:
        """Forget the file."""
        self._files.pop(name, None)
        self._durable.pop(name, None)

    def rename(self, name: str, new_name: str) -> None:
        """Move the file, durably."""
        if name in self._files:
            self._files[new_name] = self._files.pop(name)
            self._durable.pop(name, None)
            self._durable[new_name] = self._files[new_name]

    def crash(self) -> None:
        """Lose power: only durable files remain, as they were when last made durable."""
        self._files = dict(self._durable)


def unusable(root: Path, error: OSError) -> StateError:
    """Why a state directory cannot be used at all."""
    place = "" if error.filename in {None, str(root)} else f" ({error.filename})"
    remedy = {
        errno.EROFS: "it must be on a file system that can be written",
        errno.EEXIST: "remove or rename the file that is in its place",
        errno.ENOTDIR: "remove or rename the file that is in its place",
        errno.ENOSPC: "free space",
    }.get(error.errno or 0, "create it and give it to the agent's user")
    return StateError(f"state.directory is {str(root)!r}: {error.strerror}{place}; {remedy}")


def _refused(path: Path, error: OSError) -> SpoolFull:
    return SpoolFull(
        f"{path}: {error.strerror}; free space or repair the state directory: windows stay open "
        "and widen until then"
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
