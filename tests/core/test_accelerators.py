"""The hardware table reproduces every datasheet figure it cites, and names those it cannot."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from flopledger_core.accelerators import load_table
from flopledger_core.errors import InvalidInput, UnknownName

TABLE = load_table()
TOLERANCE = Fraction(1, 100)
# Datasheet figures that SMs x rate x clock does not give within 1 %, each with its reason.
DEVIATIONS = {
    ("L40S", "tensor_fp16"): "the sheet's 362.05 is not half of its own FP8 figure",
    ("L40S", "tensor_bf16"): "the sheet's 362.05 is not half of its own FP8 figure",
}
FIGURES = [
    (row.key, name) for row in TABLE.accelerators for name in row.datasheet_teraflop_per_second
]


def reproduction_error(key: str, name: str) -> Fraction:
    """Relative difference between the table's arithmetic and the datasheet."""
    row = TABLE.by_key(key)
    architecture = TABLE.architecture_of(row)
    rates = architecture.flop_per_cycle_per_sm | architecture.operations_per_cycle_per_sm
    on_tensor_clock = name.startswith("tensor_") and name != "tensor_fp64"
    clock_mhz = row.tensor_clock_mhz if on_tensor_clock else row.max_sm_clock_mhz
    computed = Fraction(row.sm_count * rates[name] * clock_mhz, 10**6)
    return computed / Fraction(Decimal(row.datasheet_teraflop_per_second[name])) - 1


@pytest.mark.parametrize(("key", "name"), FIGURES)
def test_datasheet_figure_is_reproduced_or_named(key: str, name: str) -> None:
    """SMs x FLOP per cycle x clock lies within 1 % of the sheet, except for the named figures."""
    within = abs(reproduction_error(key, name)) <= TOLERANCE

    assert within == ((key, name) not in DEVIATIONS)


def test_table_has_the_models_of_the_first_release() -> None:
    """H100, H200, A100, B200, L40S and V100 are there, by key."""
    keys = {row.key for row in TABLE.accelerators}

    assert {"H100 SXM", "H200", "A100 SXM", "B200", "L40S", "V100 SXM2"} <= keys


def test_every_row_and_architecture_names_its_source() -> None:
    """No figure of the world without a source."""
    sources = [row.source for row in TABLE.accelerators]
    sources += [architecture.source for architecture in TABLE.architectures.values()]

    assert all(len(source) > 10 for source in sources)


def test_pci_ids_and_names_are_unique() -> None:
    """A device can be only one row."""
    pci_ids = [pci for row in TABLE.accelerators for pci in row.pci_device_ids]
    names = [name for row in TABLE.accelerators for name in row.names]

    assert len(pci_ids) == len(set(pci_ids))
    assert len(names) == len(set(names))


def test_pci_id_decides_before_the_name() -> None:
    """A renamed product is still found, and a known name with a foreign id by its name."""
    by_pci = TABLE.find("some OEM name", "2330")
    by_name = TABLE.find("NVIDIA H200", "FFFF")

    assert by_pci is not None
    assert by_pci.key == "H100 SXM"
    assert by_name is not None
    assert by_name.key == "H200"


def test_unknown_device_is_not_guessed() -> None:
    """A device the table lacks has no row."""
    assert TABLE.find("NVIDIA H800", "2324") is None


def test_unknown_key_lists_the_keys() -> None:
    """The error shows what could have been meant."""
    with pytest.raises(UnknownName, match="H100 SXM"):
        TABLE.by_key("H100")


def test_broken_table_is_refused_with_the_place() -> None:
    """A table file that does not fit the schema says where."""
    with pytest.raises(InvalidInput, match="version"):
        load_table("version = 3\n[architectures]\n")


def test_tf32_is_half_of_fp16_everywhere() -> None:
    """A relation every generation keeps; a typing error in one row breaks it."""
    for architecture in TABLE.architectures.values():
        tf32, fp16 = architecture.tensor_rate("tf32"), architecture.tensor_rate("fp16")
        if tf32 is not None and fp16 is not None:
            assert fp16 == 2 * tf32
