"""Slow meters: power is integrated exactly, nobody waits for an answer, holes stay open."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.host.interface import HostReadError, PowerReading
from flopledger_agent.host.power import (
    HALF_MW_NS_PER_UJ,
    LIMIT_WATTS,
    NodePowerMeter,
    advanced,
    begin,
)
from tests.agent.sampling import BOOT_NS, SECOND_NS, TestClock

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENT_SECONDS = 20.0


class Script:
    """A reader that says what the test sets."""

    def __init__(self) -> None:
        self.now: PowerReading | str = PowerReading(power_mw=500_000)
        self.asked = 0

    def read(self) -> PowerReading:
        """The set answer, or the set failure."""
        self.asked += 1
        if isinstance(self.now, str):
            raise HostReadError(self.now)
        return self.now


class Bench:
    """A meter whose thread the test plays."""

    def __init__(self) -> None:
        self.clock = TestClock()
        self.script = Script()
        self.meter = NodePowerMeter(self.script, "redfish", self.clock, 10.0)
        self.meter._thread = threading.Thread()  # the test asks by itself

    def ask(self, seconds: float, now: PowerReading | str | None = None) -> None:
        """Let time pass, then ask."""
        self.clock.now_ns += int(seconds * SECOND_NS)
        if now is not None:
            self.script.now = now
        self.meter.ask()

    def shown(self, after_seconds: float = 0) -> int | str:
        """The counter some time after now, or why there is none."""
        said = self.meter.read(self.clock.boottime_ns() + int(after_seconds * SECOND_NS))
        if "node" in said.absent:
            return said.absent["node"]
        return said.readings["node"].counters[0].energy_uj


@given(
    readings=st.lists(
        st.tuples(st.integers(0, 10**8), st.integers(1, 10**11)), min_size=1, max_size=20
    )
)
def test_the_integral_is_the_exact_trapezoid(readings: list[tuple[int, int]]) -> None:
    """The sum of means times spans, without a rounding anywhere inside."""
    now_ns, integral = 7, begin(1_000, 7)
    expected, before = 0, 1_000
    for power_mw, span_ns in readings:
        now_ns += span_ns
        integral = advanced(integral, power_mw, now_ns)
        expected += (before + power_mw) * span_ns
        before = power_mw

    assert integral.half_mw_ns == expected
    assert integral.until(now_ns) == expected


def test_a_steady_load_is_metered_without_lag() -> None:
    """500 W for 25 seconds are 12.5 kJ, also where the last answer was 5 seconds ago."""
    bench = Bench()
    bench.ask(0)
    bench.ask(10)
    bench.ask(10)
    assert bench.shown(after_seconds=5) == 12_500 * 10**6


def test_a_counter_never_goes_back() -> None:
    """Power held too long is worked off before anything is added."""
    bench = Bench()
    bench.ask(0)
    assert bench.shown(after_seconds=10) == 5_000 * 10**6
    bench.ask(10, PowerReading(power_mw=0))
    assert bench.shown() == 5_000 * 10**6  # the trapezoid is 2500 J
    bench.ask(10, PowerReading(power_mw=500_000))
    assert bench.shown() == 5_000 * 10**6
    bench.ask(10)
    assert bench.shown() == 10_000 * 10**6  # 2.5 + 2.5 + 5 kJ: the truth again


def test_a_controller_that_stops_answering_is_absent_and_its_hole_stays_open() -> None:
    """Held for a minute, then absent with its reason; afterwards another counter begins."""
    bench = Bench()
    bench.ask(0)
    name = bench.meter.read(BOOT_NS).readings["node"].counters[0].name
    bench.ask(30, "timeout")
    assert isinstance(bench.shown(), int)
    bench.ask(31, "unauthorized")
    assert bench.shown() == "unauthorized"
    bench.ask(5, PowerReading(power_mw=500_000))
    assert bench.shown() == 0
    again = bench.meter.read(bench.clock.boottime_ns()).readings["node"].counters[0]
    assert again.name != name  # never compared with the one before the hole


def test_nonsense_is_refused() -> None:
    """More than any node draws is no power, and an answer without power says so."""
    bench = Bench()
    assert bench.shown() == "first_reading"
    bench.ask(0, PowerReading(power_mw=LIMIT_WATTS * 1_000 + 1))
    assert bench.shown() == "out_of_range"
    bench.ask(0, PowerReading())
    assert bench.shown() == "no_power_reading"


def test_a_counter_of_the_controller_is_taken_as_it_is() -> None:
    """It bridges dark time; its name is the same after a restart of the agent."""
    bench, other = Bench(), Bench()
    for one in (bench, other):
        one.ask(0, PowerReading(power_mw=500_000, energy_uj=77))
        assert one.shown(after_seconds=9) == 77
    names = {one.meter.read(BOOT_NS).readings["node"].counters[0].name for one in (bench, other)}
    assert names == {"controller"}


def test_the_loop_never_waits_for_a_controller_that_hangs() -> None:
    """Reading takes no time while the thread waits, and closing leaves it behind."""
    hang = threading.Event()
    entered = threading.Event()

    class Hanging:
        def read(self) -> PowerReading:
            """Hang."""
            entered.set()
            hang.wait(PATIENT_SECONDS)
            raise HostReadError("timeout")

    meter = NodePowerMeter(Hanging(), "ipmi", TestClock(), 10.0)
    began = time.monotonic()
    assert meter.read(BOOT_NS).absent == {"node": "first_reading"}
    assert entered.wait(PATIENT_SECONDS)
    assert meter.read(BOOT_NS).absent == {"node": "first_reading"}
    meter.close()
    took = time.monotonic() - began
    hang.set()
    assert took < 5


def test_the_thread_asks_by_itself() -> None:
    """The first reading starts it; closing ends it."""
    script = Script()
    meter = NodePowerMeter(script, "ipmi", TestClock(), 10.0)
    meter.read(BOOT_NS)
    until(lambda: meter.read(BOOT_NS).readings)
    thread = meter._thread
    meter.close()
    assert thread is not None
    until(lambda: not thread.is_alive())
    assert HALF_MW_NS_PER_UJ == 2 * 10**6


def until(condition: Callable[[], object]) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + PATIENT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
