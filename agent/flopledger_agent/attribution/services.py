"""Processes that work for whoever holds a device: the server of MPS, through which clients compute.

It runs as root outside every job, and what it does on the device its clients asked for. So it is
neither a holder nor an intruder. A process of another user may call itself what it likes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.precedence import ROOT, Membership

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import Process

MPS_SERVER: Final = "nvidia-cuda-mps-server"[:15]  # as the kernel cuts it


class Services:
    """Recognises services by the names the kernel knows; `root` is where /proc is."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root

    def membership(self, process: Process) -> Membership | None:
        """What a service belongs to; None of anything else."""
        if process.uid != 0 and process.user != ROOT:
            return None
        try:
            name = (self._root / str(process.pid) / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            return None
        return Membership(is_service=True) if name == MPS_SERVER else None
