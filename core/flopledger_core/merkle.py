"""Merkle trees as in RFC 6962 (section 2.1): pure functions over SHA-256, with proofs.

Leaves and inner nodes are hashed under different prefixes, so that an inner node can never be
passed off as a leaf. An empty tree's root is the hash of nothing, as the RFC says.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAF_PREFIX: Final = b"\x00"
NODE_PREFIX: Final = b"\x01"
NAME_PREFIX: Final = b"\x02"  # commitments to personal names
ACCOUNT_PREFIX: Final = b"\x03"  # commitments to accounts in a batch's manifest


def leaf_hash(content: bytes) -> bytes:
    """The hash of one leaf."""
    return hashlib.sha256(LEAF_PREFIX + content).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes in order."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    middle = _split_point(len(leaves))
    return _node(root(leaves[:middle]), root(leaves[middle:]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The sibling hashes from leaf `index` up to the root."""
    if len(leaves) == 1:
        return []
    middle = _split_point(len(leaves))
    if index < middle:
        return [*inclusion_proof(leaves[:middle], index), root(leaves[middle:])]
    return [*inclusion_proof(leaves[middle:], index - middle), root(leaves[:middle])]


def root_from_proof(leaf: bytes, index: int, count: int, proof: Sequence[bytes]) -> bytes | None:
    """The root that `proof` implies for `leaf` at `index` of `count`; None for a misfit proof."""
    if not 0 <= index < count:
        return None
    if count == 1:
        return leaf if not proof else None
    if not proof:
        return None
    middle = _split_point(count)
    if index < middle:
        left = root_from_proof(leaf, index, middle, proof[:-1])
        return None if left is None else _node(left, proof[-1])
    right = root_from_proof(leaf, index - middle, count - middle, proof[:-1])
    return None if right is None else _node(proof[-1], right)


def _split_point(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(NODE_PREFIX + left + right).digest()
