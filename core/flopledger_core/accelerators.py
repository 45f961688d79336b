"""The hardware table: what each GPU model can do in one SM-cycle, with a source per row.

The table never overwrites a measurement: it turns SM-cycles into FLOP and bounds what a device
could have done. A device is found by its PCI id first and its NVML name second; one that is not
in the table has no FLOP here, and whoever asks says so instead of guessing.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import TYPE_CHECKING, Final

import msgspec

from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.units import HZ_PER_MHZ

if TYPE_CHECKING:
    from collections.abc import Mapping

TENSOR_FLOAT_PRECISIONS: Final = ("tf32", "fp16", "bf16", "fp8", "fp6", "fp4")
PRECISIONS: Final = ("fp64", *TENSOR_FLOAT_PRECISIONS, "int8")


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one SM of an architecture does per cycle when a pipe is fully active."""

    compute_capabilities: tuple[str, ...]
    nvml_architecture: int  # NVML_DEVICE_ARCH_*
    cores_per_sm: int
    gpm: bool  # NVML GPU performance monitoring exists on it
    source: str
    legacy_mma_floor_per_mille: int
    flop_per_cycle_per_sm: dict[str, int]  # by pipe, `tensor_<precision>` for the tensor pipe
    operations_per_cycle_per_sm: dict[str, int]  # integer work, never added to FLOP

    def tensor_rate(self, precision: str) -> int | None:
        """FLOP per SM-cycle of the tensor pipe at a float precision; None where it has none."""
        return self.flop_per_cycle_per_sm.get(f"tensor_{precision}")

    def tensor_float_rates(self) -> dict[str, int]:
        """Every float precision the general tensor pipe serves (FP64 is a pipe of its own)."""
        rates = {name: self.tensor_rate(name) for name in TENSOR_FLOAT_PRECISIONS}
        return {name: rate for name, rate in rates.items() if rate is not None}


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU model: how many SMs, how fast, how much power at most."""

    key: str
    names: tuple[str, ...]  # as NVML gives them
    pci_device_ids: tuple[str, ...]  # four upper-case hex digits
    architecture: str
    form_factor: str
    sm_count: int
    tensor_clock_mhz: int  # the clock datasheet tensor peaks are quoted at
    max_sm_clock_mhz: int  # what NVML reports as the highest SM clock
    power_limit_watts: int
    memory_mib: int
    source: str
    datasheet_teraflop_per_second: dict[str, str]  # decimal text; tensor_int8 in tera-operations

    def max_sm_cycles(self, time_ms: int) -> int:
        """The most SM-cycles this device could have run in `time_ms`, all SMs at maximum clock."""
        return self.sm_count * self.max_sm_clock_mhz * HZ_PER_MHZ * time_ms // 1000


class AcceleratorTable:
    """The loaded table: a value made once and passed on, so tests can bring their own."""

    def __init__(
        self,
        version: str,
        architectures: Mapping[str, Architecture],
        accelerators: tuple[Accelerator, ...],
    ) -> None:
        self.version = version
        self.architectures = dict(architectures)
        self.accelerators = accelerators
        self._by_key = {row.key: row for row in accelerators}
        self._by_pci = {pci: row for row in accelerators for pci in row.pci_device_ids}
        self._by_name = {name: row for row in accelerators for name in row.names}
        for row in accelerators:
            if row.architecture not in self.architectures:
                raise UnknownName(
                    f"accelerators.{row.key}.architecture",
                    row.architecture,
                    "name one of the table's architectures",
                )

    def find(self, name: str, pci_device_id: str | None = None) -> Accelerator | None:
        """The row of a device by PCI id, else by NVML name; None when the table lacks it."""
        if pci_device_id is not None:
            found = self._by_pci.get(pci_device_id.upper())
            if found is not None:
                return found
        return self._by_name.get(name)

    def by_key(self, key: str) -> Accelerator:
        """The row called `key` (as `flopledger estimate hardware --accelerator` takes it)."""
        if key not in self._by_key:
            raise UnknownName("accelerator", key, f"use one of: {', '.join(self._by_key)}")
        return self._by_key[key]

    def architecture_of(self, accelerator: Accelerator) -> Architecture:
        """The architecture row of a device row."""
        return self.architectures[accelerator.architecture]


class _TableFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: str
    architectures: dict[str, Architecture]
    accelerators: tuple[Accelerator, ...]


def load_table(text: str | None = None) -> AcceleratorTable:
    """Read a hardware table from TOML text; the packaged one when no text is given."""
    if text is None:
        file = resources.files("flopledger_core") / "data" / "accelerators.toml"
        text = file.read_text(encoding="utf-8")
    try:
        parsed = msgspec.convert(tomllib.loads(text), _TableFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput("accelerator table", str(error), "correct the table file") from error
    return AcceleratorTable(parsed.version, parsed.architectures, parsed.accelerators)
