"""Which devices Slurm means by its GPU numbers.

SLURM_JOB_GPUS counts the GPUs in the order of gres.conf (Slurm 21.08 and later), not in NVML's and
not by device file. So gres.conf is read as slurmd reads it, each place in it leads to the device
minors of its files (/dev/nvidia2 has minor 2), and those lead to the devices that are metered. What
cannot be told for certain is not guessed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flopledger_agent.attribution.allocations import DeviceDirectory
    from flopledger_agent.attribution.slurm_jobs import SlurmJob

HOSTS_MAX: Final = 4096  # of one bracketed list
GRES_BYTES_MAX: Final = 1024 * 1024
SHARED_GRES: Final = frozenset({"shard", "mps"})
_BRACKETS: Final = re.compile(r"\[([^\[\]]*)\]")
_GPU_FILE: Final = re.compile(r".*/nvidia([0-9]{1,5})")
_CAP_FILE: Final = re.compile(r".*/nvidia-cap([0-9]{1,5})")
_PAIR: Final = re.compile(r"([A-Za-z]+)=(\S*)")


class GresDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What one place in the order of gres.conf stands for: a GPU, or an instance of one (MIG)."""

    minor_number: int | None
    cap_minor_numbers: tuple[int, ...] = ()


class GresOrder(msgspec.Struct, frozen=True, kw_only=True):
    """This node's GPUs in Slurm's order."""

    devices: tuple[GresDevice, ...] = ()
    detects: str | None = None  # AutoDetect's value: Slurm finds the devices itself
    may_share: bool = False  # shards or MPS are configured, so jobs may hold a GPU together
    trouble: str | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of a job by key, or why they cannot be told, with the remedy."""

    devices: tuple[str, ...] = ()
    how: str = ""
    trouble: str | None = None


def parse_gres_conf(text: str, node: str | None) -> GresOrder:
    """The GPUs of `node` in gres.conf's order; lines of other nodes are left out."""
    devices: list[GresDevice] = []
    detects: str | None = None
    may_share = False
    for line in _lines(text):
        if line.split(None, 1)[0].lower() == "include":
            return GresOrder(
                may_share=True, trouble="gres.conf includes another file, which is not followed"
            )
        values = {key.lower(): value for key, value in _PAIR.findall(line)}
        nodes = values.get("nodename")
        if nodes is not None and node is not None and node not in set(expanded(nodes)):
            continue
        if "autodetect" in values and values["autodetect"].lower() != "off":
            detects = values["autodetect"].lower()
        name = values.get("name", "").lower()
        may_share = may_share or name in SHARED_GRES
        if name != "gpu":
            continue
        if "multiplefiles" in values:
            devices.append(_device(tuple(expanded(values["multiplefiles"]))))
        elif "file" in values:
            devices.extend(_device((path,)) for path in expanded(values["file"]))
    return GresOrder(devices=tuple(devices), detects=detects, may_share=may_share)


def expanded(pattern: str) -> Iterator[str]:
    """Every name that a list such as /dev/nvidia[0-1,3],/dev/nvidia5 stands for, in its order."""
    count = 0
    for part in re.split(r",(?![^\[]*\])", pattern):
        for name in _unfolded(part):
            count += 1
            if count > HOSTS_MAX:
                return
            yield name


def devices_of(job: SlurmJob, order: GresOrder | None, directory: DeviceDirectory) -> Held:
    """The devices that `job` holds on this node."""
    if job.gpu_uuids:
        return _by_uuid(job, directory)
    if job.device_minor_numbers:
        return _by_minor(job, directory)
    if job.has_no_device_files:
        return Held(
            trouble=f"job {job.name}: Slurm does not know which GPUs it gave; "
            "name their files in gres.conf (File=/dev/nvidia...)"
        )
    return _by_order(job, order, directory) if job.gpu_index else Held()


def _by_order(job: SlurmJob, order: GresOrder | None, directory: DeviceDirectory) -> Held:
    if order is None or order.trouble or not (order.devices or order.detects):
        if len(job.gpu_index) == len({entry.uuid for entry in directory.entries}):
            # Whatever the order, it holds them all.
            keys = tuple(entry.key for entry in directory.entries)
            return Held(devices=keys, how="every GPU of the node")
        reason = "gres.conf is not readable" if order is None else order.trouble
        reason = reason or "gres.conf names no GPU files and no AutoDetect for this node"
        return Held(
            trouble=f"job {job.name}: which devices Slurm's GPUs "
            f"{','.join(map(str, job.gpu_index))} are is not known, because {reason}; "
            "let the agent read gres.conf, or list the minors in prolog.sh (gpu_minors)"
        )
    if not order.devices:
        return _detected(job, order, directory)
    named = _by_place(job, order, directory)
    if order.detects and named.trouble is None:
        detected = _detected(job, order, directory)
        if sorted(detected.devices) != sorted(named.devices):
            return _unknown(job, "File= and AutoDetect= of gres.conf lead to different orders")
    return named


def _by_place(job: SlurmJob, order: GresOrder, directory: DeviceDirectory) -> Held:
    found: list[str] = []
    for place in job.gpu_index:
        if place >= len(order.devices):
            return _unknown(job, f"GPU {place} is not in gres.conf")
        device = order.devices[place]
        keys = tuple(
            key for minor in device.cap_minor_numbers for key in directory.of_cap_minor(minor)
        )
        if device.cap_minor_numbers and not keys:
            return _unknown(job, f"GPU {place} of gres.conf is an instance (MIG) not seen here")
        if not keys and device.minor_number is not None:
            keys = directory.of_minor(device.minor_number)
        if not keys:
            return _unknown(job, f"the file of GPU {place} of gres.conf is of no device here")
        found.extend(keys)
    places = ",".join(map(str, job.gpu_index))
    return Held(devices=tuple(dict.fromkeys(found)), how=f"GPU {places} of gres.conf")


def _detected(job: SlurmJob, order: GresOrder, directory: DeviceDirectory) -> Held:
    """Slurm numbers what it detects by PCI address; sure where device minors have that order, too.

    With AutoDetect=nvml the order by PCI address is documented (gres.conf(5)).
    """
    gpus = {
        entry.uuid: (entry.pci_bus_id.lower(), entry.minor)
        for entry in directory.entries
        if entry.pci_bus_id is not None
    }
    if len(gpus) != len({entry.uuid for entry in directory.entries}) or not gpus:
        return _unknown(job, "the driver did not tell every PCI address")
    by_address = sorted(gpus, key=lambda uuid: gpus[uuid][0].zfill(20))
    by_minor = sorted(gpus, key=lambda uuid: (gpus[uuid][1] is None, gpus[uuid][1] or 0))
    if order.detects != "nvml" and by_address != by_minor:
        return _unknown(job, f"AutoDetect={order.detects} has an order that is not known")
    if any(place >= len(by_address) for place in job.gpu_index):
        return _unknown(job, "Slurm counts more GPUs than the driver")
    wanted = [by_address[place] for place in job.gpu_index]
    keys = tuple(entry.key for uuid in wanted for entry in directory.entries if entry.uuid == uuid)
    return Held(devices=keys, how=f"AutoDetect={order.detects}, by PCI address")


def _by_uuid(job: SlurmJob, directory: DeviceDirectory) -> Held:
    found: list[str] = []
    for uuid in job.gpu_uuids:
        keys = directory.of_uuid(uuid)
        if not keys:
            return _unknown(job, f"{uuid} is not a device here")
        found.extend(keys)
    return Held(devices=tuple(dict.fromkeys(found)), how="named by UUID")


def _by_minor(job: SlurmJob, directory: DeviceDirectory) -> Held:
    found: list[str] = []
    for minor in job.device_minor_numbers:
        keys = directory.of_minor(minor)
        if not keys:
            return _unknown(job, f"/dev/nvidia{minor} is of no device here")
        found.extend(keys)
    return Held(devices=tuple(dict.fromkeys(found)), how="device minors told by the prolog")


def _unknown(job: SlurmJob, reason: str) -> Held:
    return Held(
        trouble=f"job {job.name}: its devices are not known, because {reason}; "
        "compare gres.conf with `nvidia-smi -L` and restart slurmd after changing it"
    )


def _device(paths: tuple[str, ...]) -> GresDevice:
    minors = [int(found.group(1)) for path in paths if (found := _GPU_FILE.fullmatch(path))]
    caps = tuple(int(found.group(1)) for path in paths if (found := _CAP_FILE.fullmatch(path)))
    return GresDevice(minor_number=minors[0] if minors else None, cap_minor_numbers=caps)


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        content = line.partition("#")[0].strip()
        if content:
            yield content


def _unfolded(name: str) -> Iterator[str]:
    found = _BRACKETS.search(name)
    if found is None:
        yield name
        return
    for part in found.group(1).split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            return
        end = int(last) if dash else int(first)
        for number in range(int(first), min(end, int(first) + HOSTS_MAX) + 1):
            text = str(number).zfill(len(first))
            yield from _unfolded(name[: found.start()] + text + name[found.end() :])
