"""RAPL: each boundary is the sum of its own zones, and what cannot be read says why."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from flopledger_agent.host.rapl import RaplMeter
from flopledger_agent.host.reasons import REMEDIES
from tests.agent.host.trees import DRAM_RANGE_UJ, RANGE_UJ, amd, laptop, two_sockets, zone

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_agent.host.interface import EnergyReadings


def energies(said: EnergyReadings) -> dict[str, int]:
    """Microjoules by boundary."""
    return {
        boundary: sum(counter.energy_uj for counter in found.counters)
        for boundary, found in said.readings.items()
    }


def test_sockets_are_summed_and_cores_are_not_counted_twice(tmp_path: Path) -> None:
    """Two packages and their memory; `core` is inside the package."""
    said = RaplMeter(two_sockets(tmp_path)).read(0)

    assert energies(said) == {"cpu_package": 4_000_000, "dram": 600_000}
    assert said.absent == {"platform": "no_such_zone"}
    assert {counter.range_uj for counter in said.readings["cpu_package"].counters} == {RANGE_UJ}
    assert {counter.range_uj for counter in said.readings["dram"].counters} == {DRAM_RANGE_UJ}
    assert [counter.name for counter in said.readings["dram"].counters] == [
        "package-0/dram",
        "package-1/dram",
    ]


def test_amd_has_packages_and_no_memory(tmp_path: Path) -> None:
    """The same tree, fewer zones."""
    said = RaplMeter(amd(tmp_path)).read(0)

    assert energies(said) == {"cpu_package": 5_000_000}
    assert said.absent == {"dram": "no_such_zone", "platform": "no_such_zone"}


def test_a_zone_that_two_drivers_show_counts_once(tmp_path: Path) -> None:
    """`intel-rapl-mmio` shows the same package; `psys` is the platform."""
    root = laptop(tmp_path)
    zone(root, "intel-rapl:2", "package-0", 7_000_001)  # a third driver, under the same type
    said = RaplMeter(root).read(0)

    assert energies(said) == {"cpu_package": 7_000_000, "platform": 9_000_000}


def test_several_platforms_are_not_guessed_at(tmp_path: Path) -> None:
    """Nobody says whether they overlap."""
    root = laptop(tmp_path)
    zone(root, "intel-rapl:2", "psys-1", 1)

    assert RaplMeter(root).read(0).absent["platform"] == "several_platform_zones"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_counter_only_root_may_read_says_so(tmp_path: Path) -> None:
    """Since CVE-2020-8694 that is the default; one closed zone leaves the boundary absent."""
    root = two_sockets(tmp_path)
    (root / "intel-rapl:1" / "energy_uj").chmod(0)
    said = RaplMeter(root).read(0)

    assert said.absent["cpu_package"] == "no_permission"
    assert energies(said) == {"dram": 600_000}


def test_a_refused_counter_says_so_for_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where a container's policy refuses even root."""
    root = two_sockets(tmp_path)
    refused, read_text = root / "intel-rapl:1" / "energy_uj", type(root).read_text

    def refuse(path: Path, encoding: str | None = None) -> str:
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return read_text(path, encoding=encoding)

    monkeypatch.setattr(type(root), "read_text", refuse)
    said = RaplMeter(root).read(0)

    assert said.absent["cpu_package"] == "no_permission"
    assert energies(said) == {"dram": 600_000}
    assert "CVE-2020-8694" in REMEDIES["no_permission"]


@pytest.mark.parametrize("content", ["", "garbage", "-5", "1.5", "9" * 30, "12 13", "\x00", "٣"])
def test_garbage_is_no_reading(tmp_path: Path, content: str) -> None:
    """Whatever is in the file, only a whole number counts."""
    root = amd(tmp_path)
    (root / "intel-rapl:0" / "energy_uj").write_text(content)
    said = RaplMeter(root).read(0)

    assert said.readings == {}
    assert said.absent["cpu_package"] in {"not_a_number", "not_readable"}


def test_a_counter_without_a_range_is_no_counter(tmp_path: Path) -> None:
    """Without it nobody knows where it wraps."""
    root = amd(tmp_path)
    (root / "intel-rapl:0" / "max_energy_range_uj").write_text("0")
    assert RaplMeter(root).read(0).absent["cpu_package"] == "not_a_number"


def test_zones_may_vanish_and_come(tmp_path: Path) -> None:
    """The tree is listed anew each time; a half removed zone is not read as zero."""
    root = two_sockets(tmp_path)
    meter = RaplMeter(root)
    assert len(meter.read(0).readings["cpu_package"].counters) == 2
    (root / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.read(0).absent["cpu_package"] == "zones_changed"
    (root / "intel-rapl:1" / "name").unlink()
    assert len(meter.read(0).readings["cpu_package"].counters) == 1


@pytest.mark.parametrize("missing", [True, False])
def test_a_machine_without_rapl_says_so(tmp_path: Path, missing: bool) -> None:
    """No tree, or an empty one: virtual machines and other architectures."""
    root = tmp_path / "powercap" if missing else tmp_path
    said = RaplMeter(root).read(0)

    assert said.readings == {}
    assert set(said.absent.values()) == {"no_powercap"}
