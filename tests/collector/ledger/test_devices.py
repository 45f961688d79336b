"""Devices that are not one plain GPU of the table: superchips, parts, and unknown models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flopledger_collector.reports.json_form import statement_document
from flopledger_collector.reports.markdown import statement_markdown
from flopledger_collector.reports.statement import build_statement
from flopledger_collector.status import evaluate_project, load_rules
from flopledger_core.bounds import Bounds
from flopledger_core.records import Device, Slices
from tests.collector.ledgers import budget
from tests.collector.opened import DAYS_LATER_UNIX_MS, folded, opened, outcomes
from tests.collector.sealing import (
    H100,
    MINUTE_MS,
    StreamSealer,
    usage,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle
    from flopledger_core.records import UsageRecord

RULES = load_rules()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerHandle]:
    """An empty ledger."""
    with opened(tmp_path) as handle:
        yield handle


def _of(device: Device, minute: int = 0, **changes: object) -> UsageRecord:
    return msgspec.structs.replace(usage(minute), device=device, **changes)


def _texts(ledger: LedgerHandle) -> tuple[str, dict[str, object]]:
    found = build_statement(ledger.ledger, RULES, "atlas", generated_unix_ms=DAYS_LATER_UNIX_MS)
    return statement_markdown(found), statement_document(found)


def test_energy_of_a_module_is_never_added_to_a_gpus(ledger: LedgerHandle) -> None:
    """A superchip's counter reads CPU and memory too: apart, and a limit of the GPU's own."""
    module = usage(0, 1, energy_scope="module", energy_mj=650 * MINUTE_MS)
    outcomes(ledger, StreamSealer().seal([usage(0, 0), module]))
    ledger.entries.post(budget(name="power", quantity="energy_mj", limit=str(1000 * MINUTE_MS)))
    folded(ledger)
    atlas = evaluate_project(ledger.ledger, RULES, "atlas")
    gpu, both = 600 * MINUTE_MS, 650 * MINUTE_MS
    assert atlas.usage.energy_by_boundary == {
        "gpu": Bounds(low=gpu, central=gpu, high=gpu + both),
        "module": Bounds(low=both, central=both, high=both),
    }
    assert atlas.usage.energy_mj == atlas.usage.energy_by_boundary["gpu"]
    own = gpu + both  # two devices, each by its own meter: neither contains the other
    assert atlas.usage.device_energy_mj == Bounds(low=own, central=own, high=own)
    assert atlas.budgets[0].used == atlas.usage.device_energy_mj
    assert atlas.budgets[0].verdict == "exceeds"  # though the GPU's part alone is not known
    assert any("counts whole modules" in reason for reason in atlas.reasons)
    assert any("reads the whole module" in reason for reason in atlas.reasons)
    text, _ = _texts(ledger)
    assert "| Energy, kWh (module) | 0.0108 |" in text
    assert "0.0108 (module)" in text


def test_a_part_of_a_gpu_has_the_gpus_energy_as_its_limit(ledger: LedgerHandle) -> None:
    """Cut by a rule: the central figure is the rule's, the bounds are nothing and all of it."""
    slices = Slices(first_index=0, count=3, of_count=7, sms_of=132)
    device = Device(
        uuid="GPU-a", gpu_instance=1, name=H100, pci_device_id="2330", sm_count=60, slices=slices
    )
    whole = 700 * MINUTE_MS
    record = _of(
        device,
        cycles=msgspec.structs.replace(
            usage(0).cycles, elapsed=10**12, sm_active=10**12, any_tensor=10**11, hmma=10**11,
            fp32=0, integer=0,
        ),
        gpu_time_ms=slices.part(1_000 + MINUTE_MS) - slices.part(1_000),
        energy_mj=slices.part(whole), flags=("apportioned",),
    )  # fmt: skip
    outcomes(ledger, StreamSealer().seal([record]))
    (line,) = folded(ledger, "atlas").lines
    assert line.standing == "clear"
    assert line.energy_mj.low == 0
    assert line.energy_mj.central == slices.part(whole)
    assert whole <= (line.energy_mj.high or 0) <= whole + 7
    text, _ = _texts(ledger)
    assert "| `apportioned` | 1 |" in text


def test_a_model_that_the_table_lacks_has_its_architectures_bounds(ledger: LedgerHandle) -> None:
    """Flagged on the line, with its reason; wider than any model of that architecture."""
    known = Device(uuid="GPU-a", name=H100, pci_device_id="2330", sm_count=132)
    unknown = Device(uuid="GPU-b", name="NVIDIA H900", compute_capability="9.0", sm_count=132)
    outcomes(
        ledger,
        StreamSealer().seal(
            [_of(known), _of(unknown, flags=("device_not_in_table",), precision_origin="unknown")]
        ),
    )
    lines = {line.device_name: line for line in folded(ledger, "atlas").lines}
    plain, wide = lines[H100], lines["NVIDIA H900"]
    assert (plain.stand_in, wide.stand_in) == (False, True)
    assert wide.work.flop.low <= plain.work.flop.low
    assert (wide.work.flop.high or 0) >= (plain.work.flop.high or 0)
    assert any("no hardware table row for NVIDIA H900" in why for why in wide.work.reasons)
    text, document = _texts(ledger)
    assert "1 record of a device that the hardware table lacks (device\\_not\\_in\\_table)" in text
    assert "NVIDIA H900 (not in the table; any hopper)" in text
    assert document["cautions"] == {"device_not_in_table": 1}
    atlas = evaluate_project(ledger.ledger, RULES, "atlas")
    assert atlas.usage.stand_in_records == 1


def test_a_device_of_no_known_architecture_has_no_flop(ledger: LedgerHandle) -> None:
    """Absent with the reason, open upwards, its raw counters kept: never zero."""
    device = Device(uuid="GPU-a", name="Some Accelerator", compute_capability="42.0")
    outcomes(ledger, StreamSealer().seal([_of(device)]))
    (line,) = folded(ledger, "atlas").lines
    assert (line.accelerator, line.stand_in, line.assumed_precision) == (None, False, None)
    assert line.sums["float_tensor"] > 0
    assert line.work.flop == Bounds(low=0, central=0, high=None)
    usage_ = evaluate_project(ledger.ledger, RULES, "atlas").usage
    assert usage_.known("flop", usage_.work.flop) is None
    assert usage_.known("energy_mj", usage_.energy_mj) is not None
    text, document = _texts(ledger)
    assert "FLOP of Some Accelerator is absent" in text
    assert document["items"][0]["absent"]["flop"] == "device_not_in_table"  # type: ignore[index]
    assert document["restatement"]["unestimated_records"] == 1  # type: ignore[index]


def test_one_gpu_whole_and_in_parts_is_one_device_to_two_streams(ledger: LedgerHandle) -> None:
    """A second stream that meters a part of a GPU that a first one meters whole is disputed."""
    whole = Device(uuid="GPU-a", name=H100, pci_device_id="2330", sm_count=132)
    slices = Slices(first_index=0, count=7, of_count=7, sms_of=132)
    part = msgspec.structs.replace(whole, gpu_instance=0, slices=slices)
    outcomes(ledger, StreamSealer(1).seal([_of(whole)]))
    outcomes(ledger, StreamSealer(2).seal([_of(part)]))
    assert {line.standing for line in folded(ledger).lines} == {"clear", "disputed"}
