"""Whose work a process is, by the same attribution that judges who holds a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flopledger_agent.attribution.interface import Attributor, Claim
    from flopledger_agent.attribution.tags import TagRegistry


class AttributedProcesses:
    """Asks an attributor about single processes; implements `ProcessOwners`."""

    def __init__(self, attributor: Attributor, registry: TagRegistry) -> None:
        self._attributor = attributor
        self._registry = registry

    def version(self) -> int:
        """The registry's: it grows with every registration."""
        return self._registry.version

    def tagged(self) -> frozenset[int]:
        """Pids with a registered tag."""
        return self._registry.tagged_pids()

    def claim(self, pid: int) -> Claim:
        """The owner of a process, with its evidence; `unattributed` when it has ended."""
        return self._attributor.claims((pid,))[0]
