"""Positions: one root for one set of heads."""

from __future__ import annotations

import hashlib

from flopledger_collector.ledger.position import Head, covered_entries, heads_root

ONE = Head(stream_id="aa" * 16, sequence=4, batch_hash="11" * 32)
TWO = Head(stream_id="bb" * 16, sequence=0, batch_hash="22" * 32)


def test_the_root_is_the_documented_hash() -> None:
    """An auditor computes it with common tools."""
    text = f"{'aa' * 16} 4 {'11' * 32}".encode()
    assert heads_root([ONE]) == hashlib.sha256(b"\x00" + text).hexdigest()
    assert heads_root([]) == hashlib.sha256(b"").hexdigest()


def test_the_order_of_heads_says_nothing_and_every_part_matters() -> None:
    """Sorted by stream; another sequence or hash is another root."""
    moved = Head(stream_id=TWO.stream_id, sequence=1, batch_hash=TWO.batch_hash)
    assert heads_root([ONE, TWO]) == heads_root([TWO, ONE])
    assert heads_root([ONE, TWO]) != heads_root([ONE, moved])
    assert covered_entries([ONE, TWO]) == 6
