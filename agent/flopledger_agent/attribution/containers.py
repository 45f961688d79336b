"""Which container or pod a process runs in, from `/proc/PID/cgroup`; and who so holds a device.

No runtime is asked: the sockets of Docker, containerd and CRI-O give their holder the whole node,
and this file, which every process may read, names the container already. A container's name, image
and labels are therefore unknown here; its processes' environments carry the tags.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from flopledger_agent.attribution.allocations import Allocation
from flopledger_agent.attribution.cgroups import FILE_BYTES_MAX, CgroupPlace, parse_membership
from flopledger_agent.attribution.precedence import Membership

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flopledger_agent.attribution.allocations import SchedulerName
    from flopledger_agent.attribution.interface import Process

PLACES_MAX: Final = 4096  # remembered; forgetting them costs time only
# A process can be moved to another control group: look again after this many questions (a minute at
# one a second).
QUESTIONS_PER_PLACE: Final = 60
_SCHEDULERS: Final[dict[str, SchedulerName]] = {
    "docker": "docker",
    "podman": "podman",
    "containerd": "containerd",
}


class _Known:
    """What was read of one process, and how often it has been asked for since."""

    def __init__(self, place: CgroupPlace) -> None:
        self.place = place
        self.questions = 0


class ContainerTable:
    """Knows where processes run; used by one thread."""

    def __init__(self, root: Path, *, places_max: int = PLACES_MAX) -> None:
        self._root = str(root)
        self._places_max = places_max
        self._known: OrderedDict[tuple[int, int], _Known] = OrderedDict()
        self._refused: str | None = None

    def place(self, process: Process) -> CgroupPlace | None:
        """Where a process runs; None when it is gone or may not be looked at."""
        key = (process.pid, process.create_time_ms)
        known = self._known.get(key)
        if known is not None and known.questions < QUESTIONS_PER_PLACE:
            known.questions += 1
            self._known.move_to_end(key)
            return known.place
        self._known.pop(key, None)
        content = self._read(process.pid)
        if content is None:
            return None
        place = parse_membership(content)
        while len(self._known) >= self._places_max:
            self._known.popitem(last=False)
        self._known[key] = _Known(place)
        return place

    def troubles(self) -> tuple[str, ...]:
        """What keeps containers from being recognised, one sentence each, with the remedy."""
        found: list[str] = []
        if self._refused is not None:
            found.append(
                f"control groups of processes cannot be read ({self._refused}): containers are not "
                "recognised; mount /proc without hidepid, or give the agent CAP_SYS_PTRACE"
            )
        if any(_is_cut_off(known.place) for known in self._known.values()):
            found.append(
                "a control group is told without its container's name, because the agent runs in "
                "a cgroup namespace of its own beside it: run the agent on the host, or its "
                "container with the host's cgroup namespace"
            )
        return tuple(found)

    def _read(self, pid: int) -> bytes | None:
        try:
            descriptor = os.open(f"{self._root}/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            self._refused = error.strerror or "permission denied"
            return None
        except OSError:
            return None
        try:
            content = _whole(descriptor)
        except OSError:  # it ended meanwhile
            return None
        finally:
            os.close(descriptor)
        self._refused = None
        return content


def holders(
    on_devices: Mapping[str, Sequence[Process]], table: ContainerTable
) -> tuple[Allocation, ...]:
    """The containers without a scheduler that hold devices, from the processes on each device.

    `on_devices` is by Device.key. Nobody granted these devices to anybody, so a container holds one
    only while a process of it is there; pods are kubelet's business and are left out.
    """
    found: list[Allocation] = []
    for device, processes in sorted(on_devices.items()):
        inside: dict[str, list[tuple[CgroupPlace, Process]]] = {}
        for process in processes:
            place = table.place(process)
            if place is not None and place.container is not None and place.pod_uid is None:
                inside.setdefault(place.container, []).append((place, process))
        others = len({process.pid for process in processes})
        for container, members in sorted(inside.items()):
            place, first = members[0]
            scheduler = _SCHEDULERS.get(place.runtime or "")
            if scheduler is None:
                continue
            found.append(
                Allocation(
                    scheduler=scheduler,
                    device=device,
                    job=container,
                    user=first.user,
                    names=place_names(place),
                    shared=len(members) < others,
                    evidence=f"control group of process {first.pid} names the container",
                )
            )
    return tuple(found)


class ContainerMemberships:
    """Tells which jobs processes are in by their control groups; used by one thread."""

    def __init__(
        self, table: ContainerTable, pod_job: Callable[[str], str | None] | None = None
    ) -> None:
        """`pod_job` gives the job id of a pod's uid, None where it cannot be told."""
        self._table = table
        self._pod_job = pod_job

    def membership(self, process: Process) -> Membership | None:
        """The pod or container of a process as a job; None where it cannot be told."""
        place = self._table.place(process)
        if place is None or place.ambiguous or _is_cut_off(place):
            return None
        if place.pod_uid is not None:
            job = place.pod_uid if self._pod_job is None else self._pod_job(place.pod_uid)
            return None if job is None else Membership(jobs=frozenset({("kubernetes", job)}))
        scheduler = _SCHEDULERS.get(place.runtime or "")
        if place.container is None:
            return Membership()
        if scheduler is None or (place.relative and scheduler == "containerd"):
            return None  # some container, and it may be a pod's
        return Membership(jobs=frozenset({(scheduler, place.container)}))


def place_names(place: CgroupPlace) -> dict[str, str]:
    """What a place adds to an allocation's names."""
    names: dict[str, str | None] = {
        "runtime": place.runtime,
        "container_id": place.container,
        "pod_uid": place.pod_uid,
        "qos": place.service_class,
    }
    return {key: value for key, value in names.items() if value is not None}


def describe_place(place: CgroupPlace) -> str:
    """Where a process runs, in a few words for people."""
    if place.ambiguous:
        return "in several containers at once by its control groups; none is believed"
    words: list[str] = []
    if place.pod_uid is not None:
        words.append(f"pod {place.pod_uid}")
    if place.container is not None:
        words.append(f"{place.runtime or 'a'} container {place.container[:12]}")
    if not words:
        return "in no container"
    if place.user_uid is not None:
        words.append(f"of user {place.user_uid}")
    if place.nested:
        words.append("in a container inside it")
    return ", ".join(words)


def _is_cut_off(place: CgroupPlace) -> bool:
    """Whether what would name the container may be above what the agent's namespace shows."""
    return place.relative and place.container is None and place.pod_uid is None


def _whole(descriptor: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while size < FILE_BYTES_MAX:
        piece = os.read(descriptor, FILE_BYTES_MAX - size)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
