"""Rebuild: drop every projection and make it again from the journal, in one transaction.

Readers see the old projections until the new ones are whole; writers wait, so this is a command
for a quiet ledger. The result equals what folding live had made, to the last limb; where it does
not, a projection had been damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_collector.journal import DeviceLease, spans, unquestioned_spans
from flopledger_collector.ledger.delta import Delta
from flopledger_collector.ledger.fold import CHUNK_ENTRIES_MAX
from flopledger_core.records import ImportedHours
from flopledger_core.validation import Finding

if TYPE_CHECKING:
    from flopledger_collector.ledger.delta import UnfoldedEntry
    from flopledger_collector.store.interface import Database
    from flopledger_core.records import Record


def rebuild(database: Database) -> int:
    """Make every projection again; the number of journal entries folded."""
    folded = 0
    leases: dict[tuple[str, str], DeviceLease] = {}
    with database.writing() as writing:
        writing.projections.clear()
        while True:
            entries = writing.projections.unfolded(CHUNK_ENTRIES_MAX)
            delta = Delta()
            imports: list[tuple[str, str, int, int]] = []
            for entry in entries:
                records = delta.take(entry)
                imports += _imports(entry, records)
                _widen(leases, entry, records)
            if entries:
                assert writing.projections.add(delta), "nobody else folds inside this transaction"
                writing.journal.write_import_keys(imports)
            folded += len(entries)
            if len(entries) < CHUNK_ENTRIES_MAX:
                break
        writing.journal.write_leases([leases[place] for place in sorted(leases)])
    return folded


def _imports(entry: UnfoldedEntry, records: tuple[Record, ...]) -> list[tuple[str, str, int, int]]:
    return [
        (record.import_key, entry.stream_id, entry.sequence, index)
        for index, record in enumerate(records)
        if isinstance(record, ImportedHours)
    ]


def _widen(
    leases: dict[tuple[str, str], DeviceLease], entry: UnfoldedEntry, records: tuple[Record, ...]
) -> None:
    findings = msgspec.json.decode(entry.findings, type=tuple[Finding, ...])
    for span in unquestioned_spans(spans(records), findings):
        place = (span.device_key, entry.stream_id)
        lease = leases.get(place) or DeviceLease(
            device_key=span.device_key,
            stream_id=entry.stream_id,
            first_start_unix_ms=span.start_unix_ms,
            last_end_unix_ms=span.end_unix_ms,
        )
        leases[place] = lease.widened(span)
