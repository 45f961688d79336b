"""CPU and memory energy through RAPL, as the kernel's powercap tree shows it.

Intel and AMD share the tree: top zones `package-N` with subzones `core`, `uncore`, `dram`, and
`psys` for the whole platform. `core` and `uncore` are inside the package and are never read. The
tree is listed anew at each reading, because zones come and go with sockets and drivers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from flopledger_agent.host.interface import (
    Counter,
    EnergyReading,
    EnergyReadings,
    HostReadError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from flopledger_core.records import HostBoundary

BOUNDARIES: Final[tuple[HostBoundary, ...]] = ("cpu_package", "dram", "platform")
# More than any part can draw, so that a wrap is told from a restart. The largest sockets are rated
# 500 W (Intel ARK, Xeon 6980P; AMD EPYC 9965 product page), and brief peaks stay below twice that;
# a socket's memory and a whole platform get the same margin over what is built.
LIMIT_WATTS: Final[dict[HostBoundary, int]] = {
    "cpu_package": 1_000,
    "dram": 500,
    "platform": 5_000,
}
DIGITS_MAX: Final = 20  # a 64-bit counter; anything longer is no reading
_ZONE = re.compile(r"intel-rapl:\d+(:\d+)*")
_NUMBER = re.compile(r"\d{1,20}")


class RaplMeter:
    """The powercap tree below a directory, `/sys/class/powercap` on a real node."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, boot_ns: int) -> EnergyReadings:
        """Every boundary's counters now; a boundary with an unreadable zone is absent whole."""
        del boot_ns
        try:
            zones = self._zones()
        except OSError:
            return EnergyReadings(readings={}, absent=dict.fromkeys(BOUNDARIES, "no_powercap"))
        readings: dict[HostBoundary, EnergyReading] = {}
        absent: dict[HostBoundary, str] = {}
        for boundary in BOUNDARIES:
            try:
                counters = _counters(zones.get(boundary, {}), boundary)
            except HostReadError as error:
                absent[boundary] = error.reason
            else:
                readings[boundary] = EnergyReading(source="rapl", counters=counters)
        if not zones:
            absent = dict.fromkeys(BOUNDARIES, "no_powercap")
        return EnergyReadings(readings=readings, absent=absent)

    def close(self) -> None:
        """Nothing is held open."""

    def _zones(self) -> dict[HostBoundary, dict[str, Path]]:
        """Zones by boundary and name; two drivers may show one zone twice, it counts once."""
        found: dict[HostBoundary, dict[str, Path]] = {}
        names: dict[str, str] = {}
        folders = [path for path in self._root.iterdir() if _ZONE.fullmatch(path.name)]
        for folder in sorted(folders, key=_zone_order):
            try:
                name = (folder / "name").read_text(encoding="ascii").strip()
            except (OSError, UnicodeDecodeError):
                continue  # it vanished, or is no zone
            parent = names.get(folder.name.rpartition(":")[0], "")
            path = f"{parent}/{name}" if parent else name
            names[folder.name] = path
            boundary = _boundary(name, top=folder.name.count(":") == 1)
            if boundary is not None:
                found.setdefault(boundary, {}).setdefault(path, folder)
        return found


def _boundary(name: str, *, top: bool) -> HostBoundary | None:
    if name == "dram":
        return "dram"
    if top and name.startswith("package"):
        return "cpu_package"
    if top and name.startswith("psys"):
        return "platform"
    return None


def _counters(zones: dict[str, Path], boundary: HostBoundary) -> tuple[Counter, ...]:
    if not zones:
        raise HostReadError("no_such_zone")
    if boundary == "platform" and len(zones) > 1:
        raise HostReadError("several_platform_zones")
    return tuple(
        Counter(
            name=name,
            energy_uj=_number(folder / "energy_uj"),
            range_uj=_range_uj(folder),
            limit_watts=LIMIT_WATTS[boundary],
        )
        for name, folder in sorted(zones.items())
    )


def _range_uj(folder: Path) -> int:
    range_uj = _number(folder / "max_energy_range_uj")
    if range_uj == 0:
        raise HostReadError("not_a_number", str(folder))
    return range_uj


def _number(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except PermissionError as error:
        raise HostReadError("no_permission", str(path)) from error
    except FileNotFoundError as error:
        raise HostReadError("zones_changed", str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise HostReadError("not_readable", str(path)) from error
    if _NUMBER.fullmatch(text) is None:
        raise HostReadError("not_a_number", str(path))
    return int(text)


def _zone_order(path: Path) -> tuple[int, ...]:
    return tuple(_numbers(path.name.split(":")[1:]))


def _numbers(texts: Iterable[str]) -> Iterable[int]:
    return (int(text) for text in texts)
