"""The device directory: filled from the driver's own words, also when they are few."""

from __future__ import annotations

import msgspec

from flopledger_agent.attribution.directory import DirectoryKeeper
from flopledger_agent.gpus.interface import DeviceFailure, DeviceNames, NodeSample
from flopledger_agent.gpus.worker_messages import Answer, answer_of, framed
from tests.agent.gpus.nodes import node, scenario

UUIDS = [f"GPU-{digit * 8}-1111-4111-8111-111111111111" for digit in "12"]
TWO = scenario(*(f'uuid = "{uuid}"' for uuid in UUIDS))
REFUSED = """
[[gpus.faults]]
kind = "error"
functions = ["nvmlDeviceGetMinorNumber"]
at_seconds = 0
code = 3
"""
PARTS = "[[gpus.instances]]\nslices = 3\nid = 2\n[[gpus.instances]]\nslices = 2\nid = 5\n"


def without_device(sample: NodeSample, position: int, reason: str) -> NodeSample:
    """The tick in which a device does not answer."""
    gone = sample.samples[position]
    rest = tuple(item for item in sample.samples if item is not gone)
    failure = DeviceFailure(device=gone.device, reason=reason)
    return msgspec.structs.replace(sample, samples=rest, failures=(failure,))


def test_a_gpu_is_found_by_each_of_its_names() -> None:
    """Index, minor number and PCI address come through the worker's messages unchanged."""
    with node(TWO) as played:
        sample = played.warm()
    answer = Answer(number=1, sample=sample, scales={}, places={}, device_count=2, stuck_index=None)
    keeper = DirectoryKeeper()
    keeper.observe(answer_of(framed(answer)[4:]).sample)

    for position, uuid in enumerate(UUIDS):
        names = sample.samples[position].names
        assert names is not None
        assert names.pci_bus_id is not None
        assert names.pci_bus_id.startswith("00000000:")
        assert keeper.now.of_uuid(uuid) == (uuid,)
        assert keeper.now.of_index(position) == (uuid,)
        assert keeper.now.of_minor(position) == (uuid,)
        assert keeper.now.of_pci_bus_id(names.pci_bus_id) == (uuid,)


def test_a_name_that_is_not_told_is_absent() -> None:
    """Not supported is None, and the other names stay."""
    with node(scenario(f'uuid = "{UUIDS[0]}"', phase=REFUSED)) as played:
        sample = played.warm()
    names = sample.samples[0].names

    assert names is not None
    assert (names.index, names.minor) == (0, None)


def test_an_instance_is_found_by_its_mig_uuid() -> None:
    """Each GPU instance has the UUIDs of what is in it, and the GPU's other names."""
    with node(scenario(f'uuid = "{UUIDS[0]}"', phase=PARTS)) as played:
        played.warm()
        sample = played.tick()
    keeper = DirectoryKeeper()
    keeper.observe(sample)
    by_key = {item.device.key: item.names or DeviceNames() for item in sample.samples}

    assert set(by_key) == {UUIDS[0], f"{UUIDS[0]}/2", f"{UUIDS[0]}/5"}
    assert by_key[UUIDS[0]].mig_uuids == ()
    for part in ("2", "5"):
        (mig_uuid,) = by_key[f"{UUIDS[0]}/{part}"].mig_uuids
        assert mig_uuid.startswith("MIG-")
        assert keeper.now.of_uuid(mig_uuid) == (f"{UUIDS[0]}/{part}",)
        assert keeper.now.of_minor(0, int(part)) == (f"{UUIDS[0]}/{part}",)
    assert len(keeper.now.of_minor(0)) == 3


def test_a_device_that_does_not_answer_keeps_its_names() -> None:
    """Whoever holds it still does; what nobody expects any more is gone."""
    with node(TWO) as played:
        sample = played.warm()
    keeper = DirectoryKeeper()
    keeper.observe(sample)
    known = keeper.now
    keeper.observe(without_device(sample, 0, "timeout"))
    assert set(keeper.now.of_minor(0)) == {UUIDS[0]}

    keeper.observe(sample)
    assert keeper.now == known
    keeper.observe(msgspec.structs.replace(sample, samples=sample.samples[1:]))
    assert keeper.now.of_minor(0) == ()
    assert keeper.now.of_minor(1) == (UUIDS[1],)
