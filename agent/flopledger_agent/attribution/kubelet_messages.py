"""kubelet's answer to `PodResourcesLister.List` (v1), read from protobuf's wire form. Pure.

Only the fields that say who was granted what are read; all others, those of later versions too,
are skipped by their wire type, as the format asks of every reader. Field numbers are those of
k8s.io/kubelet/pkg/apis/podresources/v1/api.proto. Bytes that are no such message raise
`NotAPodList` and never anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from flopledger_core.errors import FlopLedgerError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIST_METHOD: Final = "/v1.PodResourcesLister/List"
LIST_REQUEST: Final = b""  # ListPodResourcesRequest has no fields

_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH: Final = 2
_FIXED32: Final = 5
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}
_VARINT_BYTES_MAX: Final = 10

_Fields: TypeAlias = dict[int, list[bytes]]


class NotAPodList(FlopLedgerError):
    """The bytes are not a list of pod resources."""


class GrantedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a device plugin gave to a container."""

    resource: str  # nvidia.com/gpu
    device_id: str  # the plugin's own id: GPU-..., MIG-..., GPU-...::2, nvidia0/gi3


class ClaimedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was given to a container through a resource claim (DRA)."""

    claim: str
    driver: str
    pool: str
    device: str  # the driver's name of it, unique within driver and pool


class ContainerGrants(msgspec.Struct, frozen=True, kw_only=True):
    """What one container was given."""

    name: str
    devices: tuple[GrantedDevice, ...] = ()
    claims: tuple[ClaimedDevice, ...] = ()


class PodGrants(msgspec.Struct, frozen=True, kw_only=True):
    """What one pod's containers were given; those that were given no device are left out."""

    namespace: str
    name: str
    containers: tuple[ContainerGrants, ...] = ()

    @property
    def key(self) -> str:
        """Namespace and name, which only one pod has at a time."""
        return f"{self.namespace}/{self.name}"


def decode_pod_list(message: bytes) -> tuple[PodGrants, ...]:
    """The pods of a ListPodResourcesResponse, those without any device included.

    Errors: NotAPodList.
    """
    return tuple(_pod(pod) for pod in _fields(message).get(1, ()))


def _pod(message: bytes) -> PodGrants:
    fields = _fields(message)
    containers = [_container(one) for one in fields.get(3, ())]
    return PodGrants(
        name=_text(fields, 1),
        namespace=_text(fields, 2),
        containers=tuple(one for one in containers if one.devices or one.claims),
    )


def _container(message: bytes) -> ContainerGrants:
    fields = _fields(message)
    return ContainerGrants(
        name=_text(fields, 1),
        devices=tuple(device for one in fields.get(2, ()) for device in _devices(one)),
        claims=tuple(claim for one in fields.get(5, ()) for claim in _claims(one)),
    )


def _devices(message: bytes) -> Iterator[GrantedDevice]:
    """One device plugin's resource; a resource is repeated for each place its devices have."""
    fields = _fields(message)
    resource = _text(fields, 1)
    for device_id in fields.get(2, ()):
        yield GrantedDevice(resource=resource, device_id=_string(device_id))


def _claims(message: bytes) -> Iterator[ClaimedDevice]:
    fields = _fields(message)
    claim = f"{_text(fields, 3)}/{_text(fields, 2)}"
    for one in fields.get(4, ()):
        inner = _fields(one)
        yield ClaimedDevice(
            claim=claim, driver=_text(inner, 2), pool=_text(inner, 3), device=_text(inner, 4)
        )


def _text(fields: _Fields, number: int) -> str:
    """A string field; the last one of several counts, absent is empty."""
    values = fields.get(number)
    return _string(values[-1]) if values else ""


def _string(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotAPodList("a name is not UTF-8") from error


def _fields(message: bytes) -> _Fields:
    """The length-delimited fields of a message by number; other kinds are checked and skipped."""
    found: _Fields = {}
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise NotAPodList("a field has the number 0")
        if kind == _VARINT:
            _, place = _varint(message, place)
            continue
        size = _FIXED_BYTES.get(kind)
        if kind == _LENGTH:
            size, place = _varint(message, place)
        if size is None:
            raise NotAPodList(f"field {number} has the unknown wire type {kind}")
        if size > end - place:
            raise NotAPodList(f"field {number} ends beyond the message")
        if kind == _LENGTH:
            found.setdefault(number, []).append(message[place : place + size])
        place += size
    return found


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A variable-length integer, and the place after it."""
    value = 0
    for count in range(_VARINT_BYTES_MAX):
        if place + count >= len(message):
            break
        byte = message[place + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise NotAPodList("a number does not end")
