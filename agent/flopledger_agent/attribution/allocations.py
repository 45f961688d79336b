"""The port of schedulers: which job holds which device, and who says so.

An allocation is what a scheduler granted, whether or not the job runs anything on it. Sources read
files, sockets or APIs on threads of their own and answer from memory. They speak of devices by
ordinals, device minors, PCI addresses or UUIDs; a `DeviceDirectory` turns each of these into the
key under which the device is metered, and an ordinal never leaves a source.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

SchedulerName = Literal["slurm", "kubernetes", "docker", "podman", "containerd"]


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler says that a job holds a device, or a part of it."""

    scheduler: SchedulerName
    device: str  # Device.key ("GPU-..." or "GPU-.../3"), never an ordinal
    job: str  # the scheduler's own id (Slurm: 123, 123_4, 123+1; Kubernetes: the pod's uid)
    attempt: str | None = None  # Slurm restart count, pod restart
    user: str | None = None
    # account, partition, comment, wckey, job_name, namespace, pod, container, image, label:KEY,
    # annotation:KEY; nothing in them is checked yet. `job_id` and `sluid` are what control
    # groups and SLURM_JOB_ID say where `job` is another form of it (123_4 of an array, 123+1).
    names: dict[str, str] = {}
    # project, entity, model, run, activity, precision as the job itself stated them to the
    # scheduler (comment, labels); nothing in them is checked yet
    tags: dict[str, str] = {}
    shared: bool = False  # the scheduler gave the device to several at once (shard, MPS, slicing)
    since_unix_ms: int | None = None
    evidence: str  # one short sentence for people: which file, call or path said so


class AllocationView(msgspec.Struct, frozen=True, kw_only=True):
    """What a source knows now."""

    allocations: tuple[Allocation, ...] = ()
    troubles: tuple[str, ...] = ()  # one sentence each, with the remedy
    ghosts: tuple[str, ...] = ()  # job files left behind, one sentence each
    as_of_boot_ns: int | None = None  # when the source last had an answer; None: never


class AllocationSource(Protocol):
    """Something that knows which jobs hold the devices of this node.

    A source calls the `changed` it was made with, from any thread, whenever its view differs from
    the one before: a reading is then taken at once, so that windows split at the job's edge.
    """

    def allocations(self) -> AllocationView:
        """What is known now, from memory; never blocks and never raises."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class DirectoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Every name of one metered device, as far as the driver told them."""

    key: str  # Device.key
    uuid: str  # the GPU's
    gpu_instance: int | None = None  # None: the whole GPU, or what no instance of it uses
    index: int | None = None  # NVML's ordinal of the GPU
    minor: int | None = None  # of /dev/nvidia<minor>, the GPU's
    pci_bus_id: str | None = None  # the GPU's, as in 00000000:65:00.0
    mig_uuids: tuple[str, ...] = ()  # MIG-... of the compute instances in this GPU instance
    cap_minor: int | None = None  # of /dev/nvidia-caps/nvidia-cap<minor>: the instance's access


class DeviceDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """Finds the keys of devices by any of their names.

    Each look-up gives the keys of what was named, none where it is not known: whoever holds a whole
    GPU that is partitioned holds all of its parts, so there may be several.
    """

    entries: tuple[DirectoryEntry, ...] = ()

    def of_uuid(self, uuid: str) -> tuple[str, ...]:
        """By `GPU-...`, by `MIG-...`, or by the older `MIG-GPU-.../<instance>/<compute>`."""
        wanted = uuid.strip().lower()
        if wanted.startswith("mig-gpu-"):
            gpu, _, rest = wanted.removeprefix("mig-").partition("/")
            instance = rest.partition("/")[0]
            if not instance.isascii() or not instance.isdigit():
                return ()
            return self._keys(lambda entry: entry.uuid.lower() == gpu, int(instance))
        return tuple(
            entry.key
            for entry in self.entries
            if entry.uuid.lower() == wanted or wanted in {name.lower() for name in entry.mig_uuids}
        )

    def of_index(self, index: int, gpu_instance: int | None = None) -> tuple[str, ...]:
        """By NVML's ordinal; with `gpu_instance` only that part of the GPU."""
        return self._keys(lambda entry: entry.index == index, gpu_instance)

    def of_minor(self, minor: int, gpu_instance: int | None = None) -> tuple[str, ...]:
        """By the minor number of the GPU's device file; with `gpu_instance` only that part."""
        return self._keys(lambda entry: entry.minor == minor, gpu_instance)

    def of_cap_minor(self, minor: int) -> tuple[str, ...]:
        """By the minor number of a GPU instance's access file."""
        return tuple(entry.key for entry in self.entries if entry.cap_minor == minor)

    def of_pci_bus_id(self, bus_id: str, gpu_instance: int | None = None) -> tuple[str, ...]:
        """By PCI address, with a domain of four or eight digits."""
        wanted = _address(bus_id)
        return self._keys(
            lambda entry: entry.pci_bus_id is not None and _address(entry.pci_bus_id) == wanted,
            gpu_instance,
        )

    def _keys(self, matches: _Matches, gpu_instance: int | None) -> tuple[str, ...]:
        return tuple(
            entry.key
            for entry in self.entries
            if matches(entry) and (gpu_instance is None or entry.gpu_instance == gpu_instance)
        )


class _Matches(Protocol):
    def __call__(self, entry: DirectoryEntry, /) -> bool: ...


def _address(bus_id: str) -> str:
    """A PCI address in one form: without leading zeros of the domain, in small letters."""
    domain, colon, rest = bus_id.strip().lower().partition(":")
    return f"{domain.lstrip('0')}{colon}{rest}"
