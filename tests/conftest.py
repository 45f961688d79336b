"""What holds for every test: a clean environment and the Hypothesis profiles.

Profiles: `default` explores anew each run; `ci` is derandomised, so a red build is red for
everyone; `nightly` searches long from a seed that .ci/nightly prints. A failing example always
prints the blob that replays it. Deadlines are off because shared machines stall.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

_SLOW_MACHINES = [HealthCheck.too_slow]

settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=_SLOW_MACHINES
)
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW_MACHINES,
)
settings.register_profile(
    "nightly",
    deadline=None,
    derandomize=False,
    max_examples=5_000,
    phases=tuple(Phase),
    print_blob=True,
    suppress_health_check=_SLOW_MACHINES,
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tag of the caller's own shell and no proxy reaches a test or a process it starts."""
    for name in list(os.environ):
        if name.startswith("FLOPLEDGER_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
