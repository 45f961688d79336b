"""Of a pod only what attribution needs is kept, whatever its users wrote into it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flopledger_agent.attribution.pods import (
    NAMES_MAX,
    VALUE_LENGTH_MAX,
    Pod,
    claimed_uuids,
    read_pod,
    read_slice,
)
from tests.agent.attribution.kubernetes_servers import NODE, pod_object


def kept(content: dict[str, Any], labels: tuple[str, ...] = ()) -> Pod | None:
    """A pod from its JSON."""
    found = read_pod(json.dumps(content).encode(), NODE, frozenset(labels))
    return None if found is None else found[1]


def test_a_pod_keeps_identity_owner_and_chosen_labels() -> None:
    """And nothing else of what users write into it."""
    pod = kept(
        pod_object(
            "a",
            labels={"flopledger.io/project": "atlas", "app": "x", "team": "y"},
            annotations={"flopledger.io/run": "r1/2", "secret": "s"},
            owners=[
                {"kind": "Ghost", "name": "g", "controller": False},
                {"kind": "Job", "name": "train", "controller": True},
            ],
            restarts=3,
        ),
        ("app",),
    )
    assert pod is not None
    assert pod.labels == {"flopledger.io/project": "atlas", "app": "x"}
    assert pod.annotations == {"flopledger.io/run": "r1/2"}
    assert (pod.owner_kind, pod.owner_name) == ("Job", "train")
    assert pod.restarts == {"trainer": 3}
    assert pod.start_unix_ms == 1_772_352_000_000
    assert pod.tags() == {"project": "atlas", "run": "r1/2"}


def test_a_label_counts_before_an_annotation_and_the_contradiction_is_named() -> None:
    """Never silently."""
    key = "flopledger.io/project"
    pod = kept(pod_object("a", labels={key: "one"}, annotations={key: "two"}))
    assert pod is not None
    assert pod.tags() == {"project": "one"}
    assert pod.contradictions() == (key,)


def test_what_users_write_is_bounded() -> None:
    """Number and length; what was cut is too long for any id, and refused there."""
    many = {f"flopledger.io/k{number}": "v" * 100_000 for number in range(1000)}
    pod = kept(pod_object("a", annotations={**many, "flopledger.io/project": "p"}))
    assert pod is not None
    assert len(pod.annotations) == NAMES_MAX
    assert max(map(len, pod.annotations.values())) == VALUE_LENGTH_MAX


@pytest.mark.parametrize(
    "start", ["", None, "yesterday", "2026-03-01T08:00:00", "9999-99-99T00:00:00Z"]
)
def test_a_start_that_is_no_time_is_unknown(start: str | None) -> None:
    """Never a zero."""
    content = pod_object("a")
    content["status"]["startTime"] = start
    pod = kept(content)
    assert pod is not None
    assert pod.start_unix_ms is None


def test_objects_with_nulls_are_read() -> None:
    """Every optional part may be missing."""
    bare = {"metadata": {"name": "a", "namespace": "n", "uid": "u"}, "spec": {"nodeName": NODE}}
    assert kept(bare) == Pod(uid="u", namespace="n", name="a")
    assert kept({**bare, "status": None}) == Pod(uid="u", namespace="n", name="a")
    assert kept({"metadata": {"name": "a"}}) is None


def device_slice(name: str, generation: int, **uuids: str) -> Any:
    """A slice of this node's devices."""
    content = {
        "metadata": {"name": name},
        "spec": {
            "driver": "gpu.nvidia.com",
            "pool": {"name": NODE, "generation": generation},
            "nodeName": NODE,
            "devices": [
                {"name": device.replace("_", "-"), "attributes": {"uuid": {"string": uuid}}}
                for device, uuid in uuids.items()
            ],
        },
    }
    return read_slice(json.dumps(content).encode(), NODE)


def test_slices_name_the_uuids_of_their_newest_generation() -> None:
    """An older slice of the same pool says nothing any more."""
    old, new = device_slice("s1", 1, gpu_0="GPU-old"), device_slice("s2", 2, gpu_0="GPU-new")
    for order in ([old, new], [new, old]):
        uuids = claimed_uuids(dict(order))
        assert uuids == {("gpu.nvidia.com", NODE, "gpu-0"): "GPU-new"}
