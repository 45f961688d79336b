"""Workers and drivers that say what no sound one says: bounded cost, nothing believed, no leak."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

import pynvml
import pytest

from flopledger_agent.clocks import SystemClock
from flopledger_agent.gpus.lanes import Patience
from flopledger_agent.gpus.selection import Selection
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_agent.gpus.supervisor import SupervisedSource
from flopledger_agent.gpus.worker_messages import Hello, framed
from flopledger_agent.gpus.worker_process import PipeWorker
from flopledger_core.records import Device
from tests.agent.gpus.inline_worker import inline_node
from tests.agent.gpus.nodes import scenario
from tests.agent.gpus.test_worker import wait_until

GPU: Final = Device(uuid="GPU-1", name="NVIDIA H100 80GB HBM3", sm_count=132)
DEADLINE_SECONDS: Final = 0.2
FLOOD: Final = "import os\nwhile True: os.write(1, b'\\0\\0\\0\\1x' * 10000)"
GARBAGE: Final = "import os, time\nos.write(1, os.urandom(100000))\ntime.sleep(60)"
HALF: Final = "import os, time\nos.write(1, b'\\0\\0\\0\\x40' + b'x' * 10)\ntime.sleep(60)"
HUGE: Final = "import os, time\nos.write(1, b'\\xff\\xff\\xff\\xff')\ntime.sleep(60)"


def source_of(made: list[PipeWorker], *command: str) -> SupervisedSource:
    """A supervised source whose workers are another program."""

    def launch() -> PipeWorker:
        made.append(PipeWorker(command))
        return made[-1]

    return SupervisedSource(
        SystemClock(), launch, time.monotonic, known=(GPU,), deadline_seconds=DEADLINE_SECONDS,
        patience=Patience(hang_seconds=0.3, start_seconds=0.3),
    )  # fmt: skip


@pytest.mark.parametrize("program", [FLOOD, GARBAGE, HALF, HUGE])
def test_a_worker_that_says_nonsense_costs_a_deadline_and_is_replaced(program: str) -> None:
    """Each tick is over in time, says why there is no sample, and every process ends."""
    made: list[PipeWorker] = []
    source = source_of(made, sys.executable, "-S", "-c", program)
    until = time.monotonic() + 20
    while len(made) < 3 and time.monotonic() < until:
        began = time.monotonic()
        tick = source.sample()
        assert time.monotonic() - began < DEADLINE_SECONDS + 2
        assert not tick.samples
        assert [item.device for item in tick.failures] == [GPU]
    source.close()
    assert len(made) >= 3
    wait_until(lambda: all(process.ended() for process in made))


def test_two_hundred_replacements_leave_no_descriptor_and_no_process() -> None:
    """Neither pipes nor dead children pile up, however often a worker dies."""
    made: list[PipeWorker] = []
    source = source_of(made, "/bin/true")
    source.sample()
    before = len(list(Path("/proc/self/fd").iterdir()))
    while len(made) < 200:
        source.sample()
        source._lane._backoff_ticks = 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    mine = {str(process.pid) for process in made}
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    assert len(mine & set(children)) <= 4
    source.close()
    wait_until(lambda: all(process.ended() for process in made))


def test_a_greeting_for_a_large_node_fits_into_the_pipe() -> None:
    """Hundreds of parts: it is written at once, before the worker has begun to read."""
    known = tuple(
        Device(uuid=f"GPU-{n:0>90}", name="N" * 128, gpu_instance=n % 64, sm_count=16)
        for n in range(512)
    )
    hello = Hello(known=known, selection=Selection(), scales={}, deadline_seconds=1.0,
                  simulated=None)  # fmt: skip
    worker = PipeWorker((sys.executable, "-S", "-c", "import time; time.sleep(60)"))
    content = framed(hello)
    assert len(content) > 100_000
    worker.send(content)
    worker.end(kill=True)
    wait_until(worker.ended)


def test_two_gpus_that_swap_their_places_are_both_read() -> None:
    """A GPU that was set apart comes back elsewhere in the list: its old place is not shunned."""
    with inline_node(scenario("", "", "")) as it:
        it.run(4)
        it.driver.inject(Fault(kind="lost"), 0)
        it.run(12)
        assert it.source.counts.running_workers >= 1
        devices = it.driver.devices
        it.driver.clear_faults()
        gone = it.driver.inject(Fault(kind="vanish"), 0)
        it.run(3)
        it.driver.clear_faults()
        assert gone.kind == "vanish"
        it.driver.devices = (devices[1], devices[0], devices[2])
        tick = it.run(80)
        assert {item.device.uuid for item in tick.samples} == {item.gpu.uuid for item in devices}


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("nvmlDeviceGetNumGpuCores", 2**32 - 128),
        ("nvmlDeviceGetNumGpuCores", 0),
        ("nvmlDeviceGetName", "x" * 500),
        ("nvmlDeviceGetName", ""),
        ("nvmlSystemGetDriverVersion", ""),
        ("nvmlDeviceGetCudaComputeCapability", (0, 0)),
        ("nvmlDeviceGetCudaComputeCapability", (-1, 1000)),
        ("nvmlDeviceGetPowerUsage", 2**32 - 1),
        ("nvmlDeviceGetTotalEnergyConsumption", 2**64 - 1),
        ("nvmlDeviceGetTotalEnergyConsumption", -1),
        ("nvmlDeviceGetClockInfo", 2**32 - 1),
        ("nvmlDeviceGetMaxClockInfo", 2**32 - 1),
        ("nvmlDeviceGetMigMode", [7, 7]),
    ],
)
def test_a_strange_value_costs_its_own_field(
    function: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However odd: the message to the agent stays sound, and every device is sampled."""
    monkeypatch.setattr(pynvml, function, lambda *_arguments: value)
    with inline_node(scenario("", "")) as it:
        tick = it.run(6)
        assert len(it.made) == 1, "the worker's answer could not be read"
        assert len(tick.samples) == 2, tick.failures


def test_a_device_without_a_usable_name_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A UUID that no record can hold: that device is reported by its place."""
    real = pynvml.nvmlDeviceGetUUID
    seen: list[str] = []

    def odd(handle: object) -> str:
        uuid = str(real(handle))
        if not seen:
            seen.append(uuid)
        return "" if uuid == seen[0] else uuid

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", odd)
    with inline_node(scenario("", "")) as it:
        tick = it.run(5)
        assert len(it.made) == 1
        assert [len(tick.samples), len(tick.failures)] == [1, 1]
        assert tick.failures[0].reason == "out_of_range"
