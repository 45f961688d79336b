"""What no honest device could report is found, and what an honest one reports is not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flopledger_core.accelerators import load_table
from flopledger_core.batch import decode
from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import Attribution, GapRecord, Record, UsageRecord
from flopledger_core.validation import CHECKS, findings
from tests.core.sealed import ELAPSED, H100, sealed, usage

TABLE = load_table()


def codes(*records: Record, **header: Any) -> list[str]:
    """The codes of a batch's findings."""
    return [finding.code for finding in findings(decode(sealed(list(records), **header)), TABLE)]


def shared(record: UsageRecord, gpu_time_ms: int) -> UsageRecord:
    """The record with another share of its window."""
    return msgspec.structs.replace(record, gpu_time_ms=gpu_time_ms)


def test_an_honest_minute_has_no_findings() -> None:
    """The passing fixture of every check."""
    assert codes(usage()) == []


def active_above_elapsed() -> list[Record]:
    """A pipe busier than the clock."""
    cycles = msgspec.structs.replace(usage().cycles, fp32=ELAPSED + 1)
    return [usage(cycles=cycles)]


def elapsed_above_clock() -> list[Record]:
    """More cycles than the highest clock gives."""
    cycles = msgspec.structs.replace(usage().cycles, elapsed=ELAPSED * 2)
    return [usage(cycles=cycles)]


def energy_above_power() -> list[Record]:
    """A kilowatt and a half from a 700 W part."""
    return [usage(energy_mj=1_500 * 60_000)]


def shares_that_do_not_tile() -> list[Record]:
    """Two tenants who were each charged the whole minute."""
    return [shared(usage(), 60_000), shared(usage(), 60_000)]


def overlapping_windows() -> list[Record]:
    """The same half minute twice."""
    first = usage(end_boot_ms=40_000, gpu_time_ms=35_000)
    second = usage(start_boot_ms=30_000, gpu_time_ms=35_000)
    return [first, second]


def gap_over_usage() -> list[Record]:
    """A window that was metered and dark at once."""
    gap = GapRecord(
        device=H100, start_unix_ms=1_764_000_010_000, start_boot_ms=15_000, gap_ms=1_000,
        owner=UNATTRIBUTED_OWNER, attribution=Attribution(source="none"), precision=None,
        reason="timeout", flags=(), user_commitment=None,
    )  # fmt: skip
    return [usage(), gap]


def cycles_in_no_time() -> list[Record]:
    """A window without length that claims work."""
    return [usage(end_boot_ms=5_000, gpu_time_ms=0, wall_time_ms=0)]


@pytest.mark.parametrize(
    ("code", "records", "header"),
    [
        ("wrong_author", [usage()], {"author": "collector"}),
        ("active_exceeds_elapsed", active_above_elapsed(), {}),
        ("elapsed_exceeds_clock", elapsed_above_clock(), {}),
        ("energy_exceeds_power", energy_above_power(), {}),
        ("gpu_time_does_not_tile", shares_that_do_not_tile(), {}),
        ("windows_overlap", overlapping_windows(), {}),
        ("windows_overlap", gap_over_usage(), {}),
        ("elapsed_exceeds_clock", cycles_in_no_time(), {}),
        ("energy_exceeds_power", cycles_in_no_time(), {}),
        ("time_exceeds_window", [usage(wall_time_ms=2**62)], {}),
    ],
)
def test_each_check_has_a_failing_fixture(
    code: str, records: list[Record], header: dict[str, Any]
) -> None:
    """Every check in the list can fail, by its own code."""
    assert code in codes(*records, **header)


def test_every_check_is_in_the_matrix_above() -> None:
    """A new check needs a failing fixture of its own."""
    assert len(CHECKS) == 7
