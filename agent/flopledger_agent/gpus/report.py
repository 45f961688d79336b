"""What can be seen of each GPU, and what to do about the rest: the words of `check`.

Pure: made from one tick's sample. Every reason a source gives is shown with its remedy; a tier that
is not the best one says what keeps it from being it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.nvml_errors import remedy_for
from flopledger_core.records import Tier

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample, NodeSample
    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.records import Device

BEST_TIER: Final = "gpm_cycles"
TIER_WORDS: Final[dict[str, str]] = {
    "gpm_cycles": "active cycles per pipe, counted by the GPU",
    "gpm_util": "share of time per pipe, times SMs and clock",
    "dcgm_pipes": "share of time per pipe as dcgm-exporter last saw it: the bounds span everything",
    "sm_active": "share of time in which SMs were active: an upper bound only",
    "gpu_util": "share of time in which anything ran: an upper bound only",
    "none": "no activity can be read",
}
DRIVER_WITH_GPM_CYCLES: Final = 595
COARSE_TIERS: Final = frozenset({"sm_active", "gpu_util", "none"})
WITHOUT_EXPORTER: Final = "a running dcgm-exporter would tell its pipes (docs/operating/dcgm.md)"
HIDDEN: Final = frozenset({"first_reading"})  # gone with the next sample


class Absence(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity that cannot be read, why, and what helps."""

    quantity: str
    reason: str
    remedy: str | None


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as `check` shows it; `tier` None: it could not be sampled."""

    uuid: str
    name: str
    tier: Tier | None
    why_not_higher: str | None
    in_table: bool
    sm_count: int | None
    absent: tuple[Absence, ...]
    failure: Absence | None
    part: str | None = None  # of a partitioned GPU: which


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every GPU of the node, and why there are none, if so."""

    driver: str | None
    failure: Absence | None
    gpus: tuple[GpuReport, ...]

    @property
    def is_complete(self) -> bool:
        """True when every GPU was sampled and nothing of it is absent."""
        return self.failure is None and all(
            gpu.failure is None and not gpu.absent and gpu.in_table for gpu in self.gpus
        )


def describe(node: NodeSample, table: AcceleratorTable) -> NodeReport:
    """What a tick shows; take the second one or a later one, the first begins the means."""
    sampled = [_sampled(sample, node.driver, table) for sample in node.samples]
    failed = [
        GpuReport(
            uuid=failure.device.key,
            name=failure.device.name,
            tier=None,
            why_not_higher=None,
            in_table=table.find(failure.device.name, failure.device.pci_device_id) is not None,
            sm_count=failure.device.sm_count,
            absent=(),
            failure=_absence("sample", failure.reason),
            part=_part(failure.device),
        )
        for failure in node.failures
    ]
    return NodeReport(
        driver=node.driver,
        failure=None if node.failure is None else _absence("node", node.failure),
        gpus=tuple(sorted(sampled + failed, key=lambda gpu: gpu.uuid)),
    )


def lines(report: NodeReport) -> tuple[str, ...]:
    """The report for people, a line at a time."""
    told = [f"NVIDIA driver: {report.driver or 'does not answer'}"]
    if report.failure is not None:
        told.append(f"no GPU could be sampled: {_sentence(report.failure)}")
    for gpu in report.gpus:
        told.append(f"{gpu.name} ({gpu.uuid})")
        if gpu.part is not None:
            told.append(f"  {gpu.part}; energy is apportioned")
        if gpu.failure is not None:
            told.append(f"  not sampled: {_sentence(gpu.failure)}")
            continue
        told.append(f"  tier {gpu.tier}: {TIER_WORDS.get(gpu.tier or '', 'see the glossary')}")
        if gpu.why_not_higher is not None:
            told.append(f"  why not better: {gpu.why_not_higher}")
        if not gpu.in_table:
            told.append("  not in the hardware table: its FLOP is absent; update flopledger")
        told += [f"  {absence.quantity}: {_sentence(absence)}" for absence in gpu.absent]
    return tuple(told)


def _sampled(sample: GpuSample, driver: str | None, table: AcceleratorTable) -> GpuReport:
    why = _why_not_higher(sample, driver)
    # The reason of a lower tier is told once, not again as a quantity.
    told = {"cycles", "dcgm"} if why is not None else set[str]()
    return GpuReport(
        uuid=sample.device.key,
        name=sample.device.name,
        tier=sample.tier,
        why_not_higher=why,
        in_table=table.find(sample.device.name, sample.device.pci_device_id) is not None,
        sm_count=sample.device.sm_count,
        absent=tuple(
            _absence(quantity, reason)
            for quantity, reason in sorted(sample.absent.items())
            if quantity not in told and reason not in HIDDEN
        ),
        failure=None,
        part=_part(sample.device),
    )


def _part(device: Device) -> str | None:
    """Which part of a partitioned GPU (MIG) a device is, in words."""
    slices = device.slices
    if slices is None:
        return None
    size = f"{slices.count} of {slices.of_count} slices"
    if device.gpu_instance is None:
        return f"{size} that no GPU instance uses"
    return f"GPU instance {device.gpu_instance}: {size}, {device.sm_count or 'unknown'} SMs"


def _why_not_higher(sample: GpuSample, driver: str | None) -> str | None:
    if sample.tier == BEST_TIER:
        return None
    reason = sample.absent.get("cycles")
    if reason is None:
        return None
    major = (driver or "").partition(".")[0]
    if (
        sample.tier == "gpm_util"
        and reason in {"driver_lacks_cycle_counters", "not_supported", "invalid_argument"}
        and major.isdecimal()
        and int(major) < DRIVER_WITH_GPM_CYCLES
    ):
        return (
            f"driver {driver} offers GPM percentages only; "
            f"cycle counters need R{DRIVER_WITH_GPM_CYCLES} or newer"
        )
    why = _sentence(_absence("cycles", reason))
    if sample.tier not in COARSE_TIERS:
        return why
    dcgm = sample.absent.get("dcgm")
    if dcgm is not None:
        return f"{why}; dcgm-exporter: {_sentence(_absence('dcgm', dcgm))}"
    return f"{why}; {WITHOUT_EXPORTER}" if reason == "gpm_not_supported" else why


def _absence(quantity: str, reason: str) -> Absence:
    return Absence(quantity=quantity, reason=reason, remedy=remedy_for(reason))


def _sentence(absence: Absence) -> str:
    return absence.reason if absence.remedy is None else f"{absence.reason}; {absence.remedy}"
