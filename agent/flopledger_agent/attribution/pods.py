"""What is kept of a pod, and of a node's slices of devices (DRA), as the API server tells them.

Only what attribution needs is kept: identity, owner, phase, restarts, images, and the labels and
annotations that were asked for. Values come from users; they are cut to a length that no id may
have and checked where they are used.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.attribution.pod_watch import WatchTarget

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TAG_PREFIX: Final = "flopledger.io/"
TAG_FIELDS: Final = ("project", "entity", "model", "run", "activity", "precision")
VALUE_LENGTH_MAX: Final = 512  # an id has 128 at most: what was cut here is refused there
NAMES_MAX: Final = 64  # labels, annotations or images kept of one pod
MS_PER_SECOND: Final = 1000
STATIC_UID: Final = "kubernetes.io/config.hash"
PODS_PATH: Final = "/api/v1/pods"
SLICES_PATH: Final = "/apis/resource.k8s.io/v1/resourceslices"


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one pod."""

    uid: str
    namespace: str
    name: str
    phase: str = ""  # Pending, Running, Succeeded, Failed, Unknown
    owner_kind: str | None = None  # Job, StatefulSet, ReplicaSet, ...: who controls it
    owner_name: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    images: dict[str, str] = {}  # by container
    restarts: dict[str, int] = {}  # by container
    start_unix_ms: int | None = None  # when kubelet took it up
    static_uid: str | None = None  # of a pod from kubelet's own files: what its cgroups are called

    @property
    def key(self) -> str:
        """Namespace and name, which only one pod has at a time."""
        return f"{self.namespace}/{self.name}"

    @property
    def ended(self) -> bool:
        """It runs no more and never will: it holds no device."""
        return self.phase in {"Succeeded", "Failed"}

    def tags(self) -> dict[str, str]:
        """What it says under `flopledger.io/`; a label before an annotation."""
        found: dict[str, str] = {}
        for field in TAG_FIELDS:
            key = TAG_PREFIX + field
            value = self.labels.get(key) or self.annotations.get(key)
            if value:
                found[field] = value
        return found

    def contradictions(self) -> tuple[str, ...]:
        """Tags that a label and an annotation tell differently."""
        both = self.labels.keys() & self.annotations.keys()
        return tuple(
            sorted(
                key
                for key in both
                if key.startswith(TAG_PREFIX) and self.labels[key] != self.annotations[key]
            )
        )


class DeviceSlice(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that a driver offers on this node: their names and UUIDs."""

    driver: str
    pool: str
    generation: int  # only the newest of a pool is valid
    uuids: dict[str, str]  # by the driver's name of the device


# --- the API's own form; every field may be missing or null ---------------------------------------


class _Owner(msgspec.Struct, frozen=True, kw_only=True):
    kind: str = ""
    name: str = ""
    controller: bool | None = None


class _Meta(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: tuple[_Owner, ...] | None = None


class _Container(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    name: str = ""
    image: str | None = None
    restart_count: int | None = None


class _PodSpec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    node_name: str | None = None
    containers: tuple[_Container, ...] | None = None
    init_containers: tuple[_Container, ...] | None = None


class _PodStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    phase: str | None = None
    start_time: str | None = None
    container_statuses: tuple[_Container, ...] | None = None
    init_container_statuses: tuple[_Container, ...] | None = None


class _Pod(msgspec.Struct, frozen=True, kw_only=True):
    metadata: _Meta
    spec: _PodSpec | None = None
    status: _PodStatus | None = None


class _Pool(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    generation: int = 0


class _Attribute(msgspec.Struct, frozen=True, kw_only=True):
    string: str | None = None


class _Device(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    attributes: dict[str, _Attribute] | None = None


class _SliceSpec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    driver: str = ""
    pool: _Pool = _Pool()
    node_name: str | None = None
    devices: tuple[_Device, ...] | None = None


class _Slice(msgspec.Struct, frozen=True, kw_only=True):
    metadata: _Meta
    spec: _SliceSpec


def pods_of(node_name: str, labels: Iterable[str]) -> WatchTarget[Pod]:
    """The pods of one node; `labels` are kept besides those of `flopledger.io/`."""
    kept = frozenset(labels)

    def read(content: bytes) -> tuple[str, Pod] | None:
        return read_pod(content, node_name, kept)

    return WatchTarget(path=PODS_PATH, field_selector=f"spec.nodeName={node_name}", read=read)


def slices_of(node_name: str) -> WatchTarget[DeviceSlice]:
    """What drivers offer on one node through resource claims."""

    def read(content: bytes) -> tuple[str, DeviceSlice] | None:
        return read_slice(content, node_name)

    return WatchTarget(path=SLICES_PATH, field_selector=f"spec.nodeName={node_name}", read=read)


def read_pod(content: bytes, node_name: str, kept: frozenset[str]) -> tuple[str, Pod] | None:
    """A pod of this node, by namespace and name; None for another node's, or one without an uid.

    Errors: msgspec.DecodeError.
    """
    told = msgspec.json.decode(content, type=_Pod)
    meta, spec, status = told.metadata, told.spec or _PodSpec(), told.status or _PodStatus()
    if not meta.uid or not meta.name or not meta.namespace or spec.node_name != node_name:
        return None
    owner = next((one for one in meta.owner_references or () if one.controller), None)
    containers = (*(spec.containers or ()), *(spec.init_containers or ()))
    statuses = (*(status.container_statuses or ()), *(status.init_container_statuses or ()))
    pod = Pod(
        uid=meta.uid,
        namespace=meta.namespace,
        name=meta.name,
        phase=status.phase or "",
        owner_kind=owner.kind if owner is not None else None,
        owner_name=owner.name if owner is not None else None,
        labels=_kept(meta.labels or {}, kept),
        annotations=_kept(meta.annotations or {}, frozenset()),
        images={one.name: _cut(one.image) for one in containers[:NAMES_MAX] if one.image},
        restarts={
            one.name: one.restart_count
            for one in statuses[:NAMES_MAX]
            if one.restart_count is not None and one.restart_count >= 0
        },
        start_unix_ms=_unix_ms(status.start_time),
        static_uid=(meta.annotations or {}).get(STATIC_UID),
    )
    return pod.key, pod


def read_slice(content: bytes, node_name: str) -> tuple[str, DeviceSlice] | None:
    """A slice of this node's devices, by its own name. Errors: msgspec.DecodeError."""
    told = msgspec.json.decode(content, type=_Slice)
    if told.spec.node_name != node_name or not told.metadata.name:
        return None
    uuids: dict[str, str] = {}
    for device in told.spec.devices or ():
        attributes = device.attributes or {}
        uuid = attributes.get("uuid") or attributes.get(f"{told.spec.driver}/uuid")
        if device.name and uuid is not None and uuid.string:
            uuids[device.name] = _cut(uuid.string)
    return told.metadata.name, DeviceSlice(
        driver=told.spec.driver,
        pool=told.spec.pool.name,
        generation=told.spec.pool.generation,
        uuids=uuids,
    )


def claimed_uuids(slices: Mapping[str, DeviceSlice]) -> dict[tuple[str, str, str], str]:
    """Driver, pool and device name -> UUID, by the newest generation of each pool."""
    newest: dict[tuple[str, str], int] = {}
    for one in slices.values():
        pool = (one.driver, one.pool)
        newest[pool] = max(newest.get(pool, one.generation), one.generation)
    return {
        (one.driver, one.pool, device): uuid
        for one in slices.values()
        if one.generation == newest[one.driver, one.pool]
        for device, uuid in one.uuids.items()
    }


def _kept(values: Mapping[str, str], kept: frozenset[str]) -> dict[str, str]:
    chosen = sorted(
        (key for key in values if key in kept or key.startswith(TAG_PREFIX)),
        key=lambda key: (not key.startswith(TAG_PREFIX), key),
    )
    return {_cut(key): _cut(values[key]) for key in chosen[:NAMES_MAX]}


def _cut(value: str) -> str:
    return value[:VALUE_LENGTH_MAX]


def _unix_ms(text: str | None) -> int | None:
    """Milliseconds since 1970 of an RFC 3339 time; None for what is none."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            return None
        return int(moment.timestamp() * MS_PER_SECOND)
    except (ValueError, OverflowError):
        return None
