"""Partitioned GPUs (MIG): the layout, and what the reader makes of it on the simulated driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.gpus.mig import LayoutUnclear, MigDevice, Profiles, layout, profiles_of
from flopledger_agent.gpus.nvml import Nvml
from flopledger_agent.gpus.report import describe, lines
from flopledger_agent.gpus.simulated.faults import Fault
from flopledger_core.accelerators import load_table
from flopledger_core.records import Device
from tests.agent.gpus.nodes import Node, node

if TYPE_CHECKING:
    from flopledger_agent.gpus.interface import GpuSample, NodeSample

TABLE = load_table()
H100 = "NVIDIA H100 80GB HBM3"
WHOLE = Device(uuid="GPU-1", name=H100, sm_count=132)
SEVEN = Profiles(of_count=7, sms_by_slices={1: 16, 2: 32, 3: 60, 4: 64, 7: 132})
LOST, UNKNOWN, NO_PERMISSION, NOT_SUPPORTED = 15, 999, 4, 3


def gpu(*instances: str, model: str = H100, extra: str = "") -> str:
    """A scenario of one partitioned GPU."""
    phase = "[[gpus.phases]]\nseconds = 1000.0\nsm_clock_mhz = 1700\npower_watts = 300\n"
    processes = "[processes.train]\npid = 4242\n[processes.tune]\npid = 4343\n"
    return f'[[gpus]]\nmodel = "{model}"\n{extra}\n{phase}{"".join(instances)}{processes}'


def instance(text: str, hmma: float = 0.5, processes: str = '["train"]') -> str:
    """One GPU instance at work."""
    return (
        f"[[gpus.instances]]\n{text}\n[[gpus.instances.phases]]\nseconds = 1000.0\n"
        f"pipes = {{ hmma = {hmma} }}\nprocesses = {processes}\n"
    )


TWO = gpu(instance("id = 1\nslices = 3"), instance("id = 5\nslices = 2", 0.25, '["tune"]'))


def by_part(tick: NodeSample) -> dict[int | None, GpuSample]:
    """The samples of one GPU by GPU instance."""
    assert not tick.failures, tick.failures
    return {sample.device.gpu_instance: sample for sample in tick.samples}


# --- the layout ------------------------------------------------------------------------------


@given(
    st.integers(1, 8).flatmap(
        lambda whole: st.tuples(st.just(whole), st.lists(st.integers(1, 4), max_size=8))
    ),
    st.integers(0, 10**15),
)
def test_parts_tile_the_gpu(found: tuple[int, list[int]], amount: int) -> None:
    """Whatever instances there are, the parts lie side by side and sum to the whole."""
    whole, sizes = found
    devices = [
        MigDevice(gpu_instance=9 - number, sm_count=8 * size, gpu_slices=size, compute_slices=size)
        for number, size in enumerate(sizes)
    ]
    profiles = Profiles(of_count=whole, sms_by_slices={})
    if sum(sizes) > whole:
        with pytest.raises(LayoutUnclear):
            layout(WHOLE, devices, profiles)
        return
    parts = layout(WHOLE, devices, profiles)
    slices = [part.slices for part in parts if part.slices is not None]

    assert len(slices) == len(parts) == len({part.key for part in parts})
    assert sum(each.part(amount) for each in slices) == amount
    assert [each.first_index for each in slices] == [
        sum(other.count for other in slices[:number]) for number in range(len(slices))
    ]
    assert sum(each.count for each in slices) == whole
    instances = [part.gpu_instance for part in parts if part.gpu_instance is not None]
    assert instances == sorted(instances)


def test_several_compute_instances_are_one_part() -> None:
    """The metered thing is the GPU instance: its SMs are its profile's, not one tenant's."""
    shared = [
        MigDevice(gpu_instance=2, sm_count=16, gpu_slices=3, compute_slices=1) for _ in range(2)
    ]
    instance_part, rest = layout(WHOLE, shared, SEVEN)

    assert (instance_part.key, instance_part.sm_count) == ("GPU-1/2", 60)
    assert (rest.key, rest.sm_count) == ("GPU-1", 72)


def test_a_layout_that_contradicts_itself_is_none() -> None:
    """Two compute instances that disagree on their GPU instance were read during a change."""
    torn = [
        MigDevice(gpu_instance=2, sm_count=16, gpu_slices=size, compute_slices=1) for size in (3, 2)
    ]
    with pytest.raises(LayoutUnclear):
        layout(WHOLE, torn, SEVEN)


def test_profiles_come_from_the_driver_else_from_the_table() -> None:
    """A driver that keeps its profiles from us is no reason to guess: the table knows, or none."""
    told = profiles_of({7: 98, 1: 14}, TABLE.by_key("H100 SXM"))
    untold = profiles_of({}, TABLE.by_key("H100 SXM"))

    assert told == Profiles(of_count=7, sms_by_slices={7: 98, 1: 14})
    assert untold is not None
    assert (untold.of_count, untold.sms_by_slices[3]) == (7, 60)
    assert profiles_of({}, None) is None


# --- the reader ------------------------------------------------------------------------------


def test_every_instance_is_sampled_on_its_own() -> None:
    """Cycles, SMs and processes are the instance's; the unused slices are one idle part."""
    with node(TWO) as it:
        it.warm()
        before, after = by_part(it.tick()), by_part(it.tick(10))
        truth = it.driver.truth_between(before[1].boot_ns, after[1].boot_ns).gpus[0].instances

    assert list(after) == [1, 5, None]
    for number, instance_id in enumerate((1, 5)):
        first, last = before[instance_id].cycles, after[instance_id].cycles
        assert first is not None
        assert last is not None
        assert (last.hmma or 0) - (first.hmma or 0) == truth[number].whole.active_cycles["hmma"]
        assert (last.elapsed or 0) - (first.elapsed or 0) == truth[number].whole.elapsed_cycles
    assert [(after[key].device.sm_count, after[key].processes) for key in (1, 5, None)] == [
        (60, (4242,)),
        (32, (4343,)),
        (40, ()),
    ]
    assert after[None].absent == {"cycles": "slices_not_configured"}
    assert (after[None].tier, after[None].cycles) == ("none", None)


def test_energy_is_not_repeated_per_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 4 of the peers' complaints: one reading of the GPU, cut into parts that sum to it."""
    readings: list[int] = []
    real = Nvml.energy_mj

    def counted(self: Nvml, handle: Any) -> int:
        readings.append(real(self, handle))
        return readings[-1]

    monkeypatch.setattr(Nvml, "energy_mj", counted)
    with node(TWO) as it:
        it.warm()
        readings.clear()
        parts = by_part(it.tick())

    assert len(readings) == 1
    assert sum(sample.energy_mj or 0 for sample in parts.values()) == readings[0]
    assert {sample.energy_counter_mj for sample in parts.values()} == {readings[0]}
    assert {sample.boot_ns for sample in parts.values()} == {parts[1].boot_ns}


def test_processes_of_every_compute_instance_hold_the_gpu_instance() -> None:
    """Tenants of one GPU instance share it; nobody else's processes are theirs."""
    text = gpu(instance("id = 3\nslices = 4\ncompute_instances = 2", 0.5, '["train", "tune"]'))
    with node(text) as it:
        it.warm()
        parts = by_part(it.tick())

    assert parts[3].processes == (4242, 4343)
    assert parts[3].device.sm_count == 64
    assert parts[None].processes == ()


def test_without_a_compute_instance_gpm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can run: no GPM call, the reason, and the energy of the whole GPU all the same."""
    asked: list[int] = []
    monkeypatch.setattr(Nvml, "gpm_mig_sample", lambda *_arguments: asked.append(1))
    monkeypatch.setattr(Nvml, "gpm_sample", lambda *_arguments: asked.append(2))
    with node(gpu("[[gpus.instances]]\nid = 1\nslices = 3\ncompute_instances = 0\n")) as it:
        it.warm()
        parts = by_part(it.tick())

    assert list(parts) == [None]
    assert parts[None].absent["cycles"] == "no_compute_instance"
    assert parts[None].energy_mj == parts[None].energy_counter_mj
    assert asked == []


def test_mig_before_hopper_has_no_activity() -> None:
    """Without GPM an instance's tier is none, with the reason; utilisation is never guessed."""
    text = gpu(instance("id = 1\nslices = 3"), model="NVIDIA A100-SXM4-80GB")
    with node(text) as it:
        it.warm()
        parts = by_part(it.tick())

    assert (parts[1].tier, parts[1].utilization) == ("none", None)
    assert parts[1].absent["cycles"] == "gpm_not_supported"
    assert parts[1].processes == (4242,)
    assert parts[1].energy_mj is not None


def test_percentages_serve_where_cycles_are_not_counted() -> None:
    """Drivers before R595: the instance's ratios over its own interval."""
    with node(f'driver_version = "580.65.06"\n{TWO}') as it:
        it.warm()
        parts = by_part(it.tick())

    assert (parts[1].tier, parts[5].tier) == ("gpm_util", "gpm_util")
    assert [float((parts[key].utilization or {})["hmma"]) for key in (1, 5)] == [0.5, 0.25]


def test_trouble_of_one_instance_is_its_own() -> None:
    """An instance whose counters fail keeps its place; the others stay counted."""
    with node(TWO) as it:
        it.warm()
        placed = it.driver.devices[0].instances[0].device
        placed.set_faults((Fault(kind="metric_error", at_ns=0),))
        parts = by_part(it.tick())

    assert (parts[1].cycles, parts[5].tier) == (None, "gpm_cycles")
    assert parts[1].absent["cycles"] == "unknown_error"
    assert parts[1].energy_mj is not None


def test_a_lost_gpu_fails_in_every_part_and_comes_back() -> None:
    """Each part is reported as it was known, and metered again once the GPU answers."""
    with node(TWO) as it:
        known = {sample.device.key for sample in it.warm().samples}
        it.driver.inject(Fault(kind="lost"))
        tick = it.tick()
        it.driver.clear_faults()
        later = by_part(it.tick())

    assert {failure.device.key for failure in tick.failures} == known
    assert {failure.reason for failure in tick.failures} == {"gpu_is_lost"}
    assert (tick.samples, tick.retired) == ((), ())
    assert later[1].tier == "gpm_cycles"


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("nvmlDeviceGetMigMode", UNKNOWN),
        ("nvmlDeviceGetMaxMigDeviceCount", UNKNOWN),
        ("nvmlDeviceGetMigDeviceHandleByIndex", UNKNOWN),
        ("nvmlDeviceGetAttributes_v2", UNKNOWN),
        ("nvmlDeviceGetGpuInstanceId", NO_PERMISSION),
    ],
)
def test_passing_trouble_leaves_the_layout_as_it_was(function: str, code: int) -> None:
    """One bad answer about MIG neither loses a part nor makes another of it."""
    with node(TWO) as it:
        it.warm()
        before = by_part(it.tick())
        it.driver.inject(Fault(kind="error", code=code, functions=frozenset({function})))
        during = it.tick()

    assert by_part(during).keys() == before.keys()
    assert during.retired == ()
    assert by_part(during)[1].tier == "gpm_cycles"


@pytest.mark.parametrize("function", ["nvmlDeviceGetAttributes_v2", "nvmlDeviceGetGpuInstanceId"])
def test_a_gpu_that_never_tells_its_layout_is_one_device(function: str) -> None:
    """Its energy and time are metered whole, its activity is absent with the driver's reason."""
    with node(f'missing_functions = ["{function}"]\n{TWO}') as it:
        it.warm()
        parts = by_part(it.tick())

    assert list(parts) == [None]
    assert (parts[None].device.slices, parts[None].tier) == (None, "none")
    assert parts[None].absent["cycles"] == "function_not_found"
    assert parts[None].energy_mj == parts[None].energy_counter_mj


def test_profiles_that_are_kept_from_us_come_from_the_table() -> None:
    """An agent that may not see the MIG profiles still knows the slices of a known model."""
    name = "nvmlDeviceGetGpuInstanceProfileInfo"
    with node(TWO) as it:
        fault = Fault(kind="error", code=NO_PERMISSION, functions=frozenset({name}), at_ns=0)
        it.driver.inject(fault)
        it.warm()
        parts = by_part(it.tick())

    slices = [sample.device.slices for sample in parts.values()]
    assert [each and (each.count, each.of_count) for each in slices] == [(3, 7), (2, 7), (2, 7)]


def test_slices_nobody_knows_leave_the_gpu_whole() -> None:
    """An unknown model whose driver keeps its profiles: one device, with the reason."""
    text = gpu(instance("id = 1\nslices = 3"), model="NVIDIA X900", extra=(
        "sm_count = 64\nmax_sm_clock_mhz = 2000\npower_limit_watts = 500\nmemory_mib = 1000"
    ))  # fmt: skip
    name = "nvmlDeviceGetGpuInstanceProfileInfo"
    with node(f'missing_functions = ["{name}"]\n{text}') as it:
        it.warm()
        parts = by_part(it.tick())

    assert list(parts) == [None]
    assert parts[None].absent["cycles"] == "mig_slices_unknown"


def test_a_changed_layout_retires_what_it_ended() -> None:
    """Keys that are gone are named once; what is new is there in the same tick."""
    text = gpu(
        instance("id = 1\nslices = 3"),
        instance("id = 5\nslices = 2\nuntil_seconds = 4.5"),
        instance("id = 6\nslices = 1\nfrom_seconds = 4.5"),
    )
    with node(text) as it:
        ticks = [it.tick() for _ in range(7)]
        uuid = it.driver.devices[0].gpu.uuid

    retired = [tick.retired for tick in ticks]
    assert retired == [(), (), (), (), (f"{uuid}/5",), (), ()]
    assert [sample.device.gpu_instance for sample in ticks[4].samples] == [1, 6, None]
    assert by_part(ticks[4])[1].tier == "gpm_cycles"


def test_switching_mig_opens_the_gpu_anew() -> None:
    """A whole GPU becomes parts and a whole GPU again; nothing of the driver is left behind."""
    text = gpu(
        instance("id = 1\nslices = 3\nuntil_seconds = 8.5"),
        extra="mig_from_seconds = 4.5\nmig_until_seconds = 8.5",
    )
    with node(text) as it:
        kinds = [
            [(sample.device.gpu_instance, sample.tier) for sample in it.tick().samples]
            for _ in range(12)
        ]
        it.source.close()
        assert not it.driver.gpm_samples

    assert kinds[3] == [(None, "gpm_cycles")]
    assert kinds[7] == [(1, "gpm_cycles"), (None, "none")]
    assert kinds[11] == [(None, "gpm_cycles")]


def test_changing_layouts_leave_no_driver_memory() -> None:
    """Buffers of destroyed instances are given back."""
    rounds = 12
    instances = [
        instance(f"id = {1 + number % 2}\nslices = {1 + number % 3}\n"
                 f"from_seconds = {number + 0.5}\nuntil_seconds = {number + 1.5}")
        for number in range(rounds)
    ]  # fmt: skip
    with node(gpu(*instances)) as it:
        held = []
        for _ in range(rounds + 2):
            it.tick()
            held.append(len(it.driver.gpm_samples))
        it.source.close()
        assert not it.driver.gpm_samples

    assert max(held) <= 2


def test_known_parts_are_expected_from_the_start() -> None:
    """A source that begins while the GPU is away reports every part it was told of."""
    parts = (Device(uuid="GPU-x", gpu_instance=1, name=H100), Device(uuid="GPU-x", name=H100))
    with node(known=parts) as it:
        tick = it.tick()

    gone = {failure.device.key for failure in tick.failures if failure.reason == "device_missing"}
    assert gone == {"GPU-x", "GPU-x/1"}


def test_check_shows_each_part() -> None:
    """People see the instance, its slices, and why the rest counts nothing."""
    with node(TWO) as it:
        told = "\n".join(lines(describe(warmed(it), TABLE)))
        uuid = it.driver.devices[0].gpu.uuid

    assert f"{uuid}/1)" in told
    assert "GPU instance 5: 2 of 7 slices, 32 SMs" in told
    assert "2 of 7 slices that no GPU instance uses" in told


def warmed(it: Node) -> NodeSample:
    """A tick in which everything answers."""
    it.warm()
    return it.tick()
