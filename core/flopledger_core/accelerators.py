"""The hardware table: what each GPU model can do in one SM-cycle, with a source per row.

The table never overwrites a measurement: it turns SM-cycles into FLOP and bounds what a device
could have done. A device is found by its PCI id first and its NVML name second. A model that is
not in the table stands in with the extremes of its architecture; one of no known architecture has
no FLOP here, and whoever asks says so instead of guessing. Rates are dense ones: 2:4 sparsity
doubles what a result is worth to its user, not what the pipe carries out.
"""

from __future__ import annotations

import tomllib
from fractions import Fraction
from importlib import resources
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from flopledger_core.errors import InvalidInput, UnknownName
from flopledger_core.units import HZ_PER_MHZ, ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TENSOR_FLOAT_PRECISIONS: Final = ("tf32", "fp16", "bf16", "fp8", "fp6", "fp4")
TENSOR_INTEGER_RATES: Final = ("tensor_int8", "tensor_int4")
PRECISIONS: Final = ("fp64", *TENSOR_FLOAT_PRECISIONS, "int8")
# A 2:4 sparse figure is twice the dense one. No dense figure of any datasheet lies this far above
# SMs x rate x clock, so one that does was copied from the wrong column.
SPARSE_SUSPICION: Final = Fraction(3, 2)
# NVML's maximum clock is too low on some parts (NVIDIA/cudnn-frontend), and a board draws more than
# its limit for a while. Bounds allow for both, and validation disputes only what lies beyond.
CLOCK_TOLERANCE_PER_MILLE: Final = 50
POWER_TOLERANCE_PER_MILLE: Final = 200


class RateSpan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Operations per SM-cycle of one pipe: the least, the assumed and the most it carries out."""

    low_per_cycle: int
    central_per_cycle: int
    high_per_cycle: int

    def __post_init__(self) -> None:
        if not 0 <= self.low_per_cycle <= self.central_per_cycle <= self.high_per_cycle:
            found = (self.low_per_cycle, self.central_per_cycle, self.high_per_cycle)
            raise InvalidInput("rate span", found, "give 0 <= low <= central <= high")


NO_RATE: Final = RateSpan(low_per_cycle=0, central_per_cycle=0, high_per_cycle=0)


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one SM of an architecture does per cycle when a pipe is fully active."""

    compute_capabilities: tuple[str, ...]
    nvml_architecture: int  # NVML_DEVICE_ARCH_*
    cores_per_sm: int
    gpm: bool  # NVML GPU performance monitoring exists on it
    source: str
    flop_per_cycle_per_sm: dict[str, int]  # by pipe, `tensor_<precision>` for the tensor pipe
    operations_per_cycle_per_sm: dict[str, int]  # integer work, never added to FLOP
    # What the slowest instructions reach at a pipe that reads fully active; else the rate itself.
    slowest_per_cycle_per_sm: dict[str, int] = {}
    fastest_per_cycle_per_sm: dict[str, int] = {}  # of instructions that do more than the usual one
    # What no model of it exceeds, where the table's own models do not reach that far.
    most_sm_count: int = 0
    most_sm_clock_mhz: int = 0
    most_power_watts: int = 0

    def tensor_rate(self, precision: str) -> int | None:
        """FLOP per SM-cycle of the tensor pipe at a float precision; None where it has none."""
        return self.flop_per_cycle_per_sm.get(f"tensor_{precision}")

    def tensor_float_rates(self) -> dict[str, int]:
        """Every float precision the general tensor pipe serves (FP64 is a pipe of its own)."""
        rates = {name: self.tensor_rate(name) for name in TENSOR_FLOAT_PRECISIONS}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def spans(self) -> dict[str, RateSpan]:
        """Each rate by name, its slowest instructions at the low end, its fastest at the high."""
        rates = self.flop_per_cycle_per_sm | self.operations_per_cycle_per_sm
        return {
            name: RateSpan(
                low_per_cycle=self.slowest_per_cycle_per_sm.get(name, rate),
                central_per_cycle=rate,
                high_per_cycle=self.fastest_per_cycle_per_sm.get(name, rate),
            )
            for name, rate in rates.items()
        }


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU model: how many SMs, how fast, how much power at most."""

    key: str
    names: tuple[str, ...]  # as NVML gives them
    pci_device_ids: tuple[str, ...]  # four upper-case hex digits
    architecture: str
    form_factor: str
    sm_count: int
    most_sm_count: int | None = None  # where sources disagree: what bounds are made with
    tensor_clock_mhz: int  # the clock datasheet tensor peaks are quoted at
    core_clock_mhz: int | None = None  # of CUDA-core and FP64 peaks, where not the maximum
    max_sm_clock_mhz: int  # what NVML reports as the highest SM clock
    most_sm_clock_mhz: int | None = None  # where that is a guess: what bounds are made with
    power_limit_watts: int  # the highest it can be configured to, at the counter's own scope
    module_power_limit_watts: int | None = None  # of CPU, GPU and memory, on Grace parts
    energy_scope: Literal["gpu", "module"] = "gpu"  # what NVML's energy counter covers
    memory_mib: int
    source: str
    datasheet_teraflop_per_second: dict[str, str]  # dense; decimal; tensor_int8 in tera-operations
    datasheet_deviations: dict[str, str] = {}  # figures the rates do not give, with the reason
    # Rates of this model that are not its architecture's.
    rate_exceptions: dict[str, RateSpan] = {}
    # What a rate may reach at most over time, in tera-operations, where cycles do not say.
    ceiling_tera_per_second: dict[str, str] = {}
    mig_sm_counts: dict[str, int] = {}  # SMs of a GPU instance by its profile's compute slices

    def max_sm_cycles(self, time_ms: int) -> int:
        """SM-cycles of `time_ms` with all SMs at maximum clock."""
        return self.max_sm_cycles_per_us * HZ_PER_MHZ * time_ms // 1000

    @property
    def max_sm_cycles_per_us(self) -> int:
        """SM-cycles of one microsecond with all SMs at maximum clock."""
        return (self.most_sm_count or self.sm_count) * self.max_sm_clock_mhz

    @property
    def most_sm_cycles_per_us(self) -> int:
        """What bounds take for the most SM-cycles of one microsecond, clock tolerance included."""
        sms = self.most_sm_count or self.sm_count
        clock_mhz = self.most_sm_clock_mhz or self.max_sm_clock_mhz
        return ceil_div(sms * clock_mhz * (1000 + CLOCK_TOLERANCE_PER_MILLE), 1000)

    def quoted_clock_mhz(self, name: str) -> int:
        """The clock at which the datasheet quotes the peak of a rate."""
        if name.startswith("tensor_") and name != "tensor_fp64":
            return self.tensor_clock_mhz
        return self.core_clock_mhz or self.max_sm_clock_mhz

    @property
    def max_power_watts(self) -> int:
        """The most that whatever its energy counter covers can draw for long."""
        return max(self.power_limit_watts, self.module_power_limit_watts or 0)

    @property
    def most_power_watts(self) -> int:
        """What bounds take for the most power, its tolerance included."""
        return ceil_div(self.max_power_watts * (1000 + POWER_TOLERANCE_PER_MILLE), 1000)


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What the table knows of one device: its row, or the extremes of its architecture."""

    accelerator: Accelerator  # the row, or a stand-in that no row is at odds with
    architecture: Architecture
    in_table: bool  # False: a stand-in; bounds are as wide as the architecture
    spans: dict[str, RateSpan]  # by rate name
    any_float: RateSpan  # of the float tensor pipe at a precision nobody told
    any_integer: RateSpan  # of the integer tensor pipe, whose width nobody tells
    default_precision: str  # of the central value where nobody told

    def tensor_span(self, precision: str | None) -> RateSpan | None:
        """Rates of the float tensor pipe at a precision; None where it has no such."""
        if precision not in TENSOR_FLOAT_PRECISIONS:
            return None
        return self.spans.get(f"tensor_{precision}")

    def span(self, name: str) -> RateSpan:
        """Rates of one pipe by name; nothing where the device has no such pipe."""
        return self.spans.get(name, NO_RATE)


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
        self._resolved = {row.key: self._resolved_row(row) for row in accelerators}
        self._by_capability = {
            capability: stand_in
            for name, architecture in self.architectures.items()
            for stand_in in self._stand_ins(name)
            for capability in architecture.compute_capabilities
        }

    def find(self, name: str, pci_device_id: str | None = None) -> Accelerator | None:
        """The row of a device by PCI id, else by NVML name; None when the table lacks it."""
        if pci_device_id is not None:
            found = self._by_pci.get(pci_device_id.upper())
            if found is not None:
                return found
        return self._by_name.get(name)

    def resolve(
        self,
        device_name: str,
        pci_device_id: str | None = None,
        compute_capability: str | None = None,
    ) -> Resolved | None:
        """The row of a device, else the stand-in of its architecture, else None.

        None means that FLOP of the device are absent; its raw counters stay what they are.
        """
        row = self.find(device_name, pci_device_id)
        if row is not None:
            return self._resolved[row.key]
        if compute_capability is None:
            return None
        return self._by_capability.get(compute_capability)

    def of_row(self, row: Accelerator) -> Resolved:
        """A row with its rates; also of a row made for one test that the table lacks."""
        found = self._resolved.get(row.key)
        if found is not None and found.accelerator is row:
            return found
        return self._resolved_row(row)

    def by_key(self, key: str) -> Accelerator:
        """The row called `key` (as `flopledger estimate hardware --accelerator` takes it)."""
        if key not in self._by_key:
            raise UnknownName("accelerator", key, f"use one of: {', '.join(self._by_key)}")
        return self._by_key[key]

    def architecture_of(self, accelerator: Accelerator) -> Architecture:
        """The architecture row of a device row."""
        return self.architectures[accelerator.architecture]

    def _resolved_row(self, row: Accelerator) -> Resolved:
        architecture = self.architectures.get(row.architecture)
        if architecture is None:
            raise UnknownName(
                f"accelerators.{row.key}.architecture",
                row.architecture,
                "name one of the table's architectures",
            )
        return _resolved(row, architecture, architecture.spans() | row.rate_exceptions)

    def _stand_ins(self, name: str) -> Iterable[Resolved]:
        """The stand-in of an architecture: the most of any of its models, in the table or not."""
        rows = [row for row in self.accelerators if row.architecture == name]
        if not rows:
            return
        architecture = self.architectures[name]
        spans = {
            rate: _union(own, [row.rate_exceptions.get(rate, own) for row in rows])
            for rate, own in architecture.spans().items()
        }
        row = Accelerator(
            key=f"any {name}",
            names=(),
            pci_device_ids=(),
            architecture=name,
            form_factor="unknown",
            sm_count=max(
                architecture.most_sm_count, *(row.most_sm_count or row.sm_count for row in rows)
            ),
            tensor_clock_mhz=min(row.tensor_clock_mhz for row in rows),
            max_sm_clock_mhz=max(
                architecture.most_sm_clock_mhz,
                *(row.most_sm_clock_mhz or row.max_sm_clock_mhz for row in rows),
            ),
            power_limit_watts=max(
                architecture.most_power_watts, *(row.max_power_watts for row in rows)
            ),
            memory_mib=max(row.memory_mib for row in rows),
            source=f"the extremes of {name}",
            datasheet_teraflop_per_second={},
        )
        yield _resolved(row, architecture, spans, in_table=False)


def _resolved(
    row: Accelerator,
    architecture: Architecture,
    spans: dict[str, RateSpan],
    *,
    in_table: bool = True,
) -> Resolved:
    floats = [
        (name, spans[f"tensor_{name}"])
        for name in TENSOR_FLOAT_PRECISIONS
        if f"tensor_{name}" in spans
    ]
    precision = "bf16" if "tensor_bf16" in spans else "fp16"
    return Resolved(
        accelerator=row,
        architecture=architecture,
        in_table=in_table,
        spans=spans,
        any_float=_union(spans.get(f"tensor_{precision}", NO_RATE), [span for _, span in floats]),
        any_integer=_union(
            spans.get("tensor_int8", NO_RATE),
            [spans[name] for name in TENSOR_INTEGER_RATES if name in spans],
        ),
        default_precision=precision,
    )


def _union(central: RateSpan, spans: list[RateSpan]) -> RateSpan:
    """The least and the most of several rates around the central one."""
    every = [central, *spans]
    return RateSpan(
        low_per_cycle=min(span.low_per_cycle for span in every),
        central_per_cycle=central.central_per_cycle,
        high_per_cycle=max(span.high_per_cycle for span in every),
    )


class _TableFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: str
    density: Literal["dense"]
    architectures: dict[str, Architecture]
    accelerators: tuple[Accelerator, ...]


def load_table(text: str | None = None) -> AcceleratorTable:
    """Read a hardware table from TOML text; the packaged one when no text is given.

    Raises InvalidInput for text that is no table, and for a datasheet figure that only 2:4
    sparsity reaches.
    """
    if text is None:
        file = resources.files("flopledger_core") / "data" / "accelerators.toml"
        text = file.read_text(encoding="utf-8")
    try:
        parsed = msgspec.convert(tomllib.loads(text), _TableFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput("accelerator table", str(error), "correct the table file") from error
    table = AcceleratorTable(parsed.version, parsed.architectures, parsed.accelerators)
    for row in parsed.accelerators:
        _require_dense(table.of_row(row))
    return table


def _require_dense(resolved: Resolved) -> None:
    row = resolved.accelerator
    clock_mhz = max(row.tensor_clock_mhz, row.max_sm_clock_mhz)
    for name, text in row.datasheet_teraflop_per_second.items():
        most = Fraction(row.sm_count * resolved.span(name).high_per_cycle * clock_mhz, 10**6)
        if Fraction(text) > most * SPARSE_SUSPICION:
            raise InvalidInput(
                f"accelerators.{row.key}.datasheet_teraflop_per_second.{name}",
                text,
                "give the dense figure: SMs x rate x clock makes it "
                f"{float(most):.1f} at most, so this one is with sparsity",
            )
