"""Restatement: what agents first estimated, beside what the same counters say today.

An agent seals its estimate into a record; nobody edits it. Totals are always computed from the
counters with today's FLOP model and hardware table. Where those are not the agent's, the
difference is a restatement, shown per model and table version, record for record the same work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from flopledger_collector.ledger.totals import Line
from flopledger_core.bounds import ZERO, Bounds, total

METERED_TIERS: Final = frozenset({"gpm_cycles", "gpm_util", "dcgm_pipes", "sm_active", "gpu_util"})

ROUNDINGS_MAX: Final = 8  # FLOP that rounding may move one record's estimate: one a pipe


class Restated(msgspec.Struct, frozen=True, kw_only=True):
    """Records with a first estimate by one model and table version, and the same work today."""

    first_model_version: str
    first_table_version: str
    model_version: str
    table_version: str
    records: int
    first_flop: Bounds  # as sealed by the agents, summed
    flop: Bounds  # of the same records, by today's model and table

    @property
    def is_restated(self) -> bool:
        """Whether model or table are others than the agents'."""
        first = (self.first_model_version, self.first_table_version)
        return first != (self.model_version, self.table_version)

    @property
    def is_contradicted(self) -> bool:
        """Whether estimates of today's own versions are not what these give for the counters.

        Each end of an estimate is rounded for each pipe of its record, by less than one FLOP.
        """
        slack = self.records * ROUNDINGS_MAX
        return not self.is_restated and abs(self.first_flop.central - self.flop.central) > slack

    @property
    def difference(self) -> tuple[int, int, int | None]:
        """Today less first, of low, central and high; None where an end is open."""
        one, other = self.first_flop, self.flop
        high = None if one.high is None or other.high is None else other.high - one.high
        return other.low - one.low, other.central - one.central, high


class Restatement(msgspec.Struct, frozen=True, kw_only=True):
    """Every version that first estimated some of the lines, and what cannot be compared."""

    rows: tuple[Restated, ...]
    unestimated_records: int  # metered, and their agent sealed no estimate
    disputed_records: int  # not compared: their estimates are older than the dispute


def restatement_of(lines: Iterable[Line], *, model_version: str, table_version: str) -> Restatement:
    """The restatement of some lines at today's versions."""
    groups: dict[tuple[str, str], list[Line]] = {}
    unestimated = disputed = 0
    for line in lines:
        if line.first_model_version is None or line.first_table_version is None:
            unestimated += line.records if line.tier in METERED_TIERS else 0
        elif line.standing == "disputed":
            disputed += line.records
        else:
            versions = (line.first_model_version, line.first_table_version)
            groups.setdefault(versions, []).append(line)
    return Restatement(
        rows=tuple(
            _restated(groups[versions], versions, (model_version, table_version))
            for versions in sorted(groups)
        ),
        unestimated_records=unestimated,
        disputed_records=disputed,
    )


def _restated(lines: list[Line], first: tuple[str, str], today: tuple[str, str]) -> Restated:
    return Restated(
        first_model_version=first[0],
        first_table_version=first[1],
        model_version=today[0],
        table_version=today[1],
        records=sum(line.records for line in lines),
        first_flop=total(line.first_flop or ZERO for line in lines),
        flop=total(line.work.flop for line in lines),
    )
