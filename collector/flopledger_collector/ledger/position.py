"""Positions: which journal entries a figure covers, said so that anybody can check it.

A position is a vector of stream heads under one Merkle root. Leaves are sorted by stream id; a
leaf is the UTF-8 text `<stream_id> <sequence> <batch_hash>`, hashed as RFC 6962 leaves are. Two
ledgers with the same root have folded the same batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flopledger_core import merkle

if TYPE_CHECKING:
    from collections.abc import Iterable


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How far one stream is covered."""

    stream_id: str
    sequence: int
    batch_hash: str


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What a figure was computed at."""

    ledger_id: str
    entries: int  # journal entries that the fold covers
    heads_root: str  # hex Merkle root over the heads that the fold covers
    provisional_entries: int  # journaled, but not folded yet: no figure shows them
    at_unix_ms: int  # when it was asked, by the collector's clock


def heads_root(heads: Iterable[Head]) -> str:
    """The hex root over heads, in whatever order they come."""
    ordered = sorted(heads, key=lambda head: head.stream_id)
    return merkle.root([_leaf(head) for head in ordered]).hex()


def covered_entries(heads: Iterable[Head]) -> int:
    """How many journal entries the heads cover: streams count from 0 without holes."""
    return sum(head.sequence + 1 for head in heads)


def _leaf(head: Head) -> bytes:
    text = f"{head.stream_id} {head.sequence} {head.batch_hash}"
    return merkle.leaf_hash(text.encode("ascii"))
