"""A ledger with something of everything that a status or a statement has to show.

`atlas` is metered (with a gap, a disputed minute, a first estimate by an older model, a minute of
a node's own, imported hours and a budget), `birch` only declared, `empty` opened and unused,
`stray` named by usage alone; two minutes belong to nobody and one device was idle. Amounts are the
same at every call; ids and keys are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_core.identity import UNATTRIBUTED_OWNER
from flopledger_core.records import BudgetSet, Declaration
from tests.collector.opened import opened, opening, outcomes
from tests.collector.sealing import (
    IDLE,
    START_UNIX_MS,
    StreamSealer,
    first_estimate,
    gap,
    hosts,
    hours,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from pathlib import Path

    from flopledger_collector.handle import LedgerHandle

HOSTILE = "<script>alert(1)</script>|\x1b[31m`x`\n[a](javascript:b)\u202e"


def budget(project: str = "atlas", name: str = "compute", **changes: object) -> BudgetSet:
    """A budget of 1e15 FLOP unless changed."""
    fields: dict[str, object] = {
        "quantity": "flop", "currency": None, "limit": str(10**15),
        "at_unix_ms": START_UNIX_MS, "author": "ops",
    }  # fmt: skip
    return BudgetSet(project=project, name=name, **(fields | changes))  # type: ignore[arg-type]


def declaration(project: str = "birch", **changes: object) -> Declaration:
    """An opening balance near 1e25 FLOP unless changed."""
    fields: dict[str, object] = {
        "model": None, "run": None, "activity": "pretrain",
        "start_unix_ms": START_UNIX_MS, "end_unix_ms": START_UNIX_MS + 86_400_000,
        "flop_low": str(78 * 10**23), "flop_central": str(94 * 10**23),
        "flop_high": str(99 * 10**23), "flop_basis": "executed", "energy_mj": None,
        "gpu_time_ms": None, "cost_cents": None, "currency": None,
        "method": "opening balance, 6ND", "evidence": "run book, page 12",
        "at_unix_ms": START_UNIX_MS, "author": "ops",
    }  # fmt: skip
    return Declaration(project=project, **(fields | changes))  # type: ignore[arg-type]


def rich_ledger(directory: Path, more: str = "") -> LedgerHandle:
    """The ledger described above, everything folded."""
    handle = opened(directory, more)
    for entry in (
        opening("atlas", title="Atlas 2"),
        opening("birch", title=HOSTILE),
        opening("empty"),
        budget(),
        budget(name="power", quantity="energy_mj", limit=str(36_000_000_000)),
        declaration(),
        declaration(
            activity="unclassified", flop_low=None, flop_central=None, flop_high=None,
            cost_cents="123456", currency="USD", method="invoice", evidence=None,
        ),
        hours("job-1"),
    ):  # fmt: skip
        handle.entries.post(entry)
    first = StreamSealer(1)
    ablation = project_owner(activity="ablation", model="atlas-base", run="a/1", job="7")
    sent = outcomes(
        handle,
        first.minute(0, gpus=2),
        first.seal(
            [
                usage(
                    1,
                    0,
                    precision=None,
                    precision_origin="unknown",
                    owner=ablation,
                    estimate=first_estimate(27 * 10**15),
                    flags=("energy_cross_check",),
                ),
                *hosts(1, owner=project_owner(activity="data_preprocess", job="8")),
            ]
        ),
        first.seal([gap(2, minutes=3, owner=project_owner())]),
        first.seal([usage(5, 0, owner=UNATTRIBUTED_OWNER), usage(5, 1, owner=UNATTRIBUTED_OWNER)]),
        first.seal([usage(6, 0, owner=IDLE, busy_per_mille=0)]),
        first.seal([usage(7, 0, owner=project_owner("stray", activity="sft"))]),
        StreamSealer(2, node="node-2", simulated=True).seal([usage(0, 0, node="node-2")]),
    )
    assert set(sent) == {"admitted"}
    handle.folder.fold()
    return handle
