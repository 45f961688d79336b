"""IPMI: what `ipmitool dcmi power reading` prints, and how it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from flopledger_agent.host.interface import HostReadError
from flopledger_agent.host.ipmi import IpmiReader, power_mw

if TYPE_CHECKING:
    from pathlib import Path

# In the form that ipmitool's dcmi.c prints.
READING = """
    Instantaneous power reading:                   214 Watts
    Minimum during sampling period:                 12 Watts
    Maximum during sampling period:                510 Watts
    Average power reading over sample period:      211 Watts
    IPMI timestamp:                           Mon Nov 23 07:00:00 2026
    Sampling period:                          00000010 Seconds.
    Power reading state is:                   activated


"""


def program(folder: Path, text: str) -> tuple[str, ...]:
    """A program that stands in for ipmitool."""
    path = folder / "ipmitool"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return (str(path), "dcmi", "power", "reading")


def test_the_power_now_is_read(tmp_path: Path) -> None:
    """Watts become milliwatts; minimum, maximum and mean are not it."""
    (tmp_path / "said").write_text(READING)
    reader = IpmiReader(program(tmp_path, f"cat {tmp_path}/said"))
    assert reader.read().power_mw == 214_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 1", "program_failed"),
        ("echo DCMI request failed because: Invalid command", "no_power_reading"),
        ("exec sleep 30", "timeout"),
    ],
)
def test_a_failing_program_says_why(tmp_path: Path, text: str, reason: str) -> None:
    """Each way to fail has its reason, and a hanging program is ended."""
    with pytest.raises(HostReadError) as caught:
        IpmiReader(program(tmp_path, text), timeout_seconds=0.5).read()
    assert caught.value.reason == reason


def test_a_missing_program_says_so(tmp_path: Path) -> None:
    """Its remedy is to install it."""
    with pytest.raises(HostReadError) as caught:
        IpmiReader((str(tmp_path / "ipmitool"),)).read()
    assert caught.value.reason == "program_not_found"


def test_a_reading_that_is_switched_off_is_no_power() -> None:
    """The controller then prints zeros."""
    off = READING.replace("activated", "deactivated").replace("214", "  0")
    with pytest.raises(HostReadError) as caught:
        power_mw(off)
    assert caught.value.reason == "power_reading_off"
