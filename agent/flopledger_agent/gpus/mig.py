"""The layout of a partitioned GPU (MIG): the parts it is metered as, and what each is. Pure.

The metered thing is the GPU instance, because counters know nothing smaller. Instances lie side by
side in the order of their ids; the compute slices that none of them uses are one more part, which
cannot work. Whatever is read of the whole GPU only is cut along these slices (`records.Slices`).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.errors import FlopLedgerError
from flopledger_core.records import Device, Slices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flopledger_core.accelerators import Accelerator

LAYOUT_UNCLEAR: Final = "mig_layout_unclear"
SLICES_UNKNOWN: Final = "mig_slices_unknown"
NO_COMPUTE_INSTANCE: Final = "no_compute_instance"
NOT_CONFIGURED: Final = "slices_not_configured"
INSTANCE_ID_MAX: Final = 64  # records.Device.gpu_instance
SLICES_MAX: Final = 64  # records.Slices.of_count
SMS_MAX: Final = 4096  # records.Device.sm_count


class LayoutUnclear(FlopLedgerError):
    """The parts do not add up to the GPU: it was being partitioned while it was read."""


class MigDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML calls a MIG device: a compute instance inside a GPU instance."""

    gpu_instance: int
    sm_count: int  # of the compute instance
    gpu_slices: int  # of its GPU instance
    compute_slices: int  # of the compute instance


class Profiles(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver can cut a GPU into."""

    of_count: int  # compute slices of the whole GPU
    sms_by_slices: dict[int, int]  # SMs of a GPU instance with so many slices


def profiles_of(told: Mapping[int, int], row: Accelerator | None) -> Profiles | None:
    """The profiles the driver tells, else those of the hardware table; None: neither has any."""
    known = {
        slices: sms
        for slices, sms in told.items()
        if 0 < slices <= SLICES_MAX and 0 < sms <= SMS_MAX
    }
    if not known and row is not None:  # written there as "3g"
        known = {int(name.rstrip("g")): sms for name, sms in row.mig_sm_counts.items()}
    return Profiles(of_count=max(known), sms_by_slices=known) if known else None


def layout(whole: Device, found: Iterable[MigDevice], profiles: Profiles) -> tuple[Device, ...]:
    """The parts of a GPU, the unused slices last. Errors: LayoutUnclear.

    The SMs of a GPU instance are its one compute instance's where that fills it, else those of its
    profile; where neither is known they are at least those of its compute instances.
    """
    instances: dict[int, list[MigDevice]] = defaultdict(list)
    for item in found:
        instances[item.gpu_instance].append(item)
    sms_of = whole.sm_count or profiles.sms_by_slices.get(profiles.of_count)
    parts: list[Device] = []
    reached = sms_used = 0
    for gpu_instance, members in sorted(instances.items()):
        count = members[0].gpu_slices
        sm_count = _sm_count(members, profiles)
        if (
            {item.gpu_slices for item in members} != {count}
            or not 0 < count <= profiles.of_count - reached
            or not 0 <= gpu_instance <= INSTANCE_ID_MAX
        ):
            raise LayoutUnclear(f"GPU instance {gpu_instance} does not fit into {whole.uuid}")
        parts.append(
            msgspec.structs.replace(
                whole,
                gpu_instance=gpu_instance,
                sm_count=sm_count if 0 < sm_count <= SMS_MAX else None,
                slices=Slices(
                    first_index=reached, count=count, of_count=profiles.of_count, sms_of=sms_of
                ),
            )
        )
        reached += count
        sms_used += sm_count
    if reached < profiles.of_count:
        rest = max(0, (sms_of or 0) - sms_used)
        slices = Slices(
            first_index=reached,
            count=profiles.of_count - reached,
            of_count=profiles.of_count,
            sms_of=sms_of,
        )
        parts.append(msgspec.structs.replace(whole, sm_count=rest or None, slices=slices))
    return tuple(parts)


def _sm_count(members: list[MigDevice], profiles: Profiles) -> int:
    if len(members) == 1 and members[0].compute_slices == members[0].gpu_slices:
        return members[0].sm_count
    together = sum(item.sm_count for item in members)
    return max(together, profiles.sms_by_slices.get(members[0].gpu_slices, 0))


def why_idle(part: Device, parts: int) -> str:
    """Why a part without a GPU instance has no cycles; `parts`: of how many it is one."""
    assert part.gpu_instance is None, "an instance has counters"
    return NO_COMPUTE_INSTANCE if parts == 1 else NOT_CONFIGURED
