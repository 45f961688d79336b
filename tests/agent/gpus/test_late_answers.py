"""What was read and never used: the next means still begin at the sample that was used last."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.agent.gpus.inline_worker import inline_node
from tests.agent.gpus.nodes import scenario

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample
    from flopledger_agent.gpus.simulated.driver import SimulatedDriver
    from tests.agent.gpus.inline_worker import Delivery

IN_TIME: tuple[Delivery, float] = ("in time", 1.0)
OLD_DRIVER = 'driver_version = "580.65.06"'
# Work changes all the time, so that a mean over another interval is another mean.
CHANGING = "".join(
    f"""
[[gpus.phases]]
seconds = {seconds}
sm_clock_mhz = 1755
power_watts = 500.0
sm_active = 0.9
pipes = {{ hmma = {hmma}, any_tensor = {hmma} }}
"""
    for seconds, hmma in zip((0.7, 1.3, 0.4, 2.1) * 12, (0.8, 0.1, 0.5, 0.3) * 12, strict=True)
)


@given(
    st.lists(
        st.tuples(st.sampled_from(("in time", "late", "never")), st.sampled_from((0.5, 1.0, 1.7))),
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None, phases=[Phase.generate])
def test_means_cover_the_time_since_the_sample_that_was_used_last(
    ticks: list[tuple[Delivery, float]],
) -> None:
    """Whichever answers come too late; each one that is used tells the whole time until it."""
    with inline_node(scenario("", head=OLD_DRIVER, phase=CHANGING)) as it:
        last: GpuSample | None = None
        told = 0
        for how, seconds in (*(IN_TIME,) * 3, *ticks, IN_TIME, IN_TIME, IN_TIME):
            it.deliver(how)
            samples = it.tick(seconds).samples
            assert how == "in time" or not samples
            for sample in samples:
                if last is not None and "hmma" in (sample.utilization or {}):
                    told += 1
                    check_mean(it.driver, last, sample)
                last = sample
        assert told >= 1


def check_mean(driver: SimulatedDriver, last: GpuSample, sample: GpuSample) -> None:
    """Against the simulator's exact integrals."""
    truth = driver.truth_between(last.boot_ns, sample.boot_ns).gpus[0].whole
    assert sample.utilization is not None
    expected = truth.active_cycles["hmma"] / truth.elapsed_cycles
    assert abs(sample.utilization["hmma"] - expected) < Fraction(1, 10**6)
