"""Every call we make of the driver, failing in every way: what is told was read, or is absent.

A sweep over all functions of the library that a healthy node uses and over kinds of NVML codes, at
the start and in the middle of a run. Whatever happens to one GPU, the sample never raises, every
device is accounted for, no value is told that the driver did not give, and the other GPU misses
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pynvml
import pytest

from flopledger_agent.gpus.lanes import Patience
from flopledger_agent.gpus.nvml_errors import ERRORS
from flopledger_agent.gpus.simulated.faults import Fault
from tests.agent.gpus.inline_worker import InlineNode, inline_node
from tests.agent.gpus.nodes import scenario

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample, NodeSample

ALWAYS = """
[[gpus.phases]]
seconds = 100000.0
sm_clock_mhz = 1700
power_watts = 300
"""
BUSY = 'sm_active = 0.5\npipes = { hmma = 0.25 }\nprocesses = ["train"]\n'
PARTS = f"""
[[gpus.instances]]
id = 1
slices = 7
[[gpus.instances.phases]]
seconds = 100000.0
{BUSY}
"""
# Nobody of ours is replaced in the few seconds a case takes.
PATIENCE: Final = Patience(hang_seconds=1000.0, start_seconds=1000.0)
WHOLE: Final = scenario("", "", phase=ALWAYS + BUSY)
OLDER: Final = scenario("", "", phase=ALWAYS + BUSY, head='driver_version = "580.65.06"')
PARTED: Final = scenario(PARTS, PARTS, phase=ALWAYS)
# Without these a device cannot be found: the whole device may be dark.
FINDING: Final = frozenset(
    {
        "nvmlInitWithFlags",
        "nvmlDeviceGetCount_v2",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetHandleByUUID",
    }
)
# One of each kind: field or device or node, for good or in passing, unknown to the table.
CODES: Final = (2, 3, 4, 6, 7, 10, 13, 15, 18, 999, 12345)
CODES_PER_CASE: Final = 2
# Not a failure but what the driver says where nothing is.
ANSWERS: Final = frozenset({("nvmlDeviceGetMigDeviceHandleByIndex", 6)})
# A driver without this function has no MIG at all, so such a node does not exist.
IMPOSSIBLE: Final = (PARTED, "nvmlDeviceGetMigMode")


def calls_of(text: str) -> list[str]:
    """The functions of the library that a healthy node uses."""
    called: set[str] = set()

    class Noting:
        def __init__(self, library: Any) -> None:
            self._library = library

        def __getattr__(self, name: str) -> Any:
            called.add(name)
            return getattr(self._library, name)

    with inline_node(text, PATIENCE) as it:
        pynvml.nvmlLib = Noting(pynvml.nvmlLib)
        pynvml._nvmlGetFunctionPointer_cache.clear()
        it.run(4)
    return sorted(called - {"nvmlErrorString", "nvmlShutdown"})


CALLS_WHOLE: Final = calls_of(WHOLE)
CASES: Final = [
    pytest.param(text, function, id=f"{name}-{function}")
    for name, text in (("whole", WHOLE), ("older", OLDER), ("parts", PARTED))
    for function in calls_of(text)
    if (text, function) != IMPOSSIBLE and (text is not OLDER or function not in CALLS_WHOLE)
]


@pytest.mark.parametrize(("text", "function"), CASES)
@pytest.mark.parametrize("since_start", [True, False], ids=["at-start", "later"])
def test_whatever_a_call_answers_what_is_told_was_read(
    text: str, function: str, *, since_start: bool
) -> None:
    """For each code: absent with a reason or true; the other GPU as if nothing were."""
    for code in codes_of(text, function, since_start=since_start):
        fault = Fault(kind="error", code=code, functions=frozenset({function}))
        with inline_node(text, PATIENCE) as it:
            healthy = () if since_start else it.run(4).samples
            it.driver.inject(fault, 0)
            for _ in range(4):
                check(it, it.tick(), text)
            it.driver.clear_faults()
            lasting = code in ERRORS and ERRORS[code].lasting
            for _ in range(5):
                check(it, it.tick(), text)
            tick = it.tick()
            check(it, tick, text)
            if not lasting:
                assert not tick.failures, (code, tick.failures)
            if healthy and not lasting:
                told = {item.device.key: sorted(item.absent) for item in tick.samples}
                assert told == {item.device.key: sorted(item.absent) for item in healthy}, code


@pytest.mark.parametrize(
    ("text", "function"), [case for case in CASES if case.values[1] not in FINDING]
)
def test_a_function_that_the_driver_lacks_costs_its_own_field(text: str, function: str) -> None:
    """An older or odd library: the devices are sampled all the same, with everything else."""
    with inline_node(f'missing_functions = ["{function}"]\n{text}', PATIENCE) as it:
        tick = it.run(4)
        check(it, tick, None)
        assert not tick.failures
        for sample in tick.samples:
            fields = [sample.energy_mj, sample.power_mw, sample.processes, sample.sm_clock_khz]
            assert sum(field is None for field in fields) <= 1, sample.absent
            if "Gpm" not in function and text != PARTED:
                assert sample.tier in {"gpm_cycles", "gpm_util"}, sample.absent


def codes_of(text: str, function: str, *, since_start: bool) -> tuple[int, ...]:
    """A few for each case; over the functions of a node each code comes up again and again."""
    case = next(n for n, each in enumerate(CASES) if each.values == (text, function))
    first = case * CODES_PER_CASE * 2 + (CODES_PER_CASE if since_start else 0)
    codes = [code for code in CODES if (function, code) not in ANSWERS]
    return tuple(codes[(first + n) % len(codes)] for n in range(CODES_PER_CASE))


def check(it: InlineNode, tick: NodeSample, text: str | None) -> None:
    """What is told is true; with a `text` the second GPU is all there."""
    keys = [item.device.key for item in tick.samples]
    keys += [item.device.key for item in tick.failures]
    assert len(set(keys)) == len(keys)
    truth = it.driver.truth(it.clock.boottime_ns())
    for sample in tick.samples:
        true_to(sample, next(gpu for gpu in truth.gpus if gpu.uuid == sample.device.uuid))
    if text is not None and len(it.made[0].asked) > 3:  # scale found
        other = it.driver.devices[1].gpu.uuid
        assert other in {item.device.uuid for item in tick.samples}


def true_to(sample: GpuSample, gpu: Any) -> None:
    """Every value is the simulator's, or absent with a reason."""
    for name, value in (("power_mw", 300_000), ("sm_clock_khz", 1_700_000)):
        assert getattr(sample, name) in (None, value), name
        assert (getattr(sample, name) is None) == (name in sample.absent), name
    assert sample.processes in (None, (4242,)), sample.processes
    assert (sample.processes is None) == ("processes" in sample.absent)
    assert (sample.energy_mj is None) == ("energy_mj" in sample.absent)
    assert sample.energy_mj in (None, int(gpu.whole.energy_mj))
    if sample.cycles is not None:
        instances = gpu.instances
        whole = instances[0].whole if instances else gpu.whole
        truth = {"elapsed": whole.elapsed_cycles, "sm_active": whole.sm_active_cycles}
        truth |= {"hmma": whole.active_cycles["hmma"]}
        for name, value in truth.items():
            assert getattr(sample.cycles, name) in (None, int(value)), name
    else:
        assert "cycles" in sample.absent
    if sample.utilization is not None:
        assert sample.utilization.get("hmma", 1) > 0
        assert sample.utilization.get("sm_active", 1) > 0
