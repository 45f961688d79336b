"""XID errors: told once, with the reading or failure they belong to, or a reason why not."""

from __future__ import annotations

import msgspec
import pytest

from flopledger_agent.gpus.interface import GpuSample, NodeSample
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.meters import OTHER_XIDS, XIDS_PER_DEVICE_MAX, Meters
from tests.agent.gpus.nodes import PHASE, node, scenario
from tests.agent.sampling import GPU, SECOND_NS, sample
from tests.agent.sampling import node as node_sample

TWO = scenario("", "")


def xids(tick: NodeSample) -> dict[str, tuple[int, ...]]:
    """What was reported, by device key."""
    found = {item.device.key: item.xids for item in tick.samples}
    return found | {item.device.key: item.xids for item in tick.failures}


def test_an_error_is_told_once_at_its_device() -> None:
    """In the next tick, on no other device, and never again."""
    with node(TWO) as it:
        keys = [item.device.key for item in it.warm().samples]
        it.driver.inject(Fault(kind="xid", code=31), gpu=1)
        it.driver.inject(Fault(kind="xid", code=13), gpu=1)
        assert xids(it.tick()) == {keys[0]: (), keys[1]: (31, 13)}
        assert xids(it.tick()) == {keys[0]: (), keys[1]: ()}


def test_the_error_of_a_lost_device_comes_with_its_failure() -> None:
    """XID 79 is what says why it is lost; it must not wait for a device that never returns."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(Fault(kind="lost"), gpu=0)
        it.driver.inject(Fault(kind="xid"), gpu=0)
        [failure] = it.tick().failures
        assert (failure.reason, failure.xids) == ("gpu_is_lost", (79,))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ('missing_functions = ["nvmlEventSetCreate"]', "function_not_found"),
        ('missing_functions = ["nvmlDeviceRegisterEvents"]', "function_not_found"),
    ],
)
def test_a_driver_without_reports_says_so(head: str, reason: str) -> None:
    """Absent with the reason, and nothing else is missing."""
    with node(scenario(head=head)) as it:
        [found] = it.warm().samples
        assert (found.xids, found.absent, found.tier) == ((), {"xids": reason}, "gpm_cycles")


def test_a_device_that_offers_no_reports_says_so_alone() -> None:
    """NOT_SUPPORTED on one device is not the other's."""
    refusing = '[[gpus.faults]]\nkind = "error"\ncode = 3\nfunctions = ["nvmlDeviceRegisterEvents"]'
    with node(scenario(f"{PHASE}\n{refusing}", "")) as it:
        first, second = it.warm().samples
        assert (first.absent, second.absent) == ({"xids": "not_supported"}, {})
        it.driver.inject(Fault(kind="xid", code=31), gpu=1)
        assert list(xids(it.tick()).values()) == [(), (31,)]


def test_a_device_that_comes_back_is_registered_again() -> None:
    """After a reopening and after a return into the count, later errors are told."""
    with node(TWO) as it:
        it.warm()
        it.driver.inject(Fault(kind="vanish", for_ns=2 * SECOND_NS), gpu=1)
        it.tick()
        it.tick(4)
        it.driver.inject(Fault(kind="xid", code=45), gpu=1)
        assert list(xids(it.tick()).values()) == [(), (45,)]
        it.driver.inject_system(
            Fault(kind="error", code=1, functions=frozenset({"nvmlDeviceGetCount_v2"}),
                  for_ns=SECOND_NS // 2)
        )  # fmt: skip
        it.tick(0.1)
        it.tick()
        it.tick()
        it.driver.inject(Fault(kind="xid", code=48), gpu=0)
        assert sorted(xids(it.tick()).values()) == [(), (48,)]


def test_series_stay_bounded_whatever_a_driver_says() -> None:
    """The first kinds have a series each, the rest one together; nothing is lost of the count."""
    meters = Meters()
    for number in range(200):
        tick = node_sample(number, with_error(number))
        meters.add(tick, ())
    counts = meters.counts().xids

    assert len(counts) == XIDS_PER_DEVICE_MAX + 1
    assert counts[GPU.key, OTHER_XIDS] == 200 - XIDS_PER_DEVICE_MAX
    assert sum(counts.values()) == 200


def with_error(xid: int) -> GpuSample:
    """A sample with one error."""
    return msgspec.structs.replace(sample(xid), xids=(xid,))
