"""The port of attribution: which owners held a device over a window, and why we think so.

An owner comes with its evidence. Work of a process nobody tagged is `unattributed`, a device
without processes is `idle`; neither is a hole, and neither is ever guessed into a project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from flopledger_core.identity import Owner
from flopledger_core.records import Attribution, Precision, PrecisionOrigin

if TYPE_CHECKING:
    from collections.abc import Mapping


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process as the operating system knows it, identified by pid and create time together."""

    pid: int
    create_time_ms: int  # wall time of its start; a reused pid has another one
    user: str | None
    uid: int | None = None  # the real user, None where a table does not know it
    environ: dict[str, str] | None  # None: not permitted to read it
    ancestors: tuple[tuple[int, int], ...]  # (pid, create_time_ms) of parent, grandparent, ...
    reason: str | None  # why something of it could not be read


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One owner's claim on a device in a window, with its weight in the split."""

    owner: Owner
    weight: int  # processes of this owner on the device; shares are proportional
    source: str  # records.AttributionSource
    evidence: str | None
    precision: Precision | None
    precision_origin: PrecisionOrigin
    user: str | None
    flags: tuple[str, ...]
    # Percent of the SMs that the owner's processes used, added up; None: the driver tells none.
    used_percent: int | None = None
    allocated: bool = False  # a scheduler gave the device to the owner's job
    since_unix_ms: int | None = None  # and so since then, where it says so

    def attribution(self, sharers: int, weights: int) -> Attribution:
        """The attribution of a record for this claim among `sharers` with so many `weights`."""
        return msgspec.convert(
            {
                "source": self.source,
                "sharers": sharers,
                "weight": self.weight,
                "weights": weights,
                "evidence": self.evidence,
            },
            Attribution,
        )


class DeviceReading(msgspec.Struct, frozen=True, kw_only=True):
    """The reading of a device whose owners are asked for."""

    device: str  # Device.key
    boot_ns: int
    unix_ns: int
    process_utilization: dict[int, int] | None = None  # see GpuSample


class ProcessTable(Protocol):
    """Knows the processes of the node."""

    def identify(self, pid: int) -> Process | None:
        """The process now behind `pid`; None when it is gone."""
        ...


class Attributor(Protocol):
    """Decides who holds a device."""

    def claims(
        self, processes: tuple[int, ...] | None, reading: DeviceReading | None = None
    ) -> tuple[Claim, ...]:
        """The owners of a device on which `processes` run; never empty.

        Without a reading no device is asked about: whose the processes themselves are.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def with_default_precision(
    claims: tuple[Claim, ...], precision: Precision | None
) -> tuple[Claim, ...]:
    """Claims in which work without a declared precision takes the configured one.

    An idle device does no work that an operator could have meant.
    """
    if precision is None:
        return claims
    return tuple(
        msgspec.structs.replace(claim, precision=precision, precision_origin="configured")
        if claim.precision is None and claim.owner.kind != "idle"
        else claim
        for claim in claims
    )


def same_owners(left: tuple[Claim, ...], right: tuple[Claim, ...]) -> bool:
    """True when two sets of claims lead to the same records, so that no window must be split."""
    return left == right or _keyed(left) == _keyed(right)


def _keyed(claims: tuple[Claim, ...]) -> Mapping[tuple[object, ...], int]:
    return {
        (
            claim.owner,
            claim.source,
            claim.precision,
            claim.precision_origin,
            claim.user,
            claim.flags,
            claim.allocated,
            claim.used_percent is None,
        ): claim.weight
        for claim in claims
    }
