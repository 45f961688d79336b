"""Where a process runs is read from the kernel, kept while it lives, and never guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flopledger_agent.attribution.cgroups import CgroupPlace, parse_membership
from flopledger_agent.attribution.containers import (
    QUESTIONS_PER_PLACE,
    ContainerMemberships,
    ContainerTable,
    describe_place,
    holders,
    place_names,
)
from tests.agent.attribution.people import process

ID, OTHER = "3c9f" * 16, "a1b2c3d4" * 8
POD = "0d4f8a52-6f1b-4c7e-9a53-2f7d5b1e9c40"
DOCKER = f"0::/system.slice/docker-{ID}.scope\n"
POD_PATH = f"0::/kubepods/pod{POD}/{OTHER}\n"


def put(root: Path, pid: int, content: str) -> None:
    """Let a process of a made-up `/proc` be in a control group."""
    (root / str(pid)).mkdir(exist_ok=True)
    (root / str(pid) / "cgroup").write_text(content, encoding="utf-8")


def test_this_process_is_where_its_own_proc_says() -> None:
    """The real `/proc` is read, whatever runs these tests."""
    place = ContainerTable(Path("/proc")).place(process(os.getpid()))
    assert place == parse_membership(Path("/proc/self/cgroup").read_bytes())


def test_a_process_that_is_gone_is_nowhere(tmp_path: Path) -> None:
    """No place, no trouble."""
    table = ContainerTable(tmp_path)
    assert table.place(process(5)) is None
    assert table.troubles() == ()


def test_a_place_is_kept_and_looked_at_again(tmp_path: Path) -> None:
    """Known processes cost no reading, and one that was moved is found in the end."""
    table = ContainerTable(tmp_path)
    put(tmp_path, 5, DOCKER)
    first = table.place(process(5))
    put(tmp_path, 5, POD_PATH)
    assert table.place(process(5)) is first
    for _ in range(QUESTIONS_PER_PLACE - 1):
        table.place(process(5))
    moved = table.place(process(5))
    assert moved is not None
    assert moved.pod_uid == POD


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    """A pid and a create time together are a process."""
    table = ContainerTable(tmp_path)
    put(tmp_path, 5, DOCKER)
    table.place(process(5, create_time_ms=1))
    put(tmp_path, 5, POD_PATH)
    place = table.place(process(5, create_time_ms=2))
    assert place is not None
    assert place.pod_uid == POD


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Ten thousand processes fill nothing."""
    table = ContainerTable(tmp_path, places_max=3)
    for pid in range(1, 9):
        put(tmp_path, pid, DOCKER)
        assert table.place(process(pid)) is not None
    assert len(table._known) == 3


def test_a_hidden_proc_is_said_with_its_remedy(tmp_path: Path) -> None:
    """Without permission nothing is known, and the trouble ends when it ends."""

    class Refusing(ContainerTable):
        refuse = True

        def _read(self, pid: int) -> bytes | None:
            if not self.refuse:
                return super()._read(pid)
            self._refused = "permission denied"
            return None

    table = Refusing(tmp_path)
    put(tmp_path, 5, DOCKER)
    assert table.place(process(5)) is None
    assert "hidepid" in table.troubles()[0]
    table.refuse = False
    assert table.place(process(5)) is not None
    assert table.troubles() == ()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_trouble(tmp_path: Path) -> None:
    """The kernel's own refusal is the one that is told."""
    put(tmp_path, 5, DOCKER)
    (tmp_path / "5" / "cgroup").chmod(0)
    table = ContainerTable(tmp_path)
    assert table.place(process(5)) is None
    assert table.troubles()


def test_a_cut_off_name_is_said_with_its_remedy(tmp_path: Path) -> None:
    """A relative path that names nothing is no proof that there is no container."""
    table = ContainerTable(tmp_path)
    put(tmp_path, 5, "0::/../..\n")
    table.place(process(5))
    assert "cgroup namespace" in table.troubles()[0]


def test_a_container_holds_what_its_processes_are_on(tmp_path: Path) -> None:
    """By container id, with the user; its neighbour outside makes the device shared."""
    put(tmp_path, 5, DOCKER)
    put(tmp_path, 6, DOCKER)
    put(tmp_path, 7, "0::/user.slice/user-1000.slice/session-3.scope\n")
    on_devices = {
        "GPU-a": (process(5), process(6)),
        "GPU-b": (process(5), process(7)),
    }
    found = holders(on_devices, ContainerTable(tmp_path))
    assert [(one.device, one.job, one.shared, one.user) for one in found] == [
        ("GPU-a", ID, False, "alice"),
        ("GPU-b", ID, True, "alice"),
    ]
    assert found[0].scheduler == "docker"
    assert found[0].names == {"runtime": "docker", "container_id": ID}


def test_pods_and_bare_processes_are_not_held_by_containers(tmp_path: Path) -> None:
    """Kubelet speaks for pods; a container of an unknown runtime is nobody's allocation."""
    put(tmp_path, 5, POD_PATH)
    put(tmp_path, 6, "0::/\n")
    put(tmp_path, 7, f"0::/training/{ID}\n")
    devices = {"GPU-a": tuple(process(pid) for pid in (5, 6, 7, 8))}
    assert holders(devices, ContainerTable(tmp_path)) == ()


@pytest.mark.parametrize(
    ("content", "jobs"),
    [
        (DOCKER, {("docker", ID)}),
        (POD_PATH, {("kubernetes", f"job of {POD}")}),
        ("0::/\n", set()),
        ("0::/../..\n", None),
        (f"0::/../cri-containerd-{ID}.scope\n", None),
        (f"0::/training/{ID}\n", None),
        (f"9:devices:/docker/{ID}\n8:cpu:/docker/{OTHER}\n", None),
    ],
)
def test_a_process_is_in_the_job_of_its_control_group(
    tmp_path: Path, content: str, jobs: set[tuple[str, str]] | None
) -> None:
    """A pod's by its own id, a container's; what cannot be told is told as that."""
    put(tmp_path, 5, content)
    memberships = ContainerMemberships(ContainerTable(tmp_path), lambda uid: f"job of {uid}")
    found = memberships.membership(process(5))
    assert (None if found is None else set(found.jobs)) == jobs
    assert memberships.membership(process(6)) is None


def test_a_pod_that_cannot_be_told_is_no_job(tmp_path: Path) -> None:
    """While its uid is not known it is nobody's contradiction."""
    put(tmp_path, 5, POD_PATH)
    memberships = ContainerMemberships(ContainerTable(tmp_path), lambda uid: None)
    assert memberships.membership(process(5)) is None
    plain = ContainerMemberships(ContainerTable(tmp_path)).membership(process(5))
    assert plain is not None
    assert plain.jobs == {("kubernetes", POD)}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (DOCKER, "docker container 3c9f3c9f3c9f"),
        (POD_PATH, f"pod {POD}, a container a1b2c3d4a1b2"),
        ("0::/\n", "in no container"),
        (f"9:devices:/docker/{ID}\n8:cpu:/docker/{OTHER}\n", "none is believed"),
        (f"0::/docker/{ID}/docker/{OTHER}\n", "in a container inside it"),
    ],
)
def test_people_are_told_where(content: str, text: str) -> None:
    """In a few words, whatever the place is."""
    assert text in describe_place(parse_membership(content.encode()))


def test_names_hold_only_what_is_known() -> None:
    """Nothing absent becomes an empty string."""
    assert place_names(CgroupPlace()) == {}
    assert place_names(CgroupPlace(pod_uid=POD)) == {"pod_uid": POD}
