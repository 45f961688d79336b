"""The hardware table reproduces every datasheet figure it cites, and names those it cannot."""

from __future__ import annotations

from fractions import Fraction
from importlib import resources

import msgspec
import pytest

from flopledger_core.accelerators import AcceleratorTable, RateSpan, load_table
from flopledger_core.errors import InvalidInput, UnknownName
from tests.core.hardware_table import PAGE, page, reproduction_error

TABLE = load_table()
TEXT = (resources.files("flopledger_core") / "data" / "accelerators.toml").read_text("utf-8")
TOLERANCE = Fraction(1, 100)
FIGURES = [
    (row.key, name) for row in TABLE.accelerators for name in row.datasheet_teraflop_per_second
]
# The models whose sheets deviate somewhere; that a new one joins them is to be seen here.
DEVIATING = {"L4", "L40S", "H800 SXM", "H20", "B100", "B300", "GB300"}
# Every model the table promises, with the PCI ids that drivers list for it.
MODELS = {
    "V100 SXM2": {"1DB1", "1DB5"}, "V100 PCIe": {"1DB4", "1DB6"}, "T4": {"1EB8"},
    "A100 SXM": {"20B0", "20B2"}, "A100 PCIe": {"20F1", "20B5"}, "A30": {"20B7"},
    "A10": {"2236"}, "A40": {"2235"}, "RTX A6000": {"2230"}, "RTX 3090": {"2204"},
    "L4": {"27B8"}, "L40S": {"26B9"}, "RTX 6000 Ada": {"26B1"}, "RTX 4090": {"2684"},
    "H100 SXM": {"2330"}, "H100 PCIe": {"2331"}, "H100 NVL": {"2321"},
    "H800 SXM": {"2324"}, "H800 PCIe": {"2322"}, "H20": {"2329", "232C"},
    "H200": {"2335"}, "H200 NVL": {"233B"}, "GH200": {"2342", "2348"},
    "B100": set[str](), "B200": {"2901"}, "GB200": {"2941"}, "B300": {"3182"}, "GB300": {"31C2"},
    "RTX PRO 6000 Blackwell": {"2BB1", "2BB5"}, "RTX PRO 6000 Blackwell Max-Q": {"2BB4"},
    "RTX 5090": {"2B85"},
}  # fmt: skip


@pytest.mark.parametrize(("key", "name"), FIGURES)
def test_datasheet_figure_is_reproduced_or_named(key: str, name: str) -> None:
    """SMs x FLOP per cycle x clock lies within 1 % of the sheet, except for the named figures.

    A row that starts to reproduce a named figure fails here just as one that stops.
    """
    row = TABLE.by_key(key)
    within = abs(reproduction_error(TABLE, row, name)) <= TOLERANCE

    assert within == (name not in row.datasheet_deviations)


def test_the_figures_that_deviate_are_named_with_a_reason() -> None:
    """A deviation is a sentence on a figure the row has; the models that have one are known."""
    for row in TABLE.accelerators:
        assert row.datasheet_deviations.keys() <= row.datasheet_teraflop_per_second.keys()
        assert all(len(reason) > 20 for reason in row.datasheet_deviations.values())

    assert {row.key for row in TABLE.accelerators if row.datasheet_deviations} == DEVIATING


def test_every_promised_model_is_there_by_its_pci_ids() -> None:
    """From V100 to GB300, form factors apart, each found by the id its driver gives."""
    assert {row.key: set(row.pci_device_ids) for row in TABLE.accelerators} == MODELS
    for row in TABLE.accelerators:
        for name in row.names:
            found = TABLE.resolve(name)
            assert found is not None
            assert (found.accelerator.key, found.in_table) == (row.key, True)


def test_every_row_and_architecture_names_its_source() -> None:
    """No figure of the world without a source and how sure it is."""
    sources = [row.source for row in TABLE.accelerators]
    sources += [architecture.source for architecture in TABLE.architectures.values()]

    assert all(any(mark in source for mark in ("[D]", "[D*]", "[C]", "[I]")) for source in sources)


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


# --- devices the table lacks -----------------------------------------------------------------


def test_unknown_device_of_no_known_architecture_is_not_guessed() -> None:
    """Without a row and without an architecture there are no rates at all."""
    assert TABLE.find("NVIDIA X1", "FFFF") is None
    assert TABLE.resolve("NVIDIA X1", "FFFF") is None
    assert TABLE.resolve("NVIDIA X1", "FFFF", "99.0") is None


@pytest.mark.parametrize("name", TABLE.architectures)
def test_a_stand_in_holds_every_model_of_its_architecture(name: str) -> None:
    """Any row of the architecture, taken for unknown, lies within the stand-in's limits."""
    capability = TABLE.architectures[name].compute_capabilities[0]
    stand_in = TABLE.resolve("NVIDIA X1", "FFFF", capability)

    assert stand_in is not None
    assert not stand_in.in_table
    for row in (row for row in TABLE.accelerators if row.architecture == name):
        known = TABLE.of_row(row)
        assert stand_in.accelerator.max_sm_cycles(1000) >= row.max_sm_cycles(1000)
        assert stand_in.accelerator.max_power_watts >= row.max_power_watts
        for rate, span in known.spans.items():
            wide = stand_in.span(rate)
            assert wide.low_per_cycle <= span.low_per_cycle
            assert span.high_per_cycle <= wide.high_per_cycle


def test_every_compute_capability_belongs_to_one_architecture() -> None:
    """A device's capability names its stand-in without a choice."""
    capabilities = [
        capability
        for architecture in TABLE.architectures.values()
        for capability in architecture.compute_capabilities
    ]

    assert len(capabilities) == len(set(capabilities))


# --- exceptions ------------------------------------------------------------------------------


def test_hoppers_tensor_peaks_are_quoted_at_a_lower_clock_than_its_cores() -> None:
    """Two clocks: 1,830 MHz makes 989.4 TFLOP/s of FP16, 1,980 MHz makes 66.9 of FP32."""
    row = TABLE.by_key("H100 SXM")

    assert row.quoted_clock_mhz("tensor_fp16") == 1830
    assert row.quoted_clock_mhz("fp32") == row.quoted_clock_mhz("tensor_fp64") == 1980


@pytest.mark.parametrize("key", ["RTX 3090", "RTX 4090", "RTX 5090"])
def test_geforce_may_run_at_half_rate(key: str) -> None:
    """FP32 accumulation halves the rate: low and central half, high full."""
    span = TABLE.of_row(TABLE.by_key(key)).tensor_span("bf16")

    assert span == RateSpan(low_per_cycle=512, central_per_cycle=512, high_per_cycle=1024)


def test_only_gh200_is_known_to_meter_its_whole_module() -> None:
    """Its energy counter covers CPU, GPU and memory; others are not guessed to."""
    assert [row.key for row in TABLE.accelerators if row.energy_scope == "module"] == ["GH200"]


def test_an_instance_of_three_slices_has_more_than_three_sevenths_of_an_h100() -> None:
    """MIG profiles have their own SMs: 60 of 132."""
    assert TABLE.by_key("H100 SXM").mig_sm_counts["3g"] == 60


def test_tf32_is_half_of_fp16_everywhere() -> None:
    """A relation every generation keeps; a typing error in one row breaks it."""
    for architecture in TABLE.architectures.values():
        tf32, fp16 = architecture.tensor_rate("tf32"), architecture.tensor_rate("fp16")
        if tf32 is not None and fp16 is not None:
            assert fp16 == 2 * tf32


# --- broken tables ---------------------------------------------------------------------------


def test_unknown_key_lists_the_keys() -> None:
    """The error shows what could have been meant."""
    with pytest.raises(UnknownName, match="H100 SXM"):
        TABLE.by_key("H100")


def test_broken_table_is_refused_with_the_place() -> None:
    """A table file that does not fit the schema says where."""
    with pytest.raises(InvalidInput, match="version"):
        load_table("version = 3\n[architectures]\n")


def test_a_sparse_datasheet_figure_is_refused() -> None:
    """Twice the dense figure came from the column with sparsity: no table may hold it."""
    assert 'tensor_fp16 = "989.4"' in TEXT
    with pytest.raises(InvalidInput, match="give the dense figure"):
        load_table(TEXT.replace('tensor_fp16 = "989.4"', 'tensor_fp16 = "1978.9"', 1))


def test_a_table_of_other_than_dense_rates_is_refused() -> None:
    """There is one kind of rate, and the file says which."""
    with pytest.raises(InvalidInput, match="density"):
        load_table(TEXT.replace('density = "dense"', 'density = "sparse"'))


def test_a_rate_span_out_of_order_is_refused() -> None:
    """Low above central is a mistake, not a span."""
    with pytest.raises(InvalidInput, match="low <= central <= high"):
        RateSpan(low_per_cycle=2, central_per_cycle=1, high_per_cycle=3)


def test_a_row_of_an_unknown_architecture_is_refused() -> None:
    """A row without rates would meter nothing."""
    row = msgspec.structs.replace(TABLE.accelerators[0], architecture="fermi")
    with pytest.raises(UnknownName, match="fermi"):
        AcceleratorTable("1", TABLE.architectures, (row,))


# --- the page --------------------------------------------------------------------------------


def test_the_reference_page_is_the_table() -> None:
    """docs/reference/hardware-table.md is what `python -m tests.core.hardware_table` writes."""
    assert PAGE.read_text("utf-8") == page(TABLE)
