"""A control group's path names a container and a pod, and nobody can name another one's."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.cgroups import (
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    CgroupPlace,
    parse_membership,
    parse_path,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "cgroups"
OURS = (
    "bare",
    "containerd",
    "docker",
    "hostile",
    "kubernetes-containerd",
    "kubernetes-crio",
    "podman",
    "relative",
)
ID = "3c9f" * 16
OTHER = "a1b2c3d4" * 8
POD = "0d4f8a52-6f1b-4c7e-9a53-2f7d5b1e9c40"


def processes() -> list[Any]:
    """Every process of the golden trees, named by file and description."""
    found: list[Any] = []
    for name in OURS:
        told = tomllib.loads((GOLDEN / f"{name}.toml").read_text(encoding="utf-8"))
        found += [pytest.param(one, id=f"{name}: {one['what']}") for one in told["process"]]
    return found


@pytest.mark.parametrize("process", processes())
def test_golden_trees_are_understood(process: dict[str, Any]) -> None:
    """Kubernetes with containerd and CRI-O, Docker, Podman, v1 and v2, nested and hostile."""
    expected = msgspec.convert(process["place"], CgroupPlace)
    assert parse_membership(process["cgroup"].encode()) == expected


def test_the_golden_trees_hold_what_was_promised() -> None:
    """Each class of service with each runtime, rootless Podman, and relative paths are there."""
    places = [msgspec.convert(one.values[0]["place"], CgroupPlace) for one in processes()]
    for runtime in ("containerd", "crio"):
        classes = {one.service_class for one in places if one.runtime == runtime}
        assert {"guaranteed", "burstable"} <= classes
    assert any(one.runtime == "podman" and one.user_uid for one in places)
    assert any(one.relative for one in places)


def test_bytes_that_are_no_text_name_nothing_and_break_nothing() -> None:
    """A component that is not UTF-8 is passed over; the container above it still counts."""
    assert parse_path(b"/\xff\xfe/\x80").container is None
    assert parse_path(b"/system.slice/docker-" + ID.encode() + b".scope/\xff").container == ID


def test_a_very_long_path_is_cut_and_not_followed() -> None:
    """What comes after the kernel's own limit is never read; the outermost name is."""
    deep = b"/a" * PATH_BYTES_MAX + b"/docker/" + ID.encode()
    assert parse_path(deep) == CgroupPlace()
    assert parse_path(b"/docker/" + ID.encode() + b"/a" * 100_000).container == ID
    assert parse_path(b"/docker/" + b"a" * (NAME_BYTES_MAX + 1)) == CgroupPlace()


def test_pathological_names_cost_no_time() -> None:
    """No pattern backtracks: a long name of the worst kind is refused as fast as a short one."""
    worst = b"/" + b"kubepods-" * 28 + b"pod" + b"0" * 200
    assert parse_membership(b"0::" + worst * 20) == CgroupPlace()


@given(st.binary(max_size=600))
def test_nothing_raises(content: bytes) -> None:
    """Whatever the file says."""
    parse_membership(content)
    parse_membership(b"0::/" + content)


NAMES = st.sampled_from(
    [
        "kubepods.slice",
        "kubepods",
        "burstable",
        "..",
        "user@7.service",
        "docker",
        OTHER,
        f"docker-{OTHER}.scope",
        f"pod{POD}",
        f"kubepods-pod{POD.replace('-', '_')}.slice",
        f"cri-containerd-{OTHER}.scope",
        f"libpod-{OTHER}.scope",
    ]
)


@given(st.lists(NAMES, max_size=6))
def test_nothing_below_a_container_changes_whose_it_is(below: list[str]) -> None:
    """A container that makes groups of any name stays the one it is."""
    own = f"/kubepods/pod{'1' * 32}/{ID}"
    place = parse_path(("/".join([own, *below])).encode())
    assert (place.container, place.pod_uid) == (ID, "1" * 32)


@given(st.lists(NAMES, max_size=6))
def test_a_user_never_becomes_a_pod(below: list[str]) -> None:
    """In a tree that was handed to a user no name makes a pod of Kubernetes."""
    path = "/".join(["/user.slice/user-5.slice/user@5.service", *below])
    place = parse_path(path.encode())
    assert place.pod_uid is None
