"""The ladder at run time: each device's samples come from the best source that has them now.

The driver's samples pass through. Where they say less than pipes (no GPM on this device, or none
that can be read), what dcgm-exporter says of the same device takes the place of the coarse figure,
for exactly the time since the device's previous sample; when the exporter says nothing that can be
believed, the driver's own sample stands and says why. Time, energy, processes and clocks stay the
driver's: a slice has one tier, and its cycles have one source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.dcgm import RATIO_FIELDS
from flopledger_agent.gpus.dcgm_scraper import DcgmScraper
from flopledger_agent.gpus.dcgm_totals import CycleTotals, Silicon, TotalsPage
from flopledger_agent.gpus.gpm import TENSOR_ACTIVITY
from flopledger_agent.gpus.limits import KHZ_PER_MHZ, limits_of
from flopledger_core.records import TIERS
from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from fractions import Fraction

    from flopledger_agent.clocks import Clock
    from flopledger_agent.config import DcgmSection
    from flopledger_agent.gpus.dcgm import Page, Reading
    from flopledger_agent.gpus.dcgm_scraper import Exporter, Scrape
    from flopledger_agent.gpus.interface import GpuSample, GpuSource, NodeSample
    from flopledger_core.accelerators import AcceleratorTable
    from flopledger_core.records import Cycles, Device, Tier

# A device that the exporter has not looked at for so many of its intervals is stale, and so is a
# page that could not be fetched for so many of ours.
STALE_INTERVALS: Final = 3
# GPU_UTIL this high and profiling that saw nothing contradict each other at once; any use at all
# does on two pages in a row, because the two are not taken over the same second.
BUSY_PERCENT: Final = 95
DCGM_RANK: Final = TIERS.index("dcgm_pipes")
PIPE_RATIOS: Final = len(set(RATIO_FIELDS.values()))


class Freshness(msgspec.Struct, frozen=True, kw_only=True):
    """For how long what the exporter said may be used."""

    fetched_ns: int  # since its page could last be fetched
    looked_ns: int  # since its figures of a device last changed


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the exporter adds to a sample."""

    tier: Tier
    ratios: dict[str, Fraction]
    cycles: Cycles | None
    uncertain_cycles: int
    sm_clock_khz: int | None
    absent: dict[str, str]


class LadderSource:
    """Another source, whose coarse samples are improved by an exporter's page."""

    def __init__(
        self,
        source: GpuSource,
        exporter: Exporter,
        table: AcceleratorTable,
        freshness: Freshness,
    ) -> None:
        self._source = source
        self._exporter = exporter
        self._table = table
        self._freshness = freshness
        self._rungs: dict[str, _Rung] = {}

    def sample(self) -> NodeSample:
        """One reading of every device; never waits for the exporter."""
        node = self._source.sample()
        scrape = self._exporter.latest()
        for key in node.retired:
            self._rungs.pop(key, None)
        samples = tuple(self._improved(sample, scrape) for sample in node.samples)
        return msgspec.structs.replace(node, samples=samples)

    def pause(self) -> None:
        """Let the driver go; the exporter is somebody else's and goes on."""
        self._source.pause()
        self._rungs.clear()

    def resume(self) -> None:
        """Take the driver again."""
        self._source.resume()

    def close(self) -> None:
        """Let go of both."""
        self._exporter.close()
        self._source.close()

    def _improved(self, sample: GpuSample, scrape: Scrape) -> GpuSample:
        device = sample.device
        unused = device.gpu_instance is None and device.slices is not None
        # A sample that begins counting is left alone, too: its cycles are what comes next.
        if TIERS.index(sample.tier) <= DCGM_RANK or sample.cycles is not None or unused:
            self._rungs.pop(device.key, None)
            return sample
        told = self._told(sample, scrape)
        rung = self._rungs.get(device.key)
        if isinstance(told, str):
            if rung is not None:
                rung.totals.forget()
            return msgspec.structs.replace(sample, absent={**sample.absent, "dcgm": told})
        absent = {**sample.absent, **told.absent}
        absent.pop("utilization", None)
        if sample.sm_clock_khz is None and told.sm_clock_khz is not None:
            absent.pop("sm_clock_khz", None)
        if told.cycles is not None:
            absent.pop("cycles", None)
        return msgspec.structs.replace(
            sample,
            tier=told.tier,
            utilization=told.ratios,
            cycles=told.cycles,
            uncertain_cycles=told.uncertain_cycles,
            sm_clock_khz=told.sm_clock_khz,
            absent=absent,
        )

    def _told(self, sample: GpuSample, scrape: Scrape) -> _Told | str:
        """What the exporter adds, or the reason why it adds nothing."""
        page = scrape.page
        if page is None:
            return scrape.failure or "dcgm_not_asked_yet"
        if sample.boot_ns - scrape.page_boot_ns > self._freshness.fetched_ns:
            return scrape.failure or "dcgm_stale"
        reading = page.readings.get((sample.device.uuid, sample.device.gpu_instance))
        if reading is None:
            return scrape.failure or _why_missing(page, sample.device)
        rung = self._rungs.setdefault(sample.device.key, _Rung())
        silicon = self._silicon(sample.device)
        rung.follow(reading, scrape, sample, silicon, self._freshness)
        if sample.boot_ns - rung.changed_boot_ns > self._freshness.looked_ns:
            return "dcgm_stale"
        if rung.is_contradicted:
            return "dcgm_contradicts_gpu_util"
        return rung.told(sample, silicon)

    def _silicon(self, device: Device) -> Silicon:
        row = self._table.find(device.name, device.pci_device_id)
        return Silicon(
            sm_count=device.sm_count,
            limits=limits_of(row),
            fastest_khz=None if row is None else row.max_sm_clock_mhz * KHZ_PER_MHZ,
        )


def over(
    source: GpuSource,
    config: DcgmSection | None,
    clock: Clock,
    table: AcceleratorTable,
    node_name: str,
) -> GpuSource:
    """`source`, with the configured exporter above it; `source` itself where there is none."""
    if config is None:
        return source
    return LadderSource(source, DcgmScraper(config, clock, node_name), table, freshness_of(config))


def freshness_of(config: DcgmSection) -> Freshness:
    """Three intervals of each side; the exporter's are never taken for shorter than ours."""
    ours, theirs = config.interval_seconds, config.exporter_interval_seconds
    return Freshness(
        fetched_ns=int(STALE_INTERVALS * ours * NS_PER_SECOND),
        looked_ns=int(STALE_INTERVALS * max(ours, theirs) * NS_PER_SECOND),
    )


def _why_missing(page: Page, device: Device) -> str:
    return "dcgm_other_hosts_only" if device.uuid in page.elsewhere else "dcgm_device_not_on_page"


class _Rung:
    """What the exporter has said of one device, page after page."""

    def __init__(self) -> None:
        self.totals = CycleTotals()
        self.changed_boot_ns = 0
        self._sequence = -1
        self._reading: Reading | None = None
        self._was_idle_in_use = False  # the look before saw nothing although the device was in use
        self.is_contradicted = False

    def follow(
        self,
        reading: Reading,
        scrape: Scrape,
        sample: GpuSample,
        silicon: Silicon,
        freshness: Freshness,
    ) -> None:
        """Take note of a page; one that is known already changes nothing."""
        if scrape.sequence == self._sequence:
            return
        self._sequence = scrape.sequence
        if self._reading is not None and self._reading.signature == reading.signature:
            return
        self._reading = reading
        self.changed_boot_ns = scrape.page_boot_ns
        if reading.totals:
            self.totals.learn(
                TotalsPage(
                    totals=reading.totals,
                    boot_ns=scrape.page_boot_ns,
                    sm_clock_khz=sample.sm_clock_khz or reading.sm_clock_khz,
                    engine_ratio=reading.witnesses.get("engine"),
                ),
                silicon,
                late_ns=freshness.looked_ns,
            )
        else:
            self.totals.forget()
        self._hold_against_use(_used_ratio(reading, sample))

    def _hold_against_use(self, used: Fraction | int) -> None:
        """After some driver errors profiling reads zero until DCGM restarts (NVIDIA/DCGM#303)."""
        assert self._reading is not None
        seen = (*self._ratios().values(), *self._reading.witnesses.values())
        idle_in_use = bool(seen) and not any(seen) and used > 0
        self.is_contradicted = idle_in_use and (self._was_idle_in_use or used * 100 >= BUSY_PERCENT)
        self._was_idle_in_use = idle_in_use

    def _ratios(self) -> dict[str, Fraction]:
        """Shares by `Cycles` field: means between two pages before snapshots."""
        assert self._reading is not None, "a page is followed before anything is told of it"
        return {**self._reading.ratios, **self.totals.ratios()}

    def told(self, sample: GpuSample, silicon: Silicon) -> _Told | str:
        """The best of the newest reading, or the reason why there is nothing better in it."""
        reading = self._reading
        assert reading is not None
        ratios = self._ratios()
        if TENSOR_ACTIVITY & ratios.keys():
            tier: Tier = "dcgm_pipes"
        elif "sm_active" in ratios:
            tier = "sm_active"
            ratios = {"sm_active": ratios["sm_active"]}
        else:
            bad = reading.absent.get("any_tensor") or reading.absent.get("sm_active")
            begins = bool(TENSOR_ACTIVITY & reading.totals.keys())
            return bad or ("first_reading" if begins else "dcgm_not_exported")
        if TIERS.index(tier) >= TIERS.index(sample.tier):
            return "dcgm_not_exported"
        clock_khz = reading.sm_clock_khz if sample.sm_clock_khz is None else sample.sm_clock_khz
        if silicon.sm_count is None or clock_khz is None:
            return "no_sm_clock_or_count"
        cycles = self.totals.cycles(sample.boot_ns) if tier == "dcgm_pipes" else None
        absent = {f"utilization.{name}": why for name, why in reading.absent.items()}
        if tier == "sm_active":
            absent.setdefault("utilization.any_tensor", "dcgm_not_exported")
        elif len(ratios) + len(absent) < PIPE_RATIOS:
            absent["utilization.others"] = "dcgm_not_exported"
        return _Told(
            tier=tier,
            ratios=ratios,
            cycles=cycles,
            uncertain_cycles=0 if cycles is None else self.totals.uncertain_cycles(sample.boot_ns),
            sm_clock_khz=clock_khz,
            absent=absent,
        )


def _used_ratio(reading: Reading, sample: GpuSample) -> Fraction | int:
    """How much the device was used by the coarse figure: the exporter's, else the driver's."""
    if reading.gpu_util_ratio is not None:
        return reading.gpu_util_ratio
    return (sample.utilization or {}).get("sm_active", 0)
