"""Counters of cycles that an exporter passes on late and in steps, made steady again. Pure.

A page is an exporter interval old at most, and changes once an interval. What was counted between
two pages is therefore handed out evenly over the time that follows: every counted cycle once, never
faster than the device's clock can run, about one interval late. What is handed out is cumulative,
so whoever takes differences gets each cycle in exactly one of them, and it comes with the most by
which it may lie behind the truth.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.gpus.gpm import (
    AGREEING_INTERVALS,
    TENSOR_ACTIVITY,
    Interval,
    Scale,
    contradicts,
    proven_scale,
)
from flopledger_core.records import CYCLE_FIELDS, Cycles
from flopledger_core.units import INT64_MAX, NS_PER_MS, ceil_div

if TYPE_CHECKING:
    from flopledger_agent.gpus.limits import Limits

# Handed out over so much more than the interval, so that a page that is a little late finds
# something left: counters that stand still are taken for frozen ones.
STRETCH: Final = Fraction(4, 3)


class Silicon(msgspec.Struct, frozen=True, kw_only=True):
    """What the scale of a counter is judged by."""

    sm_count: int | None
    limits: Limits
    fastest_khz: int | None  # the clock no handing out may exceed; None: unknown


class TotalsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Raw counters of one device, when they were fetched, and what else is known of the device."""

    totals: dict[str, int]  # by `Cycles` field, of unknown scale
    boot_ns: int
    sm_clock_khz: int | None
    engine_ratio: Fraction | None  # share of the time in which anything ran


class _Ramp(msgspec.Struct, frozen=True, kw_only=True):
    """Cumulative SM-cycles going evenly from one reading to the next."""

    before: dict[str, int]
    after: dict[str, int]
    start_boot_ns: int
    length_ns: int

    def at(self, boot_ns: int) -> dict[str, int]:
        """The counters at an instant."""
        part_ns = max(0, min(boot_ns - self.start_boot_ns, self.length_ns))
        return {
            name: value + (self.after[name] - value) * part_ns // self.length_ns
            for name, value in self.before.items()
        }


class CycleTotals:
    """The cycle counters of one device, page by page."""

    def __init__(self) -> None:
        self._last: TotalsPage | None = None
        self._scale: Scale | None = None
        self._candidate: Scale | None = None
        self._agreeing = 0
        self._ramp: _Ramp | None = None
        self._uncertain: tuple[int, int, int] = (0, 0, 0)  # see `uncertain_cycles`
        self._ratios: dict[str, Fraction] = {}

    def forget(self) -> None:
        """Another source told what the device did: what is still to hand out is void."""
        self._last, self._ramp, self._ratios = None, None, {}

    def learn(self, page: TotalsPage, silicon: Silicon, *, late_ns: int) -> None:
        """A page with new counters, which were at most `late_ns` old when it was fetched."""
        last, self._last = self._last, page
        if "elapsed" not in page.totals or not TENSOR_ACTIVITY & page.totals.keys():
            self.forget()
            return
        if last is None:
            return
        common = [name for name in CYCLE_FIELDS if name in page.totals and name in last.totals]
        counted = {name: page.totals[name] - last.totals[name] for name in common}
        interval_ns = page.boot_ns - last.boot_ns
        if interval_ns < NS_PER_MS or counted.keys() != page.totals.keys():
            self._ramp, self._ratios = None, {}
            return
        if min(counted.values()) < 0:  # restarted: what was counted in between is nobody's
            self._ramp, self._ratios = None, {}
            return
        elapsed = counted["elapsed"]
        self._ratios = {
            name: min(Fraction(1), Fraction(amount, elapsed))
            for name, amount in counted.items()
            if elapsed and name != "elapsed"
        }
        self._follow_scale(last, page, elapsed, silicon, late_ns)
        self._hand_out(last, page, interval_ns, silicon)
        self._bound(page, silicon, late_ns)

    def ratios(self) -> dict[str, Fraction]:
        """Shares of SM-cycles between the last two pages, by `Cycles` field; empty: unknown."""
        return self._ratios

    def cycles(self, boot_ns: int) -> Cycles | None:
        """Cumulative SM-cycles, summed over SMs, as of `boot_ns`; None while unknown."""
        if self._ramp is None:
            return None
        counters = self._ramp.at(boot_ns)
        return Cycles(**counters) if max(counters.values()) <= INT64_MAX else None

    def uncertain_cycles(self, boot_ns: int) -> int:
        """The most by which any of `cycles` may lie behind the truth at `boot_ns`, in SM-cycles.

        What is still to be handed out, and what the device can have done since the exporter looked.
        """
        if self._ramp is None:
            return 0
        looked_boot_ns, sm_count, khz = self._uncertain
        owed = self._ramp.after["elapsed"] - self._ramp.at(boot_ns)["elapsed"]
        return owed + ceil_div(max(0, boot_ns - looked_boot_ns) * sm_count * khz, NS_PER_MS)

    def _factor(self, silicon: Silicon) -> int | None:
        if self._scale is None or silicon.sm_count is None:
            return None
        return silicon.sm_count if self._scale == "mean" else 1

    def _bound(self, page: TotalsPage, silicon: Silicon, late_ns: int) -> None:
        khz = silicon.limits.mean_clock_khz
        self._uncertain = (page.boot_ns - late_ns, silicon.sm_count or 0, khz)

    def _hand_out(
        self, last: TotalsPage, page: TotalsPage, interval_ns: int, silicon: Silicon
    ) -> None:
        factor = self._factor(silicon)
        if factor is None or silicon.sm_count is None:
            self._ramp = None
            return
        after = {name: value * factor for name, value in page.totals.items()}
        before = {name: value * factor for name, value in last.totals.items()}
        if self._ramp is not None and self._ramp.before.keys() == after.keys():
            before = self._ramp.at(page.boot_ns)  # what a late ramp still owes goes on with it
        length_ns = int(interval_ns * STRETCH)
        if silicon.fastest_khz is not None:
            per_ms = silicon.sm_count * silicon.fastest_khz
            owed = after["elapsed"] - before["elapsed"]
            length_ns = max(length_ns, ceil_div(owed * NS_PER_MS, per_ms))
        self._ramp = _Ramp(
            before=before, after=after, start_boot_ns=page.boot_ns, length_ns=length_ns
        )

    def _follow_scale(
        self, last: TotalsPage, page: TotalsPage, elapsed: int, silicon: Silicon, late_ns: int
    ) -> None:
        """Learn whether the counters are summed over SMs, or hold the interval against it."""
        if silicon.sm_count is None:
            self._scale = None
            return
        interval_ns = page.boot_ns - last.boot_ns
        highest_khz = silicon.limits.mean_clock_khz
        if self._scale is not None:
            if contradicts(
                self._scale,
                cycles=elapsed,
                interval_ns=interval_ns + late_ns,
                sm_count=silicon.sm_count,
                mean_clock_khz_max=highest_khz,
            ):
                self._scale, self._candidate, self._agreeing = None, None, 0
            return
        engine = [last.engine_ratio, page.engine_ratio]
        found = proven_scale(
            Interval(
                cycles=elapsed,
                interval_ns=interval_ns,
                active_ratio=min(filter(None, engine)) if all(engine) else None,
                clock_khz=min(filter(None, (last.sm_clock_khz, page.sm_clock_khz)), default=None),
            ),
            sm_count=silicon.sm_count,
            mean_clock_khz_max=highest_khz,
        )
        if found is None:
            return
        self._agreeing = self._agreeing + 1 if found == self._candidate else 1
        self._candidate = found
        if self._agreeing >= AGREEING_INTERVALS:
            self._scale = found
