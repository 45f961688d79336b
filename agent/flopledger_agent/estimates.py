"""First estimates: executed FLOP of a record as of its sealing, written into the record. Pure.

The counters in the record stay the truth. The estimate says what the agent of that day made of
them, so that a later restatement can be shown beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_agent.windows import Closed
from flopledger_core.basis import tensor_cross_check
from flopledger_core.flop import estimate
from flopledger_core.records import UsageRecord

if TYPE_CHECKING:
    from flopledger_core.accelerators import AcceleratorTable

UNKNOWN_ARCHITECTURE: Final = "no_hardware_table_row"


def with_estimate(item: Closed, table: AcceleratorTable) -> Closed:
    """The closed record with its first estimate, or with the reason why FLOP is absent.

    A gap has none: it is bounded by whoever adds it up.
    """
    record = item.record
    if not isinstance(record, UsageRecord):
        return item
    device, found = record.device, estimate(record, table)
    absent, flags = dict(record.absent), set(record.flags)
    if found is None:
        absent["flop"] = UNKNOWN_ARCHITECTURE
    else:
        resolved = table.resolve(device.name, device.pci_device_id, device.compute_capability)
        if resolved is not None and not resolved.in_table:
            flags.add("device_not_in_table")
    if tensor_cross_check(record.cycles):
        flags.add("tensor_cross_check")
    return Closed(
        record=msgspec.structs.replace(
            record,
            estimate=found,
            absent=dict(sorted(absent.items())),
            flags=tuple(sorted(flags)),
        ),
        user=item.user,
    )
