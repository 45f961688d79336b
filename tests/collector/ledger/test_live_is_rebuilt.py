"""Whatever agents send, in whatever order: a rebuild makes every projection as it was live."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flopledger_collector.status import evaluate_ledger, load_rules
from flopledger_core.bounds import total
from flopledger_core.identity import UNATTRIBUTED_OWNER
from tests.collector.opened import opened, send
from tests.collector.sealing import (
    IDLE,
    StreamSealer,
    first_estimate,
    gap,
    hosts,
    project_owner,
    usage,
)

if TYPE_CHECKING:
    from flopledger_core.records import Record

RULES = load_rules()
OWNERS = (project_owner(), project_owner("birch"), UNATTRIBUTED_OWNER, IDLE)
PROJECTIONS = ("rollup_group", "rollup", "fold_head", "device_lease", "device_reach", "project")

Batch = tuple[int, int, int, str]  # stream, minute, owner, what
BATCHES = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(0, 3),
        st.sampled_from(("gpu", "module", "host", "blind", "gap", "both")),
    ),
    min_size=1,
    max_size=8,
)


def _records(batch: Batch) -> list[Record]:
    _, minute, place, what = batch
    owner = OWNERS[place]
    gpu = usage(minute, owner=owner, estimate=first_estimate(7, table_version=f"t{minute}*1e30"))
    if what == "module":
        return [usage(minute, 1, owner=owner, energy_scope="module", energy_mj=5)]
    if what == "host":
        return list(hosts(minute, owner=owner))
    if what == "blind":
        return list(hosts(minute, owner=owner, cpu_time_ms=None, absent={"cpu_time": "unreadable"}))
    if what == "gap":
        return [gap(minute, gpu=2, owner=owner)]
    return [gpu] if what == "gpu" else [gpu, *hosts(minute, owner=owner)]


def _rows(directory: Path) -> dict[str, list[tuple[Any, ...]]]:
    path = f"file:{directory}/ledger.sqlite3?mode=ro"
    with closing(sqlite3.connect(path, uri=True, timeout=10)) as connection:
        return {
            name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall(), key=repr)
            for name in PROJECTIONS
        }


@settings(max_examples=25, deadline=None)
@given(BATCHES, st.booleans())
def test_a_rebuild_gives_what_was_folded_live(batches: list[Batch], at_once: bool) -> None:
    """Two streams of one node, late batches, disputed hosts; and accounts add up to the whole."""
    with tempfile.TemporaryDirectory() as name, opened(Path(name)) as handle:
        sealers = [StreamSealer(seed) for seed in (1, 2)] + [StreamSealer(3, boot_id="boot-2")]
        for batch in batches:
            send(handle, sealers[batch[0]].seal(_records(batch)))
            if not at_once:
                handle.folder.fold()
        handle.folder.fold()
        live, lines = _rows(Path(name)), handle.ledger.totals().lines
        handle.rebuild()
        assert _rows(Path(name)) == live
        assert handle.ledger.totals().lines == lines
        status = evaluate_ledger(handle.ledger, RULES)
        parts = [*(one.usage for one in status.projects), status.idle, status.unattributed]
        assert total(part.cpu_time_ms for part in parts) == total(
            line.cpu_time_ms for line in lines if line.cpu_time_ms is not None
        )
        assert sum(part.records for part in parts) == sum(line.records for line in lines)
        for line in lines:
            for bounds in (line.energy_mj, line.work.flop, *line.host_energy_mj.values()):
                assert 0 <= bounds.low <= bounds.central
                assert bounds.high is None or bounds.central <= bounds.high
