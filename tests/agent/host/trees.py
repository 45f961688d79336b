"""Made-up powercap and proc trees, in the shapes that kernels show, and host samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.host.interface import (
    Counter,
    CpuTotals,
    EnergyReading,
    HostSample,
    OwnerTime,
)
from flopledger_core.identity import UNATTRIBUTED_OWNER, Owner
from tests.agent.sampling import BOOT_NS, UNIX_NS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flopledger_core.records import HostBoundary

RANGE_UJ = 262_143_328_850  # of a package of a Xeon Scalable
DRAM_RANGE_UJ = 65_712_999_613
TICK_NS = 10_000_000
KERNEL_FLAGS = 0x0020_8040


def zone(
    root: Path, folder: str, name: str, energy_uj: int | str, range_uj: int = RANGE_UJ
) -> Path:
    """One zone; the kernel shows subzones beside their parents, too."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def two_sockets(root: Path) -> Path:
    """An Intel server: two packages with memory, cores inside the packages."""
    (root / "intel-rapl").mkdir(parents=True, exist_ok=True)  # the control type itself
    for socket, (package, dram) in enumerate(((1_000_000, 200_000), (3_000_000, 400_000))):
        zone(root, f"intel-rapl:{socket}", f"package-{socket}", package)
        zone(root, f"intel-rapl:{socket}:0", "core", 900_000)
        zone(root, f"intel-rapl:{socket}:1", "dram", dram, DRAM_RANGE_UJ)
    return root


def amd(root: Path) -> Path:
    """An EPYC: package and core, no memory, no platform."""
    zone(root, "intel-rapl:0", "package-0", 5_000_000, 65_532_610_987)
    zone(root, "intel-rapl:0:0", "core", 4_000_000, 65_532_610_987)
    return root


def laptop(root: Path) -> Path:
    """One package shown by two drivers, and the platform."""
    zone(root, "intel-rapl:0", "package-0", 7_000_000)
    zone(root, "intel-rapl-mmio:0", "package-0", 6_999_999)
    zone(root, "intel-rapl:0:0", "core", 1)
    zone(root, "intel-rapl:0:1", "uncore", 1)
    zone(root, "intel-rapl:1", "psys", 9_000_000)
    return root


class ProcTree:
    """A `/proc` whose processes a test moves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.node()

    def node(self, *, busy_ticks: int = 0, idle_ticks: int = 0, steal: int = 0, guest: int = 0,
             cpus: int = 2) -> None:  # fmt: skip
        """The node's own counters: busy ticks as user time, of which `guest` in a guest."""
        line = f"{busy_ticks} 0 0 {idle_ticks} 0 0 0 {steal} {guest} 0"
        lines = [f"cpu  {line}", *(f"cpu{one} {line}" for one in range(cpus)), "intr 1", "btime 1"]
        (self.root / "stat").write_text("\n".join(lines) + "\n")

    def process(
        self,
        pid: int,
        *,
        ticks: int = 0,
        children_ticks: int = 0,
        parent: int = 1,
        start_ticks: int = 0,
        command: str = "train (x) y",
        environ: Mapping[str, str] | None = None,
        kernel: bool = False,
    ) -> None:
        """A process as it is now; `environ` None: not readable."""
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        flags = KERNEL_FLAGS if kernel else 0x40_0000
        (folder / "stat").write_text(
            f"{pid} ({command}) S {parent} {pid} {pid} 0 -1 {flags} 1 0 0 0 "
            f"{ticks - ticks // 3} {ticks // 3} {children_ticks} 0 20 0 1 0 {start_ticks} 0 0\n"
        )
        (folder / "environ").unlink(missing_ok=True)
        if environ is not None:
            text = "\0".join(f"{name}={value}" for name, value in environ.items())
            (folder / "environ").write_text(f"HOME=/\0{text}\0")

    def end(self, pid: int) -> None:
        """The process is gone."""
        for path in (self.root / str(pid)).iterdir():
            path.unlink()
        (self.root / str(pid)).rmdir()


def claim_of(owner: Owner, **changes: object) -> Claim:
    """A claim of an owner."""
    values = {"source": "environment", "evidence": "test", "user": "alice", "flags": (), **changes}
    return Claim(owner=owner, weight=1, precision=None, precision_origin="unknown", **values)  # type: ignore[arg-type]


class FakeOwners:
    """Judges by what the test says of each pid, and counts how often it is asked."""

    def __init__(self, **projects: str) -> None:
        self.projects = {int(name.removeprefix("pid")): value for name, value in projects.items()}
        self.tags: frozenset[int] = frozenset()
        self.number = 0
        self.asked: list[int] = []

    def version(self) -> int:
        """Moves with the tags."""
        return self.number

    def tagged(self) -> frozenset[int]:
        """Registered ones."""
        return self.tags

    def tag(self, *pids: int) -> None:
        """Register tags."""
        self.tags |= frozenset(pids)
        self.number += 1

    def claim(self, pid: int) -> Claim:
        """The owner the test gave."""
        self.asked.append(pid)
        project = self.projects.get(pid)
        if project is None:
            return claim_of(UNATTRIBUTED_OWNER, source="none")
        return claim_of(Owner(kind="attributed", project=project))


def reading(energy_uj: int, range_uj: int | None = RANGE_UJ, name: str = "package-0",
            limit_watts: int = 1_000) -> EnergyReading:  # fmt: skip
    """One counter of one package."""
    counter = Counter(name=name, energy_uj=energy_uj, range_uj=range_uj, limit_watts=limit_watts)
    return EnergyReading(source="rapl", counters=(counter,))


def host_sample(
    at_ns: int,
    busy_ns: int | None = 0,
    *owners: tuple[str, int],
    energy: Mapping[HostBoundary, EnergyReading] | None = None,
    cpu_count: int = 2,
    absent: Mapping[str, str] | None = None,
    step_ns: int = 0,
) -> HostSample:
    """One reading of the node at an instant after the test's origin."""
    cpu = None if busy_ns is None else CpuTotals(cpu_count=cpu_count, busy_ns=busy_ns)
    missing = {} if cpu is not None else {"cpu_time": "proc_not_readable"}
    return HostSample(
        boot_ns=BOOT_NS + at_ns,
        unix_ns=UNIX_NS + at_ns + step_ns,
        cpu=cpu,
        owners=tuple(
            OwnerTime(claim=claim_of(Owner(kind="attributed", project=name)), cpu_ns=used)
            for name, used in owners
        ),
        energy=dict(energy or {}),
        absent={**missing, **(absent or {})},
    )
