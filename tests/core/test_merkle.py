"""The Merkle tree is RFC 6962's: published vectors, and proofs that cannot be bent."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from flopledger_core.merkle import inclusion_proof, leaf_hash, root, root_from_proof

# Inputs and roots of the test vectors used by certificate-transparency implementations
# (RFC 6962, merkle_tree_test): leaves of growing length, roots of trees of size 1 to 8.
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
          "606162636465666768696a6b6c6d6e6f"]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def test_roots_equal_the_published_vectors() -> None:
    """Every tree size of the vectors."""
    leaves = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]

    assert [root(leaves[:size]).hex() for size in range(1, 9)] == ROOTS


def test_empty_tree_is_the_hash_of_nothing() -> None:
    """As RFC 6962, section 2.1 says."""
    assert root([]) == hashlib.sha256(b"").digest()


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_proofs_lead_to_the_root_and_only_for_their_leaf(
    contents: list[bytes], data: st.DataObject
) -> None:
    """A proof verifies its leaf at its index, and not another leaf."""
    leaves = [leaf_hash(content) for content in contents]
    index = data.draw(st.integers(0, len(leaves) - 1))
    proof = inclusion_proof(leaves, index)

    assert root_from_proof(leaves[index], index, len(leaves), proof) == root(leaves)
    other = leaf_hash(b"another leaf altogether")
    assert root_from_proof(other, index, len(leaves), proof) != root(leaves)
    assert root_from_proof(leaves[index], index, len(leaves), [*proof, other]) is None
