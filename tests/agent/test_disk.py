"""The state directory: every refusal of the file system is an error that names the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from flopledger_agent.disk import DirectoryDisk, MemoryDisk
from flopledger_agent.errors import SpoolFull, StateError
from flopledger_agent.spool import Spool, file_name
from tests.agent.sealing import sealed

if TYPE_CHECKING:
    from collections.abc import Callable

STREAM = "ab" * 16


def read_only(*_args: object, **_options: object) -> NoReturn:
    """What every change of a read-only file system answers."""
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    "change",
    [
        lambda disk: disk.write("spool/a", b"x", durable=True),
        lambda disk: disk.remove("spool/b"),
        lambda disk: disk.rename("spool/b", "new/b"),
    ],
)
def test_a_read_only_file_system_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[DirectoryDisk], None]
) -> None:
    """No change escapes the port as a bare OSError: the loop keeps windows open on SpoolFull."""
    disk = DirectoryDisk(tmp_path)
    disk.write("spool/b", b"kept", durable=True)
    for name in ("mkdir", "unlink", "replace"):
        monkeypatch.setattr(Path, name, read_only)
    monkeypatch.setattr(os, "open", read_only)

    with pytest.raises(SpoolFull, match="Read-only file system; free space or repair"):
        change(disk)
    assert disk.read("spool/b") == b"kept"


def test_a_file_in_the_place_of_a_directory_is_named_at_start(tmp_path: Path) -> None:
    """`spool` being a file is found before anything is metered."""
    (tmp_path / "spool").write_bytes(b"")

    with pytest.raises(StateError, match=r"File exists .*spool\); remove or rename"):
        DirectoryDisk(tmp_path, ("spool",))
    with pytest.raises(StateError, match="make it readable"):
        DirectoryDisk(tmp_path).names("spool")


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    """A temporary file is neither a batch nor in the way."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "x.batch.tmp").write_bytes(b"half")

    assert DirectoryDisk(tmp_path, ("spool",)).names("spool") == []
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        sealed(STREAM, 0)[:200],
        sealed(STREAM, 0).replace(b'"n1"', b'"n2"'),
        sealed(STREAM, 1),
        b"\xff\x00" * 40,
    ],
)
def test_a_waiting_file_that_is_not_what_was_sealed_is_moved_aside(content: bytes) -> None:
    """Half a batch, a changed one, another one, rubbish: kept in quarantine, never sent."""
    disk = MemoryDisk()
    disk.write(file_name(STREAM, 0), content, durable=True)
    spool = Spool(disk, 2**20)

    assert spool.read(spool.batches()[0]) is None
    assert (len(spool), spool.quarantined, spool.oldest_age_ns(0)) == (0, 1, 0)
    assert disk.read(f"quarantine/{STREAM}-000000000000.batch") == content


def test_a_file_that_cannot_be_moved_aside_is_not_sent_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a read-only disk a damaged file stays where it is, out of the queue."""
    disk = MemoryDisk()
    disk.write(file_name(STREAM, 0), b"rubbish", durable=True)
    spool = Spool(disk, 2**20)

    def refuse(*_: object) -> NoReturn:
        raise SpoolFull("read-only")

    monkeypatch.setattr(disk, "rename", refuse)
    assert spool.read(spool.batches()[0]) is None
    assert len(spool) == 0


def test_a_batch_that_cannot_be_removed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue and the directory never differ: the next answer will be `duplicate`."""
    disk = MemoryDisk()
    spool = Spool(disk, 2**20)
    spool.put(STREAM, 0, sealed(STREAM, 0))

    def refuse(*_: object) -> NoReturn:
        raise SpoolFull("read-only")

    monkeypatch.setattr(disk, "remove", refuse)
    with pytest.raises(SpoolFull):
        spool.free(STREAM, 0)
    assert spool.holds(STREAM, 0)
