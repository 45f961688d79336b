"""The fault matrix: what each trouble of the driver shows, what it records, and how it ends.

Every row runs the whole agent on a simulated node in virtual time: healthy seconds, the trouble,
healthy seconds again, a clean stop. All rows hold this: time is recorded without hole or overlap,
nothing is recorded as zero that was not, a GPU that is not in trouble is metered to the millijoule
and the cycle, and everything is read again at the end without anybody's doing. The rows of the
hardware reference, section 7, carry its words in brackets. Troubles of processes, where a call
never returns, run real workers: see the end of this file.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from flopledger_agent.gpus.nvml_errors import remedy_for
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_core.records import GapRecord, UsageRecord
from tests.agent.gpus.nodes import scenario as text_of
from tests.agent.gpus.steered_worker import SteeredFault
from tests.agent.gpus.workers import supervised
from tests.agent.sampling import SECOND_NS
from tests.end_to_end.virtual_node import VirtualNode

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    from flopledger_agent.gpus.interface import NodeSample

HEALTHY_SECONDS = 8
TROUBLE_SECONDS = 12  # longer than a tick may be late, so it is dark time
RECOVERY_SECONDS = 25  # a node that could not be opened is tried after 16 ticks at the latest
ALL = frozenset({"energy", "cycles"})
ENERGY, CYCLES = frozenset({"energy"}), frozenset({"cycles"})

H100 = "NVIDIA H100 80GB HBM3"
GET_ENERGY = "nvmlDeviceGetTotalEnergyConsumption"
GET_POWER = "nvmlDeviceGetPowerUsage"
GET_CLOCK = "nvmlDeviceGetClockInfo"
GET_PROCESSES = "nvmlDeviceGetComputeRunningProcesses_v3"
GPM_SAMPLE, GPM_METRICS = "nvmlGpmSampleGet", "nvmlGpmMetricsGet"
INIT, COUNT = "nvmlInitWithFlags", "nvmlDeviceGetCount_v2"


def error(code: int, *functions: str) -> Fault:
    """An NVML code on these functions, or on all of a device."""
    return Fault(kind="error", code=code, functions=frozenset(functions) or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One trouble of one GPU (or the node) and what is promised of it.

    `failure`: why the device is not sampled meanwhile; None: it is, with `tier`, and `absent` says
    what is missing in its samples. `flag`: what its records carry. `noted`: what a record says is
    absent and why. `exact`: which totals equal the truth although it happened. `stays`: what is
    still absent at the end, where a driver that says it never will is not asked again.
    """

    name: str
    scope: str = "device"
    fault: Fault
    failure: str | None = None
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    tier: str = "gpm_cycles"
    flag: str | None = None
    noted: dict[str, str] = dataclasses.field(default_factory=dict)
    exact: frozenset[str] = ALL
    stays: bool = False
    driver: str = "595.71.05"
    xids: tuple[int, ...] = ()


def dark(name: str, fault: Fault, reason: str, **more: Any) -> Row:
    """A device that cannot be read at all: counters bridge the time, nobody's, flagged."""
    return Row(name=name, fault=fault, failure=reason, flag="recovered", **more)


def node_dark(name: str, fault: Fault, reason: str) -> Row:
    """A driver that does not answer: the same for every device."""
    return dark(name, fault, reason, scope="node")


ROWS = (
    # --- a device that cannot be read -----------------------------------------------------------
    dark("fell off the bus [GPU_IS_LOST on every call]", Fault(kind="lost"), "gpu_is_lost"),
    dark("fell off the bus [sometimes UNKNOWN 999]", error(999), "unknown_error"),
    dark("needs reset [RESET_REQUIRED]", error(16), "reset_required"),
    dark("vanished from the count", Fault(kind="vanish"), "device_missing"),
    dark("power cables [INSUFFICIENT_POWER]", error(8), "insufficient_power"),
    dark("interrupt [IRQ_ISSUE]", error(11), "interrupt_issue"),
    dark("not found [GPU_NOT_FOUND]", error(28), "gpu_not_found"),
    dark("changing its state [INVALID_STATE]", error(29), "invalid_state"),
    dark("not ready [NOT_READY]", error(27), "not_ready"),
    dark("forbidden by a cgroup [OPERATING_SYSTEM]", error(17), "blocked_by_system"),
    dark("no memory left [MEMORY]", error(20), "out_of_memory"),
    dark("slow on every call [TIMEOUT]", error(10), "driver_timeout"),
    dark("a code nobody listed", error(777), "unlisted_error"),
    # --- a device with one field missing --------------------------------------------------------
    Row(name="energy [NOT_SUPPORTED]", fault=error(3, GET_ENERGY), stays=True,
        absent={"energy_mj": "not_supported"}, noted={"energy_mj": "not_supported"},
        exact=CYCLES),
    Row(name="energy [FUNCTION_NOT_FOUND]", fault=error(13, GET_ENERGY), stays=True,
        absent={"energy_mj": "function_not_found"}, noted={"energy_mj": "function_not_found"},
        exact=CYCLES),
    Row(name="energy [NO_PERMISSION]", fault=error(4, GET_ENERGY), exact=CYCLES,
        absent={"energy_mj": "no_permission"}, noted={"energy_mj": "no_permission"}),
    Row(name="power [NOT_SUPPORTED]", fault=error(3, GET_POWER), stays=True,
        absent={"power_mw": "not_supported"}, noted={"power_mw": "not_supported"}),
    Row(name="power [UNKNOWN]", fault=error(999, GET_POWER),
        absent={"power_mw": "unknown_error"}, noted={"power_mw": "unknown_error"}),
    Row(name="clock [UNKNOWN]", fault=error(999, GET_CLOCK),
        absent={"sm_clock_khz": "unknown_error"}, noted={"sm_clock_khz": "unknown_error"}),
    Row(name="processes [NO_PERMISSION]", fault=error(4, GET_PROCESSES),
        absent={"processes": "no_permission"}, noted={"processes": "no_permission"}),
    Row(name="processes [INSUFFICIENT_SIZE]", fault=error(7, GET_PROCESSES),
        absent={"processes": "insufficient_size"}, noted={"processes": "insufficient_size"}),
    # --- counters -------------------------------------------------------------------------------
    Row(name="GPM sample [NOT_SUPPORTED]", fault=error(3, GPM_SAMPLE), stays=True,
        tier="gpu_util", absent={"cycles": "not_supported"}, noted={"cycles": "not_supported"},
        exact=ENERGY),
    Row(name="GPM sample [TIMEOUT]", fault=error(10, GPM_SAMPLE), tier="gpu_util",
        absent={"cycles": "driver_timeout"}, noted={"cycles": "driver_timeout"}, exact=ENERGY),
    Row(name="cycle counters [a metric's own NOT_SUPPORTED]", tier="gpm_util",
        fault=Fault(kind="metric_error", metrics=frozenset({248}), code=3),
        absent={"cycles": "driver_lacks_cycle_counters"},
        noted={"cycles": "driver_lacks_cycle_counters"}),
    Row(name="one counter [a metric's own UNKNOWN]",
        fault=Fault(kind="metric_error", metrics=frozenset({260}), code=999),
        absent={"cycles.fp16": "unknown_error"}, noted={"cycles.fp16": "unknown_error"}),
    Row(name="percentages [NaN], cycles unharmed", fault=Fault(kind="nan")),
    Row(name="percentages [NaN], an older driver", fault=Fault(kind="nan"), driver="580.65.06",
        tier="gpu_util", exact=ENERGY),
    Row(name="counters restart [new value < old]", fault=Fault(kind="counter_reset"),
        flag="counter_reset", noted={"cycles": "counter_restarted"}, exact=frozenset()),
    # --- reports --------------------------------------------------------------------------------
    Row(name="an XID while it works on", fault=Fault(kind="xid", code=31), flag="xid_error",
        xids=(31,)),
    # --- the node -------------------------------------------------------------------------------
    node_dark("driver not loaded [DRIVER_NOT_LOADED]", error(9, INIT, COUNT), "driver_not_loaded"),
    node_dark("driver upgraded [LIB_RM_VERSION_MISMATCH]", error(18, INIT, COUNT),
              "driver_version_mismatch"),
    node_dark("library state lost [UNINITIALIZED]", error(1, COUNT), "driver_uninitialized"),
    node_dark("library gone [LIBRARY_NOT_FOUND]", error(12, INIT, COUNT), "nvml_not_found"),
    node_dark("device files forbidden [OPERATING_SYSTEM]", error(17, INIT, COUNT),
              "blocked_by_system"),
    Row(name="the count alone fails [UNKNOWN]", scope="node", fault=error(999, COUNT)),
    Row(name="the count alone is slow [TIMEOUT]", scope="node", fault=error(10, COUNT)),
    Row(name="reports fail [UNKNOWN]", scope="node", fault=error(999, "nvmlEventSetWait_v2")),
    Row(name="GPM query fails [UNKNOWN]", scope="node", fault=error(999, GPM_METRICS),
        tier="gpu_util", absent={"cycles": "unknown_error"}, noted={"cycles": "unknown_error"},
        exact=ENERGY),
    dark("every GPU lost at once [GPU_IS_LOST]", Fault(kind="lost"), "gpu_is_lost", scope="all"),
    dark("every GPU says the driver is gone [LIB_RM_VERSION_MISMATCH]", error(18),
         "driver_version_mismatch", scope="all"),
)  # fmt: skip


def scenario_of(row: Row, phases: list[dict[str, object]]) -> dict[str, object]:
    """Two GPUs that do the same."""
    environ = {"FLOPLEDGER_PROJECT": "atlas", "FLOPLEDGER_PRECISION": "bf16"}
    return {
        "driver_version": row.driver,
        "processes": {"train": {"pid": 10_000_001, "create_time_unix": 1, "environ": environ}},
        "gpus": [{"model": H100, "phases": phases}] * 2,
    }


def node_of(row: Row) -> VirtualNode:
    """Two GPUs, both at work for a project."""
    phases: list[dict[str, object]] = [
        {"seconds": 100_000, "sm_clock_mhz": 1700, "power_watts": 612.5, "sm_active": 0.98,
         "pipes": {"hmma": 0.5, "fp32": 0.02}, "processes": ["train"]}
    ]  # fmt: skip
    return VirtualNode(scenario_of(row, phases))


@dataclasses.dataclass(frozen=True)
class Story:
    """What was seen of a row's node."""

    node: VirtualNode
    before: NodeSample
    meanwhile: tuple[NodeSample, ...]
    finally_seen: NodeSample
    records: list[Any]

    def of(self, gpu: int) -> list[Any]:
        """The records of one GPU, in time."""
        uuid = self.node.driver.devices[gpu].gpu.uuid
        mine = [r for r in self.records if isinstance(r, UsageRecord | GapRecord)]
        return sorted(
            (r for r in mine if r.device.uuid == uuid), key=lambda r: r.start_boot_ms or 0
        )

    def total(self, gpu: int, quantity: str) -> tuple[int, Fraction]:
        """What was metered of a quantity, and the truth of the same time."""
        records = self.of(gpu)
        start, end = records[0].start_boot_ms, records[-1].end_boot_ms
        truth = self.node.driver.truth_between(start * 10**6, end * 10**6).gpus[gpu].whole
        usage = [record for record in records if isinstance(record, UsageRecord)]
        if quantity == "energy":
            return sum(record.energy_mj or 0 for record in usage), truth.energy_mj
        return sum(record.cycles.hmma or 0 for record in usage), truth.active_cycles["hmma"]


def tell(row: Row) -> Story:
    """Run a row."""
    with node_of(row) as node:
        node.run(HEALTHY_SECONDS)
        before = last_seen(node)
        fault = dataclasses.replace(row.fault, for_ns=TROUBLE_SECONDS * SECOND_NS)
        if row.scope == "node":
            node.driver.inject_system(fault)
        else:
            node.driver.inject(fault, None if row.scope == "all" else 0)
        meanwhile: list[NodeSample] = []
        for _ in range(TROUBLE_SECONDS):
            node.run(1)
            meanwhile.append(last_seen(node))
        node.run(RECOVERY_SECONDS)
        seen = last_seen(node)
        node.stop()
        return Story(node, before, tuple(meanwhile), seen, node.records())


def last_seen(node: VirtualNode) -> NodeSample:
    """What the page shows now."""
    assert node.agent.view.sample is not None
    return node.agent.view.sample


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.scope}: {row.name}")
def test_a_trouble_of_the_driver_is_shown_recorded_and_over(row: Row) -> None:
    """One row of the matrix; see the module's text for what all of them hold."""
    story = tell(row)
    troubled = (0,) if row.scope == "device" else (0, 1)
    check_shown(row, story, troubled)
    for gpu in (0, 1):
        check_sound(story.of(gpu))
        if gpu not in troubled:
            check_untouched(story, gpu)
        else:
            check_recorded(row, story, gpu)
    check_recovered(row, story)


def check_shown(row: Row, story: Story, troubled: tuple[int, ...]) -> None:
    """Each tick says what is wrong; the page's time stamp of a device that fails stands still."""
    uuids = {story.node.driver.devices[gpu].gpu.uuid for gpu in troubled}
    last = story.meanwhile[-1]
    usual = {item.device.uuid: item.absent for item in story.before.samples}
    for tick in story.meanwhile[1:]:
        failed = {item.device.uuid: item.reason for item in tick.failures}
        assert failed == (dict.fromkeys(uuids, row.failure) if row.failure else {})
        for sample in tick.samples:
            if sample.device.uuid in uuids:
                assert sample.absent.items() >= row.absent.items()
                assert sample.tier == row.tier
            else:
                assert sample.absent == usual[sample.device.uuid]
    xids = [xid for tick in story.meanwhile for s in tick.samples for xid in s.xids]
    xids += [xid for tick in story.meanwhile for f in tick.failures for xid in f.xids]
    assert tuple(xids) == row.xids
    counts = story.node.agent.meters.counts()
    if row.failure is not None:
        assert remedy_for(row.failure)
        for uuid in uuids:
            assert counts.failures[uuid, row.failure] >= TROUBLE_SECONDS - 1
    if row.scope == "node" and row.failure is not None:
        assert (last.failure, last.driver) == (row.failure, None)
    assert sum(counts.xids.values()) == len(row.xids)


def check_sound(records: list[Any]) -> None:
    """No hole, no overlap, no zero or negative that nobody read: the device worked all the time."""
    assert records
    for earlier, later in pairwise(records):
        assert end_boot_ms(earlier) == later.start_boot_ms
    for record in records:
        if isinstance(record, GapRecord):
            assert record.reason
            continue
        assert record.gpu_time_ms == record.end_boot_ms - record.start_boot_ms
        for name, value in (("energy", record.energy_mj), ("cycles", record.cycles.elapsed)):
            assert value is None or value > 0, record
            assert value is not None or any(key.startswith(name) for key in record.absent)


def end_boot_ms(record: UsageRecord | GapRecord) -> int:
    """Where a record ends."""
    if isinstance(record, UsageRecord):
        return record.end_boot_ms
    assert record.start_boot_ms is not None
    return record.start_boot_ms + record.gap_ms


def check_untouched(story: Story, gpu: int) -> None:
    """The other GPU: not one millijoule or cycle is missing, nothing is flagged."""
    uuid = story.node.driver.devices[gpu].gpu.uuid
    [tier] = {item.tier for item in story.before.samples if item.device.uuid == uuid}
    for quantity in ALL:
        metered, truth = story.total(gpu, quantity)
        # Means are not counters: to a billionth (test_exact_metering says the same).
        derived = quantity == "cycles" and tier != "gpm_cycles"
        assert abs(metered - truth) <= (truth / 10**9 if derived else 0), quantity
    for record in story.of(gpu):
        assert isinstance(record, UsageRecord)
        assert (record.tier, record.flags) == (tier, ())
        assert record.owner.account == "atlas"


def check_recorded(row: Row, story: Story, gpu: int) -> None:
    """What the troubled device's records say."""
    records = [record for record in story.of(gpu) if isinstance(record, UsageRecord)]
    assert {flag for record in records for flag in record.flags} == (
        {row.flag} if row.flag else set()
    )
    for quantity in row.exact:
        metered, truth = story.total(gpu, quantity)
        assert metered == truth, quantity
    for quantity in ALL - row.exact:
        metered, truth = story.total(gpu, quantity)
        assert metered <= truth, quantity
    noted = [record for record in records if record.absent.items() >= row.noted.items()]
    assert noted, [record.absent for record in records]
    if row.flag == "recovered":
        [bridged] = [record for record in records if "recovered" in record.flags]
        assert bridged.owner.kind == "unattributed"
        assert bridged.gpu_time_ms > TROUBLE_SECONDS * 1000


def check_recovered(row: Row, story: Story) -> None:
    """Every device is read again with the best counters it has, and nobody did anything."""
    tick = story.finally_seen
    assert (tick.failures, tick.failure, len(tick.samples)) == ((), None, 2)
    if not row.stays:
        best = "gpm_cycles" if row.driver.startswith("595") else "gpm_util"
        assert all((s.tier, s.xids) == (best, ()) for s in tick.samples)
    counts = story.node.agent.meters.counts()
    assert len(set(counts.last_sample_unix_ns.values())) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Fault(kind="lost"), "gpu_is_lost"), (Fault(kind="vanish"), "device_missing"),
     (error(16), "reset_required"), (error(999), "unknown_error")],
)  # fmt: skip
def test_a_device_dark_for_more_than_an_hour_leaves_a_gap_with_its_reason(
    fault: Fault, reason: str
) -> None:
    """It is stated, not waited for, and what the counters say later is not counted into it."""
    row = dark("long", fault, reason)
    with node_of(row) as node:
        node.run(HEALTHY_SECONDS)
        node.driver.inject(fault, 0)
        node.run(3)
        node.clock.now_ns += 3600 * SECOND_NS
        node.run(3)
        node.driver.clear_faults()
        node.run(RECOVERY_SECONDS)
        seen = last_seen(node)
        node.stop()
        story = Story(node, seen, (), seen, node.records())
    gaps = [record for record in story.of(0) if isinstance(record, GapRecord)]

    # The rest of the dark time, from the statement to the next reading, follows on its own.
    assert [gap.reason for gap in gaps] == [reason, "dark_time"]
    assert gaps[0].gap_ms > 3600 * 1000
    check_sound(story.of(0))
    assert story.total(1, "energy")[0] == story.total(1, "energy")[1]
    assert len(story.finally_seen.samples) == 2


INSTANCE_ROWS = (
    ("fell off the bus [GPU_IS_LOST]", Fault(kind="lost"), "gpu_is_lost"),
    ("needs reset [RESET_REQUIRED]", error(16), "reset_required"),
    ("vanished from the count", Fault(kind="vanish"), "device_missing"),
    ("every call fails [UNKNOWN 999]", error(999), "unknown_error"),
)


@pytest.mark.parametrize(
    ("name", "fault", "reason"), INSTANCE_ROWS, ids=[f"instance: {row[0]}" for row in INSTANCE_ROWS]
)
def test_a_trouble_of_a_partitioned_gpu_is_one_of_each_instance(
    name: str, fault: Fault, reason: str
) -> None:
    """Each part says so; afterwards the parts' energy is the GPU's; the other GPU missed none."""
    del name
    work = {"seconds": 100_000, "sm_active": 0.9, "pipes": {"hmma": 0.5}, "processes": ["train"]}
    phases = [{"seconds": 100_000, "sm_clock_mhz": 1700, "power_watts": 300.5}]
    whole: list[dict[str, Any]] = [phases[0] | work | {"power_watts": 612.5}]
    row = dark("instances", fault, reason)
    scenario = scenario_of(row, whole)
    scenario["gpus"] = [
        {"model": H100, "phases": phases,
         "instances": [{"id": 1, "slices": 3, "phases": [work]}, {"id": 2, "slices": 2}]},
        {"model": H100, "phases": whole},
    ]  # fmt: skip
    with VirtualNode(scenario) as node:
        node.run(HEALTHY_SECONDS)
        before = last_seen(node)
        parts = {item.device.key for item in before.samples if item.device.slices is not None}
        node.driver.inject(dataclasses.replace(fault, for_ns=TROUBLE_SECONDS * SECOND_NS), 0)
        node.run(TROUBLE_SECONDS)
        meanwhile = last_seen(node)
        node.run(RECOVERY_SECONDS)
        seen = last_seen(node)
        node.stop()
        story = Story(node, before, (meanwhile,), seen, node.records())

    assert len(parts) == 3  # two instances and the slices nobody configured
    assert {f.device.key: f.reason for f in meanwhile.failures} == dict.fromkeys(parts, reason)
    assert [sample.device.slices for sample in meanwhile.samples] == [None]
    assert {item.device.key for item in seen.samples} == {
        item.device.key for item in before.samples
    }
    assert seen.failures == ()
    metered, truth = story.total(0, "energy")
    assert metered == truth
    check_untouched(story, 1)


# --- troubles of processes -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessRow:
    """A trouble that takes a process with it: two GPUs, real workers, real time."""

    name: str
    trouble: tuple[SteeredFault, ...] = ()
    signal: int | None = None  # to the worker
    shown: str | None  # None: nothing may be seen of it, so quickly is it over
    reads: int  # devices that are read in every tick meanwhile
    restart: str


PROCESS_ROWS = (
    ProcessRow(name="device: a call never returns [hang]", shown="timeout", reads=1,
               trouble=(SteeredFault(kind="hang", gpu=0),), restart="gpu_set_changed"),
    ProcessRow(name="device: one function never returns [hang]", shown="timeout", reads=1,
               trouble=(SteeredFault(kind="hang", gpu=0, functions=[GET_POWER]),),
               restart="gpu_set_changed"),
    ProcessRow(name="node: opening the driver never returns [hang]", shown="timeout", reads=0,
               trouble=(SteeredFault(kind="hang", functions=[INIT]),), signal=signal.SIGKILL,
               restart="died"),
    ProcessRow(name="node: the driver was upgraded [LIB_RM_VERSION_MISMATCH]", reads=0,
               trouble=(SteeredFault(kind="error", code=18, functions=[INIT, COUNT]),),
               shown="driver_version_mismatch", restart="driver_version_mismatch"),
    ProcessRow(name="node: the worker is killed", signal=signal.SIGKILL, shown=None,
               reads=2, restart="died"),
    ProcessRow(name="node: the worker stands still", signal=signal.SIGSTOP, shown="timeout",
               reads=0, restart="hung"),
)  # fmt: skip


@pytest.mark.parametrize("row", PROCESS_ROWS, ids=lambda row: row.name)
def test_a_trouble_of_a_process_is_shown_and_over(row: ProcessRow, tmp_path: Path) -> None:
    """The loop never waits beyond its deadline; the rest is read, and at the end all of it."""
    with supervised(tmp_path, text_of("", ""), deadline_seconds=0.5, hang_seconds=0.4) as it:
        first = it.warm(2)
        it.fail(*row.trouble)
        if row.signal is not None:
            os.kill(it.made[-1].pid, row.signal)
        if row.shown is not None:
            shown = it.until(lambda tick: row.shown in reasons(tick), 0.02)
            assert len(shown.samples) == row.reads
            assert len(shown.samples) + len(shown.failures) == 2
        it.until(lambda _: row.restart in it.source.counts.restarts, 0.02)
        it.fail()
        last = it.until(lambda tick: len(tick.samples) == 2)
        assert last.failures == ()
        assert max(it.took_seconds) < 5.0
    before = {sample.device.key: sample for sample in first.samples}
    for sample in last.samples:
        assert sample.tier == "gpm_cycles"
        assert (sample.energy_mj or 0) > (before[sample.device.key].energy_mj or 0)


def reasons(tick: NodeSample) -> set[str]:
    """Why devices were not sampled."""
    return {failure.reason for failure in tick.failures}
