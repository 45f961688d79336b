"""Facts of the node that the agent states in every batch: which boot, and is its clock kept."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path
from typing import Final

BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
TIMEX_BYTES: Final = 256  # struct timex is 208 bytes on 64-bit Linux; the call writes only that
TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised


def boot_id() -> str:
    """The kernel's random id of this boot; `unknown` where the kernel does not say."""
    try:
        return BOOT_ID_FILE.read_text(encoding="ascii").strip() or "unknown"
    except OSError:
        return "unknown"


def clock_is_synchronised() -> bool | None:
    """Whether the kernel's clock is disciplined by NTP or PTP; None where it cannot be told.

    `adjtimex` with no modes only reads and needs no privilege.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "adjtimex"):
        return None
    answer: int = library.adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    if answer < 0:
        return None if ctypes.get_errno() in {errno.ENOSYS, errno.EPERM} else False
    return answer != TIME_ERROR
