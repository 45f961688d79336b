"""Every form of id that a plugin or a driver has finds its device, or a sentence; never a guess."""

from __future__ import annotations

import msgspec
import pytest

from flopledger_agent.attribution.allocations import DeviceDirectory, DirectoryEntry
from flopledger_agent.attribution.kubelet_messages import ClaimedDevice, GrantedDevice
from flopledger_agent.attribution.kubernetes_devices import find_claimed, find_granted
from flopledger_agent.attribution.kubernetes_section import RESOURCES_DEFAULT
from tests.agent.attribution.kubernetes_nodes import MIG_A, PARTS, WHOLE, A, B
from tests.agent.attribution.kubernetes_servers import NODE


@pytest.mark.parametrize(
    ("resource", "device_id", "keys", "shared"),
    [
        ("nvidia.com/gpu", A, (A,), False),
        ("nvidia.com/gpu", A.lower(), (A,), False),
        ("example.com/renamed", A, (A,), False),
        ("nvidia.com/gpu.shared", f"{A}::11", (A,), True),
        ("nvidia.com/mig-3g.40gb", MIG_A, (f"{B}/3",), False),
        ("nvidia.com/mig-3g.40gb.shared", f"{MIG_A}::1", (f"{B}/3",), True),
        ("nvidia.com/gpu", f"MIG-{B}/5/0", (f"{B}/5",), False),
        ("nvidia.com/gpu", B, (f"{B}/3", f"{B}/5"), False),
        ("nvidia.com/gpu", "nvidia0", (A,), False),
        ("nvidia.com/gpu", "nvidia0/vgpu1", (A,), True),
        ("nvidia.com/gpu", "nvidia1/gi3", (f"{B}/3",), False),
        ("nvidia.com/gpu", "nvidia1/gi3/vgpu0", (f"{B}/3",), True),
    ],
)
def test_every_form_of_id_finds_its_device(
    resource: str, device_id: str, keys: tuple[str, ...], shared: bool
) -> None:
    """GPU and MIG UUIDs, replicas, GKE's minors; a whole partitioned GPU is all of its parts."""
    grant = GrantedDevice(resource=resource, device_id=device_id)
    found = find_granted(grant, PARTS, RESOURCES_DEFAULT)
    assert (found.keys, found.shared, found.trouble) == (keys, shared, None)


@pytest.mark.parametrize("device_id", ["mlx5_0", "nvidia0", "0000:65:00.0", "", "GPU-unknown"])
def test_other_resources_are_no_gpus(device_id: str) -> None:
    """A network card's id is nothing to us, even where it looks like a GPU's."""
    grant = GrantedDevice(resource="rdma/ib", device_id=device_id)
    found = find_granted(grant, WHOLE, RESOURCES_DEFAULT)
    assert (found.keys, found.trouble) == ((), None)


@pytest.mark.parametrize("device_id", ["GPU-unknown", "nvidia9", "nvidia0/gi9", "3", "a\nb"])
def test_a_gpu_that_is_not_known_is_said(device_id: str) -> None:
    """Never another one's, never silence."""
    grant = GrantedDevice(resource="nvidia.com/gpu", device_id=device_id)
    found = find_granted(grant, PARTS, RESOURCES_DEFAULT)
    assert found.keys == ()
    assert "NVIDIA_VISIBLE_DEVICES" in str(found.trouble)
    assert "\n" not in str(found.trouble)


CLAIM = ClaimedDevice(claim="n/c", driver="gpu.nvidia.com", pool=NODE, device="gpu-0")


def test_claims_go_by_the_uuids_of_slices() -> None:
    """A MIG device's, too; other drivers' devices are nothing to us."""
    uuids = {("gpu.nvidia.com", NODE, "gpu-0"): MIG_A}
    assert find_claimed(CLAIM, PARTS, uuids).keys == (f"{B}/3",)
    other = msgspec.structs.replace(CLAIM, driver="dra.net")
    assert find_claimed(other, PARTS, uuids) == find_claimed(other, PARTS, None)
    assert find_claimed(other, PARTS, uuids).trouble is None


def test_without_slices_a_claims_name_counts_only_where_it_is_unambiguous() -> None:
    """The number is a minor in newer drivers and an index in older ones."""
    assert find_claimed(CLAIM, WHOLE, None).keys == (A,)
    crossed = DeviceDirectory(
        entries=(
            DirectoryEntry(key=A, uuid=A, index=0, minor=1),
            DirectoryEntry(key=B, uuid=B, index=1, minor=0),
        )
    )
    found = find_claimed(CLAIM, crossed, None)
    assert found.keys == ()
    assert "resource_slices" in str(found.trouble)
