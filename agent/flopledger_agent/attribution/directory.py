"""The node's device directory, kept up to date from what the driver's samples tell.

A device that cannot be read in a tick keeps the names it had: whoever holds it still does. One that
ended on purpose, because its GPU was partitioned anew, is taken out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_agent.attribution.allocations import DeviceDirectory, DirectoryEntry

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample, NodeSample
    from flopledger_core.records import Device


class DirectoryKeeper:
    """Makes the directory of each tick; one thread calls `observe`, any reads `now`."""

    def __init__(self) -> None:
        self._entries: dict[str, DirectoryEntry] = {}
        self.now = DeviceDirectory()  # replaced whole, and only when something changed

    def observe(self, node: NodeSample) -> None:
        """Take over the names that a tick told."""
        entries = {sample.device.key: _entry(sample) for sample in node.samples}
        for failure in node.failures:
            device = failure.device
            entries.setdefault(device.key, self._entries.get(device.key) or _nameless(device))
        if entries != self._entries:
            self._entries = entries
            self.now = DeviceDirectory(entries=tuple(entries.values()))


def _entry(sample: GpuSample) -> DirectoryEntry:
    names = sample.names
    if names is None:
        return _nameless(sample.device)
    return DirectoryEntry(
        key=sample.device.key,
        uuid=sample.device.uuid,
        gpu_instance=sample.device.gpu_instance,
        index=names.index,
        minor=names.minor,
        pci_bus_id=names.pci_bus_id,
        mig_uuids=names.mig_uuids,
    )


def _nameless(device: Device) -> DirectoryEntry:
    return DirectoryEntry(key=device.key, uuid=device.uuid, gpu_instance=device.gpu_instance)
