"""Node power through IPMI: `ipmitool dcmi power reading`, run under a deadline and parsed.

The program needs the right to open /dev/ipmi0, usually root's. Its power is a mean over up to
minutes, as the controller chooses.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import Final

from flopledger_agent.host.interface import HostReadError, PowerReading

COMMAND: Final = ("ipmitool", "dcmi", "power", "reading")
TIMEOUT_SECONDS: Final = 10.0  # a healthy controller answers within two
MW_PER_WATT: Final = 1_000
_POWER = re.compile(r"^\s*Instantaneous power reading:\s*(\d{1,7})\s*Watts\s*$", re.MULTILINE)
_STATE = re.compile(r"^\s*Power reading state is:\s*(\w+)\s*$", re.MULTILINE)


class IpmiReader:
    """Asks by running a program; another command stands in for it in tests."""

    def __init__(
        self, command: tuple[str, ...] = COMMAND, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._command = command
        self._timeout_seconds = timeout_seconds

    def read(self) -> PowerReading:
        """One reading; raises `HostReadError`."""
        try:
            done = subprocess.run(  # noqa: S603 (a fixed command, no shell)
                self._command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=self._timeout_seconds,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise HostReadError("program_not_found", self._command[0]) from error
        except subprocess.TimeoutExpired as error:
            raise HostReadError("timeout", self._command[0]) from error
        except OSError as error:
            raise HostReadError("program_failed", str(error)) from error
        if done.returncode != 0:
            raise HostReadError("program_failed", f"exit status {done.returncode}")
        return PowerReading(power_mw=power_mw(done.stdout.decode("utf-8", "replace")))


def power_mw(text: str) -> int:
    """The power in what the program printed; raises `HostReadError`."""
    state = _STATE.search(text)
    if state is not None and state[1] != "activated":
        raise HostReadError("power_reading_off", state[1])
    found = _POWER.search(text)
    if found is None:
        raise HostReadError("no_power_reading")
    return int(found[1]) * MW_PER_WATT
