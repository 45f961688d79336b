"""Which of the node's GPUs one source reads: a GPU that hangs is left to a source of its own."""

from __future__ import annotations

import msgspec


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs by UUID, and their places in the driver's list, so that others are not even touched.

    `only_uuid` and `only_index` name the one GPU that is read; `excluded` are left out.
    `places` says which index each left-out GPU had while the driver counted `device_count`; with
    another count indexes may have moved, and every device is asked who it is. `nameless` are
    indexes at which a device hung before it said who it is.
    """

    only_uuid: str | None = None
    only_index: int | None = None
    excluded: frozenset[str] = frozenset()
    places: dict[str, int] = {}
    nameless: frozenset[int] = frozenset()
    device_count: int | None = None

    def by_name_only(self) -> Selection:
        """The same GPUs where nothing is known of their places any more."""
        return msgspec.structs.replace(self, places={}, nameless=frozenset(), device_count=None)

    def wants(self, uuid: str) -> bool:
        """Whether the GPU with this UUID is read."""
        if self.only_uuid is not None:
            return uuid == self.only_uuid
        return uuid not in self.excluded

    def touches(self, index: int, count: int) -> bool:
        """Whether the device at this index may be asked who it is."""
        if self.only_index is not None:
            return index == self.only_index
        if count != self.device_count:
            return True
        if index in self.nameless:
            return False
        return not any(
            place == index and not self.wants(uuid) for uuid, place in self.places.items()
        )

    def lacks(self, index: int, count: int) -> bool:
        """Whether a device that nobody knows by name is left out at this index."""
        return (
            self.only_index is None
            and self.only_uuid is None
            and count == self.device_count
            and index in self.nameless
        )


EVERYTHING = Selection()
