"""Partitioned GPUs: what each instance did is metered exactly, nothing is lost or doubled."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flopledger_agent.exposition import AgentExposition
from flopledger_agent.stream import recall
from flopledger_core.accelerators import load_table
from flopledger_core.energy import energy_bounds
from flopledger_core.flop import basis
from flopledger_core.records import PIPES, GapRecord, UsageRecord
from flopledger_core.validation import findings
from tests.agent.sampling import BOOT_NS, SECOND_NS
from tests.end_to_end.test_exact_metering import H100, PROCESSES, PROJECT_OF
from tests.end_to_end.virtual_node import VirtualNode

TABLE = load_table()
A100 = "NVIDIA A100-SXM4-80GB"


def work(seconds: int, owners: list[str], hmma: float = 0.5, **more: object) -> dict[str, object]:
    """A stretch of steady work of an instance."""
    return {"seconds": seconds, "sm_active": 0.9, "power_watts": 50, "processes": owners,
            "pipes": {"hmma": hmma, "fp32": 0.02}, **more}  # fmt: skip


def instance(slices: int, *phases: dict[str, object], **more: object) -> dict[str, object]:
    """A GPU instance."""
    return {"slices": slices, "phases": list(phases), **more}


def scenario(
    *instances: dict[str, object], model: str = H100, clock_mhz: int = 1700, **more: object
) -> dict[str, object]:
    """A node with one partitioned GPU."""
    idle = [{"seconds": 10_000, "sm_clock_mhz": clock_mhz, "power_watts": 150.25}]
    gpu = {"model": model, "phases": idle, "instances": list(instances)} | more
    return {"driver_version": "595.71.05", "processes": PROCESSES, "gpus": [gpu]}


def own_time_ms(record: UsageRecord | GapRecord) -> int:
    """The device time of a record, by the rule that the ledger has."""
    return basis(record).get("gpu_time_ms", 0) + basis(record).get("gap_time_ms", 0)


def test_cycles_of_every_instance_are_exact() -> None:
    """Each instance's SM-cycles per pipe and owner equal the truth to the last digit."""
    text = scenario(
        instance(3, work(100, ["train"], 0.75), work(50, ["train"], 0.1), id=1),
        instance(2, work(40, ["tune"], 0.5), work(110, ["tune"], 0.25), id=3),
        instance(1, id=5),
    )
    with VirtualNode(text) as node:
        node.run(140)
        node.stop()
        records = [record for record in node.records() if record.tier == "gpm_cycles"]
        truths = node.truth_of(records).gpus[0].instances

    assert [truth.instance_id for truth in truths] == [1, 3, 5]
    for truth in truths:
        mine = [record for record in records if record.device.gpu_instance == truth.instance_id]
        for process, project in (*PROJECT_OF.items(), (None, "idle")):
            owned = [record for record in mine if record.owner.account == project]
            true = truth.owners.get(process)
            for pipe in PIPES:
                counted = sum(getattr(record.cycles, pipe) for record in owned)
                assert counted == (true.active_cycles[pipe] if true else 0), (project, pipe)
            elapsed = sum(record.cycles.elapsed for record in owned)
            assert elapsed == (true.elapsed_cycles if true else 0)


def test_mig_energy_is_never_repeated() -> None:
    """Row 4 of the peers' complaints: over all parts energy is the device's, counted once."""
    text = scenario(instance(3, work(200, ["train"])), instance(2, work(200, ["tune"])))
    with VirtualNode(text) as node:
        node.run(130)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]
        truth = node.truth_of(records).gpus[0]

    assert sum(record.energy_mj or 0 for record in records) == truth.whole.energy_mj
    assert all("apportioned" in record.flags for record in records)
    last = max(record.energy_counter_mj or 0 for record in records)
    assert last >= truth.whole.energy_mj  # the raw counter of the whole device stays as it is
    parts = {record.device.key: record.device.slices for record in records}
    assert sorted(slices.count for slices in parts.values() if slices) == [2, 2, 3]


def test_apportioned_energy_says_how_wrong_it_may_be() -> None:
    """Whatever an instance truly drew lies between the bounds of its apportioned energy."""
    text = scenario(
        instance(1, work(200, ["train"], power_watts=500)),
        instance(4, work(200, ["tune"], power_watts=0)),
    )
    with VirtualNode(text) as node:
        node.run(100)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]
        truths = node.truth_of(records).gpus[0].instances

    row = TABLE.by_key("H100 SXM")
    for truth in truths:
        sums: dict[str, int] = defaultdict(int)
        for record in records:
            if record.device.gpu_instance == truth.instance_id:
                for name, amount in basis(record).items():
                    sums[name] += amount
        bounds = energy_bounds(sums, row)
        assert bounds.low <= truth.whole.energy_mj
        assert bounds.high is None or truth.whole.energy_mj <= bounds.high
        assert bounds.low <= bounds.central <= (bounds.high or bounds.central)


def test_an_instance_without_gpm_has_no_cycles_and_its_energy() -> None:
    """MIG before Hopper: activity is absent with the reason, energy is apportioned."""
    text = scenario(instance(3, work(100, ["train"])), model=A100, clock_mhz=1400)
    with VirtualNode(text) as node:
        node.run(70)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]
        truth = node.truth_of(records).gpus[0]

    mine = [record for record in records if record.device.gpu_instance is not None]
    assert {record.tier for record in mine} == {"none"}
    assert {record.absent["cycles"] for record in mine} == {"gpm_not_supported"}
    assert {record.owner.account for record in mine} == {"atlas"}
    assert sum(record.energy_mj or 0 for record in records) == truth.whole.energy_mj


def test_slices_that_no_instance_uses_are_idle() -> None:
    """The rest of a GPU is a device of its own: idle, without cycles, with its energy."""
    with VirtualNode(scenario(instance(4, work(100, ["train"])))) as node:
        node.run(70)
        node.stop()
        rest = [record for record in node.records() if record.device.gpu_instance is None]

    assert {record.owner.account for record in rest} == {"idle"}
    assert {record.absent["cycles"] for record in rest} == {"slices_not_configured"}
    assert {record.tier for record in rest} == {"none"}
    assert {record.device.slices.count for record in rest} == {3}


def test_no_record_of_a_partitioned_gpu_is_disputed() -> None:
    """The collector's checks find nothing wrong with honest parts of a GPU."""
    text = scenario(
        instance(3, work(200, ["train", "tune"])),
        instance(2, until_seconds=70.5, id=9),
        instance(1, from_seconds=80.25, id=10),
        mig_until_seconds=100,
        mig_from_seconds=0,
    )
    gpu: Any = text["gpus"]
    gpu[0]["instances"][0]["until_seconds"] = 100
    gpu[0]["instances"][2]["until_seconds"] = 100
    with VirtualNode(text) as node:
        node.run(150)
        node.stop()
        batches = node.batches()

    assert batches
    assert [finding for batch in batches for finding in findings(batch, TABLE)] == []


@pytest.mark.parametrize("on_first", [True, False])
def test_switching_mig_loses_no_time_and_no_energy(*, on_first: bool) -> None:
    """The GPU and its parts follow each other without a hole, whichever comes first."""
    switch: dict[str, Any] = {"mig_until_seconds": 45.5} if on_first else {"mig_from_seconds": 45.5}
    with VirtualNode(scenario(instance(4, work(30, ["train"])), **switch)) as node:
        node.run(100)
        node.stop()
        records = node.records()
        start_ms = min(record.start_boot_ms for record in records)
        end_ms = max(record.start_boot_ms + length_ms(record) for record in records)
        truth = node.driver.truth_between(start_ms * 10**6, end_ms * 10**6).gpus[0]

    assert sum(map(own_time_ms, records)) == end_ms - start_ms
    assert sum(record.energy_mj for record in records) == truth.whole.energy_mj
    assert {record.device.slices is None for record in records} == {True, False}


def length_ms(record: UsageRecord | GapRecord) -> int:
    """Wall time of a record."""
    return record.window_ms if isinstance(record, UsageRecord) else record.gap_ms


@st.composite
def churn(draw: st.DrawFn) -> list[dict[str, object]]:
    """Instances that come and go at any millisecond, never more than the GPU has room for."""
    edges = sorted(draw(st.sets(st.integers(2_500, 55_000), max_size=4)))
    starts = [0, *edges]
    ends: list[int | None] = [*edges, None]
    found: list[dict[str, object]] = []
    for start_ms, end_ms in zip(starts, ends, strict=True):
        left = 7
        for gpu_instance in draw(st.permutations(range(1, 6))):
            slices = draw(st.integers(0, min(4, left)))
            if not slices:
                continue
            left -= slices
            item = instance(
                slices,
                work(draw(st.integers(1, 40)), draw(st.sampled_from([[], ["train"], ["tune"]]))),
                id=gpu_instance,
                compute_instances=draw(st.integers(0, 2)),
                from_seconds=start_ms / 1000,
            )
            if end_ms is not None:
                item["until_seconds"] = end_ms / 1000
            found.append(item)
    return found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    instances=churn(),
    runs=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 12)), min_size=1, max_size=3),
    offset_ns=st.integers(0, SECOND_NS - 1),
)
def test_time_and_energy_of_a_gpu_are_conserved_whatever_its_layout(
    instances: list[dict[str, object]], runs: list[tuple[int, int]], offset_ns: int
) -> None:
    """Over all parts, owners and gaps, time is wall time and energy is the counter's, exactly."""
    text = scenario(*instances, mig_from_seconds=0)
    with VirtualNode(text) as node:
        node.clock.now_ns += offset_ns
        for seconds, dark in runs:
            node.run(seconds)
            node.kill_agent(dark)
        node.run(3)
        node.stop()
        records = node.records()
        memory = recall(node.disk)
        assert memory is not None
        reached = {device.anchor.boot_ns for device in memory.meter.devices.values()}
        counter_mj = max(
            device.anchor.energy_counter_mj or 0 for device in memory.meter.devices.values()
        )
    by_gpu: dict[str, list[Any]] = defaultdict(list)
    for record in records:
        by_gpu[record.device.uuid].append(record)

    assert len(reached) == 1
    for mine in by_gpu.values():
        start_ms = min(record.start_boot_ms for record in mine)
        assert sum(map(own_time_ms, mine)) == max(reached) // 10**6 - start_ms
        first = min(mine, key=lambda record: (record.start_boot_ms, record.device.key))
        begun_ns = first.start_boot_ms * 10**6 + offset_ns % 10**6 - BOOT_NS
        begun_mj = node.driver.devices[0].energy_mj(begun_ns)
        energies: list[int] = [record.energy_mj for record in mine]
        assert all(energy >= 0 for energy in energies)
        assert sum(energies) == counter_mj - begun_mj
    for record in records:
        assert not isinstance(record, GapRecord)
        keys = {name for name, value in record.cycles.as_dict().items() if value is not None}
        assert keys or "cycles" in record.absent


def test_anchors_of_parts_survive_a_restart() -> None:
    """An agent that was away while a GPU was divided anew goes on from the old parts' end."""
    text = scenario(
        instance(3, work(100, ["train"]), id=1, until_seconds=35.5),
        instance(4, work(100, ["tune"]), id=2, from_seconds=35.5),
    )
    with VirtualNode(text) as node:
        node.run(30)
        node.kill_agent(10)
        node.run(20)
        node.stop()
        records = [record for record in node.records() if isinstance(record, UsageRecord)]

    recovered = [record for record in records if "recovered" in record.flags]
    ended = max(r.end_boot_ms for r in records if r.device.gpu_instance == 1)
    assert {record.device.gpu_instance for record in recovered} == {2, None}
    assert {record.start_boot_ms for record in recovered} == {ended}
    assert {record.owner.account for record in recovered} == {"unattributed"}
    assert {record.cycles_origin for record in recovered} == {"absent"}
    assert all(record.energy_mj for record in recovered)


def test_an_instance_that_merely_moves_keeps_its_cycles() -> None:
    """Destroying the instance before it moves another one's slices, not its counters."""
    text = scenario(instance(2, id=1, until_seconds=50.5), instance(3, work(200, ["train"]), id=2))
    with VirtualNode(text) as node:
        node.run(100)
        node.stop()
        records = [record for record in node.records() if record.device.gpu_instance == 2]
        truth = node.truth_of(records).gpus[0].instances[-1]

    places = {record.device.slices.first_index for record in records}
    assert places == {2, 0}
    assert {record.tier for record in records} == {"gpm_cycles"}
    assert sum(record.cycles.hmma for record in records) == truth.whole.active_cycles["hmma"]


def test_the_page_has_one_series_for_each_part() -> None:
    """A GPU that was whole, then divided, is one key: its series are never told twice."""
    text = scenario(instance(4, work(30, ["train"])), mig_until_seconds=20.5)
    with VirtualNode(text) as node:
        node.run(40)
        counts = node.agent.meters.counts()
        nothing: Any = None
        page = AgentExposition(
            view=nothing, host=nothing, counts=lambda: counts, shipping=nothing, ticks=nothing,
            workers=nothing, allocations=nothing, table=TABLE, version="test", simulated=True,
        )  # fmt: skip
        families = [*page._device_families(counts), page._flop_family(counts)]
    seconds: dict[str, float] = {}
    for family in families:
        series = [(each.name, *sorted(each.labels.items())) for each in family.samples]
        assert len(series) == len(set(series)), family.name
        if family.name == "flopledger_gpu_seconds":
            seconds = {each.labels["gpu_uuid"]: each.value for each in family.samples}

    assert [key.partition("/")[2] for key in sorted(seconds)] == ["", "1"]
    assert round(sum(seconds.values()), 6) == 37
