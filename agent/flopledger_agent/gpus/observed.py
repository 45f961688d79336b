"""A source whose samples somebody else sees first: schedulers learn of devices before owners do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from flopledger_agent.gpus.interface import GpuSource, NodeSample


class ObservedSource:
    """Passes everything through; implements `GpuSource`."""

    def __init__(self, source: GpuSource, observe: Callable[[NodeSample], None]) -> None:
        self._source = source
        self._observe = observe

    def sample(self) -> NodeSample:
        """One reading of every device, once the observer has seen it."""
        node = self._source.sample()
        self._observe(node)
        return node

    def pause(self) -> None:
        """Let the driver go."""
        self._source.pause()

    def resume(self) -> None:
        """Take the driver again."""
        self._source.resume()

    def close(self) -> None:
        """Let go of the driver for good."""
        self._source.close()
