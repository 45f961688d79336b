"""What a number of the driver may be at most: an absurd one is absent with a reason, never used.

Pure. Limits are relative to what the hardware table says of the device; for a model the table
lacks, to what its architecture's models reach; without either, to what no device reaches. They are
far above every real reading: they catch values that cannot be (sentinels, garbage, a wrapped
counter), and never judge one that is merely high.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.units import NS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_core.accelerators import Accelerator

KHZ_PER_MHZ: Final = 1000
MW_PER_WATT: Final = 1000
# A clock or a power this many times the table's maximum is no reading: boards overshoot by tenths.
OUT_OF_RANGE_FACTOR: Final = 3
UNKNOWN_SM_CLOCK_KHZ_MAX: Final = 10_000_000  # 10 GHz: several times any GPU's clock
UNKNOWN_POWER_MW_MAX: Final = 20_000_000  # 20 kW: several times any board's power
# Counters may be older than this boot by so much (a restart that left the device running).
COUNTER_AGE_NS: Final = 90 * 24 * 3600 * NS_PER_SECOND
# A mean clock over an interval stays below the maximum by this factor, reading errors included.
MEAN_CLOCK_FACTOR: Final = 1.5
SM_CLOCK_KHZ_MIN: Final = 100_000  # 100 MHz: below every idle clock of a device that is awake


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The highest believable values of one device."""

    sm_clock_khz: int
    mean_clock_khz: int  # of one SM over an interval
    power_mw: int

    def energy_mj(self, uptime_ns: int) -> int:
        """The most an energy counter can have reached."""
        return self.power_mw * (max(0, uptime_ns) + COUNTER_AGE_NS) // NS_PER_SECOND

    def cycles(self, uptime_ns: int, sm_count: int) -> int:
        """The most a cumulative counter, summed over SMs, can have reached."""
        age_ns = max(0, uptime_ns) + COUNTER_AGE_NS
        return sm_count * self.mean_clock_khz * 1000 * age_ns // NS_PER_SECOND


def limits_of(row: Accelerator | None, max_sm_clock_khz: int | None = None) -> Limits:
    """The limits of a device by its row and the maximum clock its driver tells, if any.

    The row may be the stand-in of an architecture, which has the extremes of its models.
    """
    known = [] if row is None else [row.max_sm_clock_mhz * KHZ_PER_MHZ]
    if max_sm_clock_khz is not None and 0 < max_sm_clock_khz <= UNKNOWN_SM_CLOCK_KHZ_MAX:
        known.append(max_sm_clock_khz)
    clock = max(known, default=None)
    if clock is None:
        highest = mean = UNKNOWN_SM_CLOCK_KHZ_MAX
    else:
        highest, mean = OUT_OF_RANGE_FACTOR * clock, int(MEAN_CLOCK_FACTOR * clock)
    power = UNKNOWN_POWER_MW_MAX
    if row is not None:
        power = OUT_OF_RANGE_FACTOR * row.max_power_watts * MW_PER_WATT
    return Limits(sm_clock_khz=highest, mean_clock_khz=mean, power_mw=power)


UNKNOWN_LIMITS: Final = limits_of(None)
