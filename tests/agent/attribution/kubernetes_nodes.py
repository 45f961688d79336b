"""A node with two GPUs, whole and with the second one partitioned."""

from __future__ import annotations

from flopledger_agent.attribution.allocations import DeviceDirectory, DirectoryEntry

A = "GPU-11111111-1111-4111-8111-111111111111"
B = "GPU-22222222-2222-4222-8222-222222222222"
MIG_A = "MIG-aaaaaaaa-aaaa-5aaa-8aaa-aaaaaaaaaaaa"
MIG_B = "MIG-bbbbbbbb-bbbb-5bbb-8bbb-bbbbbbbbbbbb"
WHOLE = DeviceDirectory(
    entries=(
        DirectoryEntry(key=A, uuid=A, index=0, minor=0),
        DirectoryEntry(key=B, uuid=B, index=1, minor=1),
    )
)
PARTS = DeviceDirectory(
    entries=(
        DirectoryEntry(key=A, uuid=A, index=0, minor=0),
        DirectoryEntry(key=f"{B}/3", uuid=B, gpu_instance=3, index=1, minor=1, mig_uuids=(MIG_A,)),
        DirectoryEntry(key=f"{B}/5", uuid=B, gpu_instance=5, index=1, minor=1, mig_uuids=(MIG_B,)),
    )
)
