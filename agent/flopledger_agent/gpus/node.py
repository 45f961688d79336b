"""Finds the node's devices: opens the driver, counts, and asks each device for its name once.

Lives in one thread and keeps no handle. A device that does not say who it is is reported by its
index and never hides the others; the driver's own troubles end up as one error for the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.device import DEVICE_NAME_MAX, UNKNOWN_NAME
from flopledger_agent.gpus.nvml_errors import DriverError
from flopledger_agent.gpus.selection import EVERYTHING, Selection
from flopledger_agent.gpus.xids import XidWatch
from flopledger_core.records import Device

if TYPE_CHECKING:
    from flopledger_agent.gpus.nvml import Handle, Nvml

# Devices are looked up anew this often (in ticks) although their count did not change.
RESCAN_TICKS: Final = 60
UUID_MAX: Final = 96  # records.Device.uuid


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices the driver showed when it was last asked."""

    generation: int
    driver: str | None
    present: tuple[Device, ...]
    unidentified: tuple[tuple[int, str], ...]  # index and reason of a device without a name


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """Where devices are in the driver's list: what a successor needs to keep off one that hangs."""

    places: dict[str, int]  # index by UUID
    device_count: int | None
    stuck_index: int | None  # asked who it is at this moment


class NodeReader:
    """Opens the driver and finds its devices; lives in one thread.

    `xids.attach` and `survey` may be called by another thread.
    """

    def __init__(self, nvml: Nvml, selection: Selection = EVERYTHING) -> None:
        self._nvml = nvml
        self._selection = selection
        self.xids = XidWatch(nvml)
        self._registered: frozenset[str] = frozenset()
        self._places: dict[str, int] = {}
        self._asking_index: int | None = None
        self._open = False
        self._generation = 0
        self._driver: str | None = None
        self._count = -1
        self._ticks = 0
        self._view: NodeView | None = None

    def look(self, *, reopen: bool) -> NodeView:
        """The devices now. Errors: DriverError when the driver does not answer at all."""
        if reopen:
            self.close()
        if not self._open:
            self._driver = self._nvml.open()
            self._open = True
            self._generation += 1
            if self._generation > 1:
                self._selection = self._selection.by_name_only()
            self._view = None
            self._registered = frozenset()
        try:
            count = self._nvml.count()
        except DriverError as error:
            if error.meaning.scope == "node" or self._view is None:
                self.close()
                raise
            return self._view  # one bad answer about the node does not lose its devices
        if self._selection.device_count not in (None, count):
            # For good: when the old count is back, the order may still be another one.
            self._selection = self._selection.by_name_only()
        self._ticks += 1
        due = self._ticks % RESCAN_TICKS == 0
        view = self._view
        if view is None or due or count != self._count or not _is_complete(view):
            view = self._scan(count)
            self._count, self._view = count, view
        self.xids.poll()
        return view

    def survey(self) -> Survey:
        """Where devices are, as far as it is known now."""
        return Survey(
            places=dict(self._places),
            device_count=None if self._count < 0 else self._count,
            stuck_index=self._asking_index,
        )

    def close(self) -> None:
        """Let go of the driver, as far as it lets us."""
        if self._open:
            self._open = False
            self.xids.close()
            try:
                self._nvml.shutdown()
            except DriverError:
                self._view = None  # it was gone already

    def _scan(self, count: int) -> NodeView:
        present: list[Device] = []
        unidentified: list[tuple[int, str]] = []
        places: dict[str, int] = {}
        self._count = count
        for index in range(count):
            if not self._selection.touches(index, count):
                if self._selection.lacks(index, count):
                    unidentified.append((index, "timeout"))
                continue
            self._asking_index = index
            try:
                handle = self._nvml.handle_by_index(index)
                uuid = self._nvml.uuid(handle)
                if not 0 < len(uuid) <= UUID_MAX:
                    unidentified.append((index, "out_of_range"))
                    continue
                places[uuid] = index
                if self._selection.wants(uuid):
                    present.append(Device(uuid=uuid, name=self._name(handle)))
                    if uuid not in self._registered:
                        self.xids.register(uuid, handle)
            except DriverError as error:
                unidentified.append((index, error.meaning.reason))
        self._asking_index = None
        self._places = places
        self._registered = frozenset(device.uuid for device in present)
        return NodeView(
            generation=self._generation,
            driver=self._driver,
            present=tuple(present),
            unidentified=tuple(unidentified),
        )

    def _name(self, handle: Handle) -> str:
        try:
            return self._nvml.name(handle)[:DEVICE_NAME_MAX] or UNKNOWN_NAME
        except DriverError:
            return UNKNOWN_NAME


def _is_complete(view: NodeView) -> bool:
    """Whether every device has said who it is."""
    return not view.unidentified and all(item.name != UNKNOWN_NAME for item in view.present)
