"""The cases of the accuracy benchmark: what ran, what it truly was, and what was metered."""

from __future__ import annotations

from typing import Final

import msgspec

from flopledger_core.records import Precision

PPM: Final = 1_000_000
ACCEPTED_PPM: Final = 20_000  # the design's target on tile-aligned products: 2 %


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One case, held against its truth. FLOP and operations are whole numbers."""

    case: str
    precision: Precision | None  # as declared to the meter; None: not declared
    tier: str
    seconds: float  # of metered time; for people, never summed
    quantity: str  # flop | operations (integer tensor work)
    truth: int
    truth_method: str  # 2MNK, framework FLOP counter, simulated schedule
    low: int
    central: int
    high: int | None
    energy_mj: int | None
    energy_check_mj: int | None  # integrated power, or the simulated truth
    note: str = ""

    @property
    def error_ppm(self) -> int | None:
        """How far central lies from the truth; None where the truth is nothing."""
        return None if self.truth == 0 else (self.central - self.truth) * PPM // self.truth

    @property
    def energy_error_ppm(self) -> int | None:
        """How far the metered energy lies from its check."""
        if self.energy_mj is None or not self.energy_check_mj:
            return None
        return (self.energy_mj - self.energy_check_mj) * PPM // self.energy_check_mj

    @property
    def contained(self) -> bool:
        """Whether the bounds hold the truth."""
        return self.low <= self.truth and (self.high is None or self.truth <= self.high)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All cases of one machine."""

    device: str
    driver: str
    method: str
    date: str  # "" where nothing depends on when it ran
    outcomes: tuple[Outcome, ...]
    findings: tuple[str, ...] = ()  # what was learnt of the device besides
