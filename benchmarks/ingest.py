"""How many eight-GPU node-minutes a second the collector admits and folds, on one SQLite file.

Everything is real but the network: batches are sealed beforehand, then decoded, verified, checked,
committed with a disk sync and folded. The rate is set beside what this disk can sync in the same
run, because only their ratio travels between machines. The design asks for 2,083 batches a second
on two cores, for a million GPUs at one batch a node-minute.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from flopledger_collector.config import parse_config
from flopledger_collector.handle import open_ledger
from flopledger_collector.ingest import IngestRequest, inspect
from flopledger_core.accelerators import load_table
from tests.collector.sealing import StreamSealer, project_owner, usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flopledger_collector.handle import LedgerHandle

NODES: Final = 400
MINUTES: Final = 5
GPUS: Final = 8
SENDERS: Final = 40  # what a thread pool of a web server offers
RELAY_BATCHES: Final = 10  # a sender's nodes of one minute
SYNCS: Final = 300
TARGET_PER_SECOND: Final = 2_083


def main() -> None:
    """Print the table."""
    minutes = _sealed()
    batches = [batch for minute in minutes for batch in minute]
    table = Table(
        title=f"ingest: {len(batches)} batches of {GPUS} records, {len(batches[0])} bytes"
    )
    table.add_column("step")
    for column in ("per second", "ratio to syncs", "of 2,083/s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        syncs = _rate(SYNCS, lambda: _sync(Path(directory)))
        rows = {f"disk syncs of {len(batches[0])} bytes": syncs}
        rows["decode, verify, check (one thread)"] = _rate(len(batches), lambda: _inspect(batches))
        with _opened(Path(directory) / "single") as handle:
            rows[f"admit, one batch a request, {SENDERS} senders"] = _rate(
                len(batches), lambda: _send(handle, minutes, 1)
            )
            commits = handle.writer.commits
            rows["fold"] = _rate(len(batches), handle.folder.fold)
        with _opened(Path(directory) / "relay") as handle:
            rows[f"admit, {RELAY_BATCHES} batches a request, {SENDERS} senders"] = _rate(
                len(batches), lambda: _send(handle, minutes, RELAY_BATCHES)
            )
        with _opened(Path(directory) / "both") as handle:
            rows["admit and fold together, one batch a request"] = _rate(
                len(batches), lambda: _send_and_fold(handle, minutes)
            )
    for name, rate in rows.items():
        table.add_row(
            name, f"{rate:,.0f}", f"{rate / syncs:.2f}", f"{rate / TARGET_PER_SECOND:.2f}"
        )
    table.caption = f"one batch a request: {len(batches)} batches in {commits} commits"
    Console().print(table)


def _sealed() -> list[list[bytes]]:
    """By minute, one batch a node: 50 projects, each node on one job."""
    sealers = [StreamSealer(seed, node=f"node-{seed}") for seed in range(1, NODES + 1)]
    minutes: list[list[bytes]] = []
    for minute in range(MINUTES):
        sealed: list[bytes] = []
        for index, sealer in enumerate(sealers):
            owner = project_owner(f"project-{index % 50}", run="r1", job=f"job-{index}")
            records = [
                usage(minute, gpu, owner=owner, node=sealer.node, busy_per_mille=300 + gpu * 50)
                for gpu in range(GPUS)
            ]
            sealed.append(sealer.seal(records))
        minutes.append(sealed)
    return minutes


def _opened(directory: Path) -> LedgerHandle:
    return open_ledger(parse_config(f'[state]\ndirectory = "{directory}"\n'))


def _inspect(batches: Sequence[bytes]) -> None:
    table = load_table()
    for batch in batches:
        inspect(IngestRequest(content=batch, peer_is_loopback=True), table)


def _send(handle: LedgerHandle, minutes: Sequence[Sequence[bytes]], bundle: int) -> None:
    """Several senders, each with nodes of its own, minute after minute."""

    def work(sender: int) -> None:
        for minute in minutes:
            own = minute[sender::SENDERS]
            for start in range(0, len(own), bundle):
                content = b"".join(own[start : start + bundle])
                request = IngestRequest(content=content, peer_is_loopback=True)
                (answers,) = handle.writer.submit([request])
                assert all(answer.outcome == "admitted" for answer in answers)

    threads = [threading.Thread(target=work, args=(sender,)) for sender in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)


def _send_and_fold(handle: LedgerHandle, minutes: Sequence[Sequence[bytes]]) -> None:
    handle.folder.start()
    _send(handle, minutes, 1)
    handle.folder.stop()
    handle.folder.fold()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory / "sync", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    block = b"\0" * 8192
    try:
        for _ in range(SYNCS):
            os.write(descriptor, block)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rate(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
