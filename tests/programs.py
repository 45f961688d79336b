"""System programs that some tests drive: found, or the test is skipped; under CI it fails instead.

A skipped check proves nothing, so .ci/run installs every program and sets CI=true.
"""

import os
import shutil
from typing import Final

import pytest

DEBIAN_PACKAGES: Final = {
    "alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "chromedriver": "chromium-driver",
    "chromium": "chromium",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "munged": "munge",
    "promtool": "prometheus",
    "sbatch": "slurm-wlm",
    "scancel": "slurm-wlm",
    "scontrol": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "squeue": "slurm-wlm",
    "systemd-analyze": "systemd",
}


def require_program(name: str) -> str:
    """The path of a system program; without it the test is skipped, or fails under CI."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed (Debian: apt install {DEBIAN_PACKAGES.get(name, name)})"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return path
