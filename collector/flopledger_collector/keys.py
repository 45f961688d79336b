"""The collector's signing key: one file that only its owner may read.

Written as a temporary file, synced and renamed, so that a crash leaves either no key or a whole
one. A key file that others can read is refused, not repaired: it may be known already.
"""

from __future__ import annotations

import os
import secrets
import stat
from typing import TYPE_CHECKING

from flopledger_collector.errors import ConfigInvalid
from flopledger_core.signing import SigningKey

if TYPE_CHECKING:
    from pathlib import Path

_READABLE_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def load_or_create_key(path: Path) -> SigningKey:
    """The key of a file; at first start a fresh one is made and written there.

    When two processes start at once, both end with the key that was written first.
    """
    if not path.exists():
        _write_new(path, SigningKey.generate().to_pem())
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()
    except OSError as error:
        raise ConfigInvalid("key file", str(path), f"make it readable ({error})") from error
    if mode & _READABLE_BY_OTHERS:
        raise ConfigInvalid(
            "key file",
            str(path),
            f"others may read it (mode {stat.S_IMODE(mode):04o}); if it is still yours alone, "
            "run chmod 600 on it, else remove it to begin with a new key",
        )
    return SigningKey.from_pem(pem)


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never over a key that is there already
        except FileExistsError:
            return
    finally:
        temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
