"""Node power from a slow meter: asked in a thread of its own, integrated over boot time.

A management controller takes up to seconds to answer and may not answer at all; nobody waits for
it. Power is integrated by trapezoids in integers; from the last reading to now it is held, so that
a window's energy does not lag, and what was held too long is worked off before anything is added.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.host.interface import (
    Counter,
    EnergyReading,
    EnergyReadings,
    HostReadError,
)
from flopledger_core.units import NS_PER_MS, NS_PER_SECOND

if TYPE_CHECKING:
    from flopledger_agent.clocks import Clock
    from flopledger_agent.host.interface import PowerReader, PowerReading
    from flopledger_core.records import HostEnergySource

HALF_MW_NS_PER_UJ: Final = 2_000_000  # 1 mW for 1 ns is 1e-12 J; the integral counts halves of it
# More than a node draws: a whole NVL72 rack is rated about 132 kW (NVIDIA GB200 NVL72 data sheet).
LIMIT_WATTS: Final = 200_000
STALE_INTERVALS: Final = 3  # a controller that missed so many questions is not followed any more
STALE_SECONDS_MIN: Final = 60.0  # controllers pause for about that long when they are busy
STOP_SECONDS: Final = 1.0  # how long closing waits; a thread in a hung call is left behind


class Integral(msgspec.Struct, frozen=True, kw_only=True):
    """Power integrated since an origin, in halves of a millijoule's billionth, exactly."""

    origin_ns: int
    half_mw_ns: int
    last_ns: int
    last_power_mw: int

    def until(self, boot_ns: int) -> int:
        """The integral at an instant at or after the last reading, whose power is held."""
        return self.half_mw_ns + 2 * self.last_power_mw * max(0, boot_ns - self.last_ns)


def begin(power_mw: int, boot_ns: int) -> Integral:
    """An integral that begins with this reading."""
    return Integral(origin_ns=boot_ns, half_mw_ns=0, last_ns=boot_ns, last_power_mw=power_mw)


def advanced(integral: Integral, power_mw: int, boot_ns: int) -> Integral:
    """The integral with one more reading: the mean of both powers times the time between."""
    span_ns = max(0, boot_ns - integral.last_ns)
    return Integral(
        origin_ns=integral.origin_ns,
        half_mw_ns=integral.half_mw_ns + (integral.last_power_mw + power_mw) * span_ns,
        last_ns=max(boot_ns, integral.last_ns),
        last_power_mw=power_mw,
    )


class NodePowerMeter:
    """The energy of the boundary `node` from a power reader; implements `EnergyMeter`."""

    def __init__(
        self,
        reader: PowerReader,
        source: HostEnergySource,
        clock: Clock,
        interval_seconds: float,
    ) -> None:
        self._reader = reader
        self._source: HostEnergySource = source
        self._clock = clock
        self._interval_seconds = interval_seconds
        stale_seconds = max(STALE_SECONDS_MIN, STALE_INTERVALS * interval_seconds)
        self._stale_ns = int(stale_seconds * NS_PER_SECOND)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._integral: Integral | None = None
        self._energy_uj: int | None = None  # the controller's own counter, where it has one
        self._answered_ns: int | None = None
        self._reason: str | None = None
        self._shown_uj = 0  # a cumulative counter never goes back

    def read(self, boot_ns: int) -> EnergyReadings:
        """What the thread knows, at once; the first call starts it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._source, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread to be had: try again next time
                self._thread = None
        with self._lock:
            counter = self._counter(boot_ns)
            reason = self._reason
        if counter is None:
            return EnergyReadings(readings={}, absent={"node": reason or "first_reading"})
        reading = EnergyReading(source=self._source, counters=(counter,))
        return EnergyReadings(readings={"node": reading}, absent={})

    def ask(self) -> None:
        """Ask the controller once and remember what it said; waits as long as the reader does."""
        began_ns = self._clock.boottime_ns()
        try:
            reading = self._reader.read()
        except HostReadError as error:
            with self._lock:
                self._reason = error.reason
            return
        # The controller measured somewhere between question and answer.
        self._learn(reading, (began_ns + self._clock.boottime_ns()) // 2)

    def close(self) -> None:
        """End the thread, unless it hangs in a call: then it is left behind."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.ask()
            self._stop.wait(self._clock.sleep_seconds(self._interval_seconds))

    def _learn(self, reading: PowerReading, boot_ns: int) -> None:
        power_mw, energy_uj = reading.power_mw, reading.energy_uj
        with self._lock:
            if power_mw is not None and power_mw > LIMIT_WATTS * 1_000:
                self._reason = "out_of_range"
                return
            if power_mw is None and energy_uj is None:
                self._reason = "no_power_reading"
                return
            dark = self._answered_ns is None or boot_ns - self._answered_ns > self._stale_ns
            self._answered_ns = boot_ns
            self._reason = None
            self._energy_uj = energy_uj
            if energy_uj is not None or power_mw is None:
                self._integral = None
            elif dark or self._integral is None:  # nobody knows the power in between
                self._integral = begin(power_mw, boot_ns)
                self._shown_uj = 0
            else:
                self._integral = advanced(self._integral, power_mw, boot_ns)

    def _counter(self, boot_ns: int) -> Counter | None:
        """The counter to show, with the lock held; None: nothing, or nothing fresh."""
        if self._answered_ns is None:
            return None
        if boot_ns - self._answered_ns > self._stale_ns:
            self._reason = self._reason or "timeout"
            return None
        if self._energy_uj is not None:
            return Counter(
                name="controller",
                energy_uj=self._energy_uj,
                range_uj=None,
                limit_watts=LIMIT_WATTS,
            )
        if self._integral is None:
            return None
        reached = self._integral.until(boot_ns) // HALF_MW_NS_PER_UJ
        self._shown_uj = max(self._shown_uj, reached)
        return Counter(
            name=f"integral:{self._integral.origin_ns // NS_PER_MS}",
            energy_uj=self._shown_uj,
            range_uj=None,
            limit_watts=LIMIT_WATTS,
        )
