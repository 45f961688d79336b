"""Which metered devices a grant of kubelet's names. Pure.

Device plugins and drivers each have their own names: UUIDs of GPUs and MIG devices, replicas of
them under time slicing or MPS (`::N`), device minors on GKE, minors or slices' names under DRA. An
id that is no GPU's gives nothing; a GPU's that cannot be found gives a sentence, never a guess.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flopledger_agent.attribution.allocations import DeviceDirectory
    from flopledger_agent.attribution.kubelet_messages import ClaimedDevice, GrantedDevice

DRA_DRIVER: Final = "gpu.nvidia.com"
ID_LENGTH_MAX: Final = 200  # of an id shown to people
_REPLICA: Final = "::"
_GKE: Final = re.compile(
    r"nvidia(?P<minor>[0-9]{1,4})(?:/gi(?P<instance>[0-9]{1,3}))?(?P<vgpu>/vgpu[0-9]{1,4})?"
)
_DRA_GPU: Final = re.compile(r"gpu-(?P<number>[0-9]{1,4})")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The devices behind one id."""

    keys: tuple[str, ...] = ()  # Device.key; none where it is no GPU, or cannot be told
    shared: bool = False  # the id is one of several replicas of a device
    trouble: str | None = None  # a GPU that cannot be told


def find_granted(
    grant: GrantedDevice, directory: DeviceDirectory, resources: Sequence[str]
) -> Found:
    """The devices behind a device plugin's id; `resources` are patterns of GPUs' resource names."""
    device_id, replica, _number = grant.device_id.partition(_REPLICA)
    keys = directory.of_uuid(device_id) if device_id.upper().startswith(("GPU-", "MIG-")) else ()
    if keys:  # a UUID is unmistakable, whatever a site calls the resource
        return Found(keys=keys, shared=bool(replica))
    if not any(fnmatchcase(grant.resource, pattern) for pattern in resources):
        return Found()
    named = _GKE.fullmatch(device_id)
    if named is not None:
        instance = None if named["instance"] is None else int(named["instance"])
        keys = directory.of_minor(int(named["minor"]), instance)
        if keys:
            return Found(keys=keys, shared=bool(replica or named["vgpu"]))
    return Found(
        shared=bool(replica),
        trouble=(
            f"{grant.resource} {_shown(grant.device_id)} is none of the devices that the driver "
            "shows to the agent: let its container see all GPUs (NVIDIA_VISIBLE_DEVICES=all)"
        ),
    )


def find_claimed(
    claim: ClaimedDevice,
    directory: DeviceDirectory,
    uuids: Mapping[tuple[str, str, str], str] | None,
) -> Found:
    """The device behind a resource claim; `uuids` come from the node's slices, None: not watched.

    Without slices the driver's names of whole GPUs are used, which are device minors (indices
    before 2025): only where both mean the same GPU.
    """
    if claim.driver != DRA_DRIVER:
        return Found()
    if uuids is not None:
        uuid = uuids.get((claim.driver, claim.pool, claim.device))
        keys = () if uuid is None else directory.of_uuid(uuid)
        if keys:
            return Found(keys=keys)
    named = _DRA_GPU.fullmatch(claim.device)
    if named is not None:
        number = int(named["number"])
        by_minor, by_index = directory.of_minor(number), directory.of_index(number)
        if by_minor and by_minor == by_index:
            return Found(keys=by_minor)
    remedy = (
        "set kubernetes.resource_slices = true and apply its rule of deploy/kubernetes/rbac.yaml"
        if uuids is None
        else "its slice tells no UUID that the driver shows to the agent"
    )
    return Found(
        trouble=f"claim {_shown(claim.claim)} holds {_shown(claim.device)}, whose GPU is not "
        f"known: {remedy}"
    )


def _shown(text: str) -> str:
    clean = "".join(one if one.isprintable() else "?" for one in text[:ID_LENGTH_MAX])
    return clean or "(empty)"
