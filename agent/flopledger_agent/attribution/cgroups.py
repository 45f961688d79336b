"""What a control group's path names: container runtime, container, pod and class of service. Pure.

The outermost container of a path counts. Whoever owns a control group may make groups below it and
call them what he likes, so a name below a container, or in a tree that was handed to a user, never
makes somebody else's pod or container of a process. Seen from inside a cgroup namespace a path is
relative and begins with `/..`: what is named after that still counts, what was cut off is unknown.
"""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias, cast

import msgspec

ContainerRuntime: TypeAlias = Literal["docker", "podman", "containerd", "crio"]
ServiceClass: TypeAlias = Literal["guaranteed", "burstable", "besteffort"]

PATH_BYTES_MAX: Final = 8192  # twice the longest path a kernel takes; the rest names nothing
NAME_BYTES_MAX: Final = 255  # the kernel's limit of one component
FILE_BYTES_MAX: Final = 128 * 1024  # a line for each of some fifteen hierarchies

_HEX: Final = r"[0-9a-f]{64}"
# Written with dashes, with underscores in names of systemd, or without either for static pods.
_POD: Final = r"(?:[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"
_POD_SLICE: Final = re.compile(
    rf"(?:[a-z0-9]+-)*kubepods(?:-(?P<class>burstable|besteffort))?-pod(?P<pod>{_POD})\.slice"
    rf"(?::(?P<prefix>cri-containerd|crio):(?P<container>{_HEX}))?"
)
_POD_FOLDER: Final = re.compile(rf"pod(?P<pod>{_POD})")
_CONTAINER: Final = re.compile(
    rf"(?P<prefix>cri-containerd|crio|docker|nerdctl|libpod(?:-payload)?)-(?P<container>{_HEX})"
    r"(?:\.scope)?"
)
_BARE: Final = re.compile(_HEX)
_USER_MANAGER: Final = re.compile(r"user@(?P<uid>[0-9]{1,10})\.service")
_KUBEPODS: Final = re.compile(r"(?:[a-z0-9]+-)*kubepods(?:\.slice)?")

_RUNTIMES: Final[dict[str, ContainerRuntime]] = {
    "cri-containerd": "containerd",
    "crio": "crio",
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",
    "nerdctl": "containerd",
}
# Who calls a container's group by its bare id, told by the group above it.
_PARENTS: Final[dict[str, ContainerRuntime]] = {
    "docker": "docker",
    "default": "containerd",  # containerd's namespaces
    "k8s.io": "containerd",
    "moby": "docker",
}
# Services below which runtimes that were not told of systemd put their containers. Any other one
# may have been given to a user, together with the names below it.
_RUNTIME_SERVICES: Final = frozenset(
    f"{name}.service"
    for name in ("containerd", "crio", "k3s", "k3s-agent", "kubelet", "rke2-agent", "rke2-server")
)
_ROOTLESS: Final = frozenset({"docker", "libpod", "libpod-payload", "nerdctl"})
_UP: Final = ".."


class CgroupPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process runs, as far as its control group says so; all None: in no container."""

    runtime: ContainerRuntime | None = None
    container: str | None = None  # 64 hexadecimal digits
    pod_uid: str | None = None  # as the API server spells it
    service_class: ServiceClass | None = None
    user_uid: int | None = None  # the user whose own tree it is in, who also chose the names there
    nested: bool = False  # other containers' names follow: it runs inside the one named here
    relative: bool = False  # the path is told from inside a cgroup namespace
    ambiguous: bool = False  # hierarchies of cgroup v1 name different containers: none is believed


class _Walk:
    """Reads the components of one path from the outside in."""

    def __init__(self) -> None:
        self.runtime: ContainerRuntime | None = None
        self.container: str | None = None
        self.pod: str | None = None
        self.service_class: ServiceClass | None = None
        self.user_uid: int | None = None
        self.nested = False
        self._owned = False  # somebody else than the node's runtime chooses the names from here on
        self._before: list[str] = []

    def step(self, name: str) -> None:
        manager = _USER_MANAGER.fullmatch(name)
        if manager is not None and self.container is None and self.pod is None:
            self.user_uid = int(manager["uid"])
        elif not self._pod(name):
            self._container(name)
        if name.endswith((".service", ".scope")) and name not in _RUNTIME_SERVICES:
            self._owned = True
        self._before.append(name)

    def _pod(self, name: str) -> bool:
        """Whether the component names a pod; the first one counts, and none of a user's making."""
        found = _POD_SLICE.fullmatch(name)
        service_class: str | None
        if found is not None:
            service_class = found["class"] or "guaranteed"
        else:
            found = _POD_FOLDER.fullmatch(name)
            if found is None or not self._below_kubepods():
                return False
            service_class = self._class_above()
        if self.pod is not None or self.container is not None or self._owned:
            self.nested = self.nested or self.pod is not None or self.container is not None
            return True
        self.pod = _dashed(found["pod"])
        self.service_class = cast("ServiceClass | None", service_class)
        inside = found.groupdict()
        if inside.get("container"):
            self.container = inside["container"]
            self.runtime = _RUNTIMES[inside["prefix"]]
        return True

    def _container(self, name: str) -> None:
        found = _CONTAINER.fullmatch(name)
        above = self._before[-1] if self._before else ""
        if found is not None:
            prefix, container = found["prefix"], found["container"]
            runtime: ContainerRuntime | None = _RUNTIMES[prefix]
        elif _BARE.fullmatch(name) is not None:
            prefix, container = "", name
            runtime = _PARENTS.get(above)
        else:
            return
        if self.container is not None:
            self.nested = True
        elif self.user_uid is None or prefix in _ROOTLESS:
            self.container, self.runtime = container, runtime

    def _below_kubepods(self) -> bool:
        """Whether the components above can be kubelet's; cut-off ones cannot be asked."""
        above = self._before[::-1]
        if above and above[0] in {"burstable", "besteffort"}:
            above = above[1:]
        return bool(above) and (above[0] == _UP or _KUBEPODS.fullmatch(above[0]) is not None)

    def _class_above(self) -> str | None:
        above = self._before[-1]
        if above in {"burstable", "besteffort"}:
            return above
        return None if above == _UP else "guaranteed"


def parse_path(path: bytes) -> CgroupPlace:
    """What one path names; never raises, whatever the path is."""
    text = path[:PATH_BYTES_MAX].decode("ascii", "replace").removesuffix(" (deleted)")
    names = [name for name in text.split("/") if name]
    walk = _Walk()
    for name in names:
        if len(name) <= NAME_BYTES_MAX:
            walk.step(name)
    return CgroupPlace(
        runtime=walk.runtime,
        container=walk.container,
        pod_uid=walk.pod,
        service_class=walk.service_class,
        user_uid=walk.user_uid,
        nested=walk.nested,
        relative=bool(names) and names[0] == _UP,
    )


def parse_membership(content: bytes) -> CgroupPlace:
    """What `/proc/PID/cgroup` names: one path under cgroup v2, one for each hierarchy under v1.

    Hierarchies that name nothing are passed over. Where two name different containers somebody
    has moved the process in one of them, and neither is believed.
    """
    places: list[CgroupPlace] = []
    for line in content[:FILE_BYTES_MAX].split(b"\n"):
        parts = line.split(b":", 2)
        if len(parts) == 3 and parts[2].startswith(b"/"):
            places.append(parse_path(parts[2]))
    named = [place for place in places if place.container or place.pod_uid]
    if not named:
        users = [place for place in places if place.user_uid is not None]
        return (users or places or [CgroupPlace()])[0]
    whole = [place for place in named if place.container] or named
    if len({(place.container, place.pod_uid) for place in whole}) > 1:
        return CgroupPlace(ambiguous=True, relative=any(place.relative for place in named))
    return max(whole, key=lambda place: place.runtime is not None)


def _dashed(pod: str) -> str:
    """A pod's uid as the API server spells it; static pods have no dashes anywhere."""
    return pod.replace("_", "-")
