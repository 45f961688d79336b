"""A ladder over whatever a test says that the driver and the exporter tell."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from flopledger_agent.gpus.interface import GpuSample, NodeSample
from flopledger_agent.gpus.ladder import Freshness, LadderSource
from flopledger_core.accelerators import load_table
from flopledger_core.records import Device
from tests.agent.gpus.exporter import ScriptedExporter
from tests.agent.sampling import SECOND_NS, TestClock, node

TABLE = load_table()
A100 = Device(
    uuid="GPU-34319582-d595-d1c7-d1d2-179bcfa61660",
    name="NVIDIA A100-SXM4-80GB",
    pci_device_id="20B2",
    sm_count=108,
)
FRESH = Freshness(fetched_ns=30 * SECOND_NS, looked_ns=90 * SECOND_NS)


def coarse(clock: TestClock, device: Device = A100, **fields: Any) -> GpuSample:
    """What the driver tells of a GPU without GPM in full use."""
    values: dict[str, Any] = {
        "device": device, "boot_ns": clock.boottime_ns(), "tier": "gpu_util", "cycles": None,
        "utilization": {"sm_active": Fraction(1)}, "sm_clock_khz": 1_410_000, "energy_mj": None,
        "power_mw": None, "processes": (), "absent": {"cycles": "gpm_not_supported"},
    }  # fmt: skip
    return GpuSample(**{**values, **fields})


class Rung:
    """A ladder over whatever `driver` is set to."""

    def __init__(self) -> None:
        self.clock = TestClock()
        self.exporter = ScriptedExporter(self.clock)
        self.driver: NodeSample = node(0)
        self.paused = False
        self.closed = False
        self.ladder = LadderSource(self, self.exporter, TABLE, FRESH)

    def sample(self) -> NodeSample:
        """The driver's."""
        return self.driver

    def pause(self) -> None:
        """Remember."""
        self.paused = True

    def resume(self) -> None:
        """Remember."""
        self.paused = False

    def close(self) -> None:
        """Remember."""
        self.closed = True

    def tick(self, *samples: GpuSample, seconds: float = 1.0) -> NodeSample:
        """Let time pass and sample; without samples the A100's coarse one."""
        self.clock.now_ns += round(seconds * SECOND_NS)
        self.driver = node(self.clock.now_ns, *(samples or (coarse(self.clock),)))
        return self.ladder.sample()

    def one(self, **fields: Any) -> GpuSample:
        """A tick of one device."""
        self.clock.now_ns += SECOND_NS
        self.driver = node(self.clock.now_ns, coarse(self.clock, **fields))
        (found,) = self.ladder.sample().samples
        return found
