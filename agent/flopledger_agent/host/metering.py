"""Metering of the node itself: two host samples become a slice, slices a window, windows records.

Pure. CPU time is conserved: over the owners of a window, `idle` and `unattributed` among them, it
sums exactly to the CPUs times the window. Energy of each boundary is cut in proportion to CPU time,
idle time included. A counter that went back or may have wrapped unseen gives an absent quantity
with its reason, never a guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.host.interface import (
    ENERGY_QUANTITIES,
    EnergyReading,
    HostReadError,
    HostSample,
)
from flopledger_agent.host.windows import (
    IDLE_CPUS,
    UNOWNED,
    HostSlice,
    HostWindow,
    OwnerShare,
    cut,
    dark_record,
    extended,
    fits,
    window_records,
)
from flopledger_agent.metering import UNKNOWN_BOOT
from flopledger_agent.slices import CLOCK_STEP_MS
from flopledger_agent.windows import Closed
from flopledger_core.records import HostBoundary
from flopledger_core.units import MS_PER_MINUTE, NS_PER_MS, NS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_agent.host.interface import Counter, CpuTotals, OwnerTime

UJ_PER_WATT_SECOND: Final = 1_000_000
# A counter moves in steps, so a short slice may hold a step of the time before it: RAPL steps every
# millisecond, controllers at least once a minute.
STEP_NS: Final = NS_PER_SECOND
SLOW_STEP_NS: Final = 60 * NS_PER_SECOND


class HostAnchor(msgspec.Struct, frozen=True, kw_only=True):
    """The last reading of the host: where its next slice begins."""

    boot_ns: int
    unix_ns: int
    cpu_count: int | None
    busy_ns: int | None
    energy: dict[HostBoundary, EnergyReading]
    absent: dict[str, str]
    watched: bool = True  # False: nobody watched the processes from here to the next sample


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything host metering remembers; it is persisted with the rest of the memory."""

    anchor: HostAnchor | None = None
    window: HostWindow | None = None
    # Microjoules below a whole millijoule that closed windows left for the next one.
    carried_uj: dict[HostBoundary, int] = {}


EMPTY_HOST: Final = HostState()


def observe(
    state: HostState, sample: HostSample
) -> tuple[HostState, HostSlice | None, list[Closed]]:
    """Fold one sample into the state; also its slice, for the page, and what closed by it."""
    anchor = state.anchor
    closed: list[Closed] = []
    after = HostAnchor(
        boot_ns=sample.boot_ns,
        unix_ns=sample.unix_ns,
        cpu_count=None if sample.cpu is None else sample.cpu.cpu_count,
        busy_ns=None if sample.cpu is None else sample.cpu.busy_ns,
        energy=sample.energy,
        absent=sample.absent,
    )
    if anchor is None:
        return msgspec.structs.replace(state, anchor=after), None, closed
    if sample.boot_ns == anchor.boot_ns:
        return state, None, closed  # no time has passed: the next sample will cover it
    if sample.boot_ns < anchor.boot_ns:
        state, closed = close(state)
        closed.append(dark_record(anchor.unix_ns, sample.unix_ns, anchor.cpu_count))
        return HostState(anchor=after), None, closed
    piece = _slice(anchor, sample)
    if state.window is not None and not fits(state.window, piece):
        state, closed = close(state)
    window = extended(state.window, piece)
    return msgspec.structs.replace(state, anchor=after, window=window), piece, closed


def close(state: HostState) -> tuple[HostState, list[Closed]]:
    """Close the open window; the anchor stays, so time goes on without a hole."""
    if state.window is None:
        return state, []
    closed, carried = window_records(state.window, state.carried_uj)
    return msgspec.structs.replace(state, window=None, carried_uj=carried), closed


def resume(
    state: HostState, *, before_boot_id: str, boot_id: str, now_boot_ns: int, now_unix_ns: int
) -> tuple[HostState, list[Closed]]:
    """The state of a meter that starts again after a pause or a crash.

    In the same boot cumulative counters bridge the dark time; after a reboot it becomes a record
    whose quantities are absent.
    """
    state, closed = close(state)
    anchor = state.anchor
    if anchor is None:
        return state, closed
    if before_boot_id == boot_id != UNKNOWN_BOOT and now_boot_ns >= anchor.boot_ns:
        anchor = msgspec.structs.replace(anchor, watched=False)
        return msgspec.structs.replace(state, anchor=anchor), closed
    closed.append(dark_record(anchor.unix_ns, now_unix_ns, anchor.cpu_count))
    return EMPTY_HOST, closed


def is_due(state: HostState, now_unix_ns: int, window_minutes: int) -> bool:
    """True when the minute (or wider period) in which the open window began is over."""
    if state.window is None:
        return False
    now = now_unix_ns // NS_PER_MS // MS_PER_MINUTE // window_minutes
    return state.window.minute // window_minutes != now


def energy_between(before: EnergyReading, now: EnergyReading, span_ns: int) -> int:
    """Microjoules from one reading to the next, summed over its counters.

    Raises `HostReadError` when the counters are others, went back, or may have wrapped unseen.
    """
    if before.source != now.source:
        raise HostReadError("zones_changed")
    earlier = {counter.name: counter for counter in before.counters}
    if {counter.name for counter in now.counters} != set(earlier):
        known = any(counter.name in earlier for counter in now.counters)
        raise HostReadError("zones_changed" if known else "first_reading")
    return sum(_counted(earlier[counter.name], counter, span_ns) for counter in now.counters)


def _counted(before: Counter, now: Counter, span_ns: int) -> int:
    """What one counter counted: the only amount that its power limit leaves possible.

    A counter that wraps leaves amounts one range apart. With none below the limit it restarted,
    with several nobody knows.
    """
    step_ns = SLOW_STEP_NS if now.range_uj is None else STEP_NS
    limit_uj = now.limit_watts * UJ_PER_WATT_SECOND * (span_ns + step_ns) // NS_PER_SECOND
    delta = now.energy_uj - before.energy_uj
    if now.range_uj is None:
        if delta < 0 or delta > limit_uj:
            raise HostReadError("counter_restarted")
        return delta
    # The kernel's counter runs from zero to its range and both ends are values of it.
    modulus = max(now.range_uj + 1, before.energy_uj + 1, now.energy_uj + 1)
    delta %= modulus
    if delta > limit_uj:
        raise HostReadError("counter_restarted")
    if delta + modulus <= limit_uj:
        raise HostReadError("wraps_unknown")
    return delta


def _slice(anchor: HostAnchor, sample: HostSample) -> HostSlice:
    span_ns = sample.boot_ns - anchor.boot_ns
    absent = dict(sample.absent)
    flags: set[str] = set() if anchor.watched else {"recovered"}
    if abs((sample.unix_ns - anchor.unix_ns) - span_ns) > CLOCK_STEP_MS * NS_PER_MS:
        flags.add("clock_stepped")
    energy: dict[HostBoundary, int] = {}
    for boundary, quantity in ENERGY_QUANTITIES.items():
        reading, before = sample.energy.get(boundary), anchor.energy.get(boundary)
        if reading is None:
            absent.setdefault(quantity, "not_configured")
            continue
        if before is None:
            reason = anchor.absent.get(quantity, "not_readable_at_both_ends")
            absent[quantity] = reason if reason == "first_reading" else "not_readable_at_both_ends"
            continue
        try:
            energy[boundary] = energy_between(before, reading, span_ns)
        except HostReadError as error:
            absent[quantity] = error.reason
            flags |= {"counter_reset"} if error.reason == "counter_restarted" else set()
    cpu_count, shares = _cpu_shares(anchor, sample, span_ns, absent)
    return HostSlice(
        start_boot_ns=anchor.boot_ns,
        start_unix_ns=anchor.unix_ns,
        end_boot_ns=sample.boot_ns,
        cpu_count=cpu_count,
        shares=shares,
        energy_uj=energy,
        energy_sources={boundary: sample.energy[boundary].source for boundary in energy},
        absent=dict(sorted({**absent, "flop": "cpu_flop_not_counted"}.items())),
        flags=tuple(sorted(flags)),
    )


def _cpu_shares(
    anchor: HostAnchor, sample: HostSample, span_ns: int, absent: dict[str, str]
) -> tuple[int, tuple[OwnerShare, ...] | None]:
    """How many CPUs, and their time by owner; None where it could not be read."""
    cpu, before_ns = sample.cpu, anchor.busy_ns
    if cpu is None:
        absent.setdefault("cpu_time", "proc_not_readable")
        return anchor.cpu_count or 1, None
    if before_ns is None:
        absent["cpu_time"] = "not_readable_at_both_ends"
        return cpu.cpu_count, None
    if cpu.busy_ns < before_ns:
        absent["cpu_time"] = "counter_restarted"
        return cpu.cpu_count, None
    owners = sample.owners if anchor.watched else ()  # their time in the dark was not read
    return cpu.cpu_count, owner_shares(cpu, cpu.busy_ns - before_ns, span_ns, owners)


def owner_shares(
    cpu: CpuTotals, busy_ns: int, span_ns: int, owners: tuple[OwnerTime, ...]
) -> tuple[OwnerShare, ...]:
    """All CPU time of a slice by owner: it sums exactly to the CPUs times the span.

    Processes are read a moment after the node, and the kernel rounds both: where owners used more
    than the node was busy, the busy time is cut in proportion to what they used.
    """
    capacity_ns = cpu.cpu_count * span_ns
    busy_ns = min(busy_ns, capacity_ns)
    used = [owner.cpu_ns for owner in owners]
    if sum(used) > busy_ns:
        used = cut(busy_ns, used)
    result = [
        OwnerShare(claim=owner.claim, cpu_ns=part) for owner, part in zip(owners, used, strict=True)
    ]
    return (
        *result,
        OwnerShare(claim=UNOWNED, cpu_ns=busy_ns - sum(used)),
        OwnerShare(claim=IDLE_CPUS, cpu_ns=capacity_ns - busy_ns),
    )
