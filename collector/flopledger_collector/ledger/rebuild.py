"""Rebuild: drop every projection and make it again from the journal, in one transaction.

Readers see the old projections until the new ones are whole; writers wait, so this is a command
for a quiet ledger. The result equals what folding live had made, to the last limb; where it does
not, a projection had been damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flopledger_collector.journal import (
    Changes,
    DeviceLease,
    Reaches,
    boot_spans,
    excluded_indexes,
    spans,
    unquestioned,
)
from flopledger_collector.ledger.delta import Delta
from flopledger_collector.ledger.fold import CHUNK_ENTRIES_MAX
from flopledger_core.records import ImportedHours

if TYPE_CHECKING:
    from flopledger_collector.ledger.delta import TakenEntry, UnfoldedEntry
    from flopledger_collector.store.interface import Database


def rebuild(database: Database) -> int:
    """Make every projection again; the number of journal entries folded."""
    folded = 0
    leases: dict[tuple[str, str], DeviceLease] = {}
    reaches = Reaches()
    with database.writing() as writing:
        writing.projections.clear()
        while True:
            entries = writing.projections.unfolded(CHUNK_ENTRIES_MAX)
            delta = Delta()
            imports: list[tuple[str, str, int, int]] = []
            for entry in entries:
                taken = delta.take(entry)
                imports += _imports(entry, taken)
                _widen(leases, entry, taken)
                claimed = boot_spans(taken.records)
                reaches.take(entry.stream_id, taken.boot_id, claimed, taken.findings)
            if entries:
                assert writing.projections.add(delta), "nobody else folds inside this transaction"
                writing.journal.write_import_keys(imports)
                writing.journal.write(Changes(audits=delta.audits))
            folded += len(entries)
            if len(entries) < CHUNK_ENTRIES_MAX:
                break
        writing.journal.write_leases([leases[place] for place in sorted(leases)])
        writing.journal.write(Changes(reaches=reaches.moved()))
    return folded


def _imports(entry: UnfoldedEntry, taken: TakenEntry) -> list[tuple[str, str, int, int]]:
    excluded = excluded_indexes(taken.findings)
    return [
        (record.import_key, entry.stream_id, entry.sequence, index)
        for index, record in enumerate(taken.records)
        if isinstance(record, ImportedHours) and index not in excluded
    ]


def _widen(
    leases: dict[tuple[str, str], DeviceLease], entry: UnfoldedEntry, taken: TakenEntry
) -> None:
    claimed = spans(taken.records, node=taken.node, boot_id=taken.boot_id)
    for span in unquestioned(claimed, taken.findings):
        place = (span.device_key, entry.stream_id)
        lease = leases.get(place) or DeviceLease(
            device_key=span.device_key,
            stream_id=entry.stream_id,
            first_start_unix_ms=span.start_unix_ms,
            last_end_unix_ms=span.end_unix_ms,
        )
        leases[place] = lease.widened(span)
