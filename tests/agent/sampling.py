"""Hand-made samples and owners for metering tests, and a source that plays them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_agent.attribution.interface import Claim
from flopledger_agent.gpus.interface import DeviceFailure, GpuSample, NodeSample
from flopledger_core.identity import IDLE_OWNER, Owner
from flopledger_core.records import Cycles, Device

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flopledger_agent.attribution.interface import DeviceReading

SECOND_NS = 1_000_000_000
BOOT_NS = 50 * SECOND_NS
UNIX_NS = 1_764_000_000 * SECOND_NS  # a whole UTC minute
GPU = Device(uuid="GPU-1", name="NVIDIA H100 80GB HBM3", pci_device_id="2330", sm_count=132)


class TestClock:
    """A clock that stands until it is moved."""

    __test__ = False

    def __init__(self) -> None:
        self.now_ns = 0
        self.step_ns = 0

    def boottime_ns(self) -> int:
        """Never steps."""
        return BOOT_NS + self.now_ns

    def wall_unix_ns(self) -> int:
        """May step."""
        return UNIX_NS + self.now_ns + self.step_ns

    def sleep_seconds(self, virtual_seconds: float) -> float:
        """Tests do not sleep."""
        return 0.0 * virtual_seconds


def cycles(elapsed: int, tensor: int = 0) -> Cycles:
    """Cumulative counters of a device that only multiplies matrices."""
    return Cycles(elapsed=elapsed, sm_active=elapsed, any_tensor=tensor, hmma=tensor, imma=0,
                  dmma=0, dfma=0, fp64=0, fp32=0, fp16=0, integer=0)  # fmt: skip


def resting(elapsed: int) -> Cycles:
    """Cumulative counters of a device that never did anything."""
    return msgspec.structs.replace(cycles(elapsed), sm_active=0)


def sample(
    at_ns: int,
    counters: Cycles | None = None,
    energy_mj: int | None = 0,
    device: Device = GPU,
    absent: Mapping[str, str] | None = None,
) -> GpuSample:
    """One reading through cumulative counters."""
    return GpuSample(
        device=device, boot_ns=BOOT_NS + at_ns,
        tier="gpm_cycles" if counters is not None else "none",
        cycles=counters, utilization=None, sm_clock_khz=None, energy_mj=energy_mj,
        power_mw=None, processes=(), absent=dict(absent or {}),
    )  # fmt: skip


def node(
    at_ns: int, *samples: GpuSample, failures: tuple[DeviceFailure, ...] = (), step_ns: int = 0
) -> NodeSample:
    """One tick of the node."""
    return NodeSample(
        boot_ns=BOOT_NS + at_ns, unix_ns=UNIX_NS + at_ns + step_ns, samples=samples,
        failures=failures, driver="595.71.05", failure=None,
    )  # fmt: skip


def claim(project: str | None = None, weight: int = 1, **owner: str) -> Claim:
    """A claim of a project, or idleness."""
    if project is None:
        return Claim(owner=IDLE_OWNER, weight=1, source="idle", evidence=None, precision=None,
                     precision_origin="unknown", user=None, flags=())  # fmt: skip
    return Claim(owner=Owner(kind="attributed", project=project, **owner), weight=weight,
                 source="environment", evidence="test", precision="bf16",
                 precision_origin="declared", user="alice", flags=())  # fmt: skip


class ScriptedSource:
    """Plays node samples in order; the test moves the clock."""

    def __init__(self, samples: Iterator[NodeSample]) -> None:
        self._samples = samples

    def sample(self) -> NodeSample:
        """The next one."""
        return next(self._samples)

    def pause(self) -> None:
        """The script says what a pause looks like."""

    def resume(self) -> None:
        """The script goes on."""

    def close(self) -> None:
        """Nothing to let go of."""


class FixedAttributor:
    """Answers with the claims it is set to."""

    def __init__(self, *claims: Claim) -> None:
        self.now = claims or (claim(),)

    def claims(
        self, processes: tuple[int, ...] | None, reading: DeviceReading | None = None
    ) -> tuple[Claim, ...]:
        """Whatever the test set."""
        del processes, reading
        return self.now

    def close(self) -> None:
        """Nothing to let go of."""
