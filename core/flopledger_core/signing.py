"""Ed25519 keys and signatures over exact bytes; the only importer of `cryptography`.

A signature is made over, and checked against, stored bytes as they are: nothing is re-serialised
on the way. A key is named by its fingerprint, the SHA-256 of its raw public bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from flopledger_core.errors import InvalidInput, SignatureInvalid

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """A private key that signs batches. Its secret leaves only through `to_pem`."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public_key = base64.b64encode(raw).decode("ascii")

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """The key of a 32-byte seed: for simulations that must repeat exactly."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_pem(cls, pem: bytes) -> SigningKey:
        """Read a key file; raises `InvalidInput` when it is no unencrypted Ed25519 key."""
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise InvalidInput(
                "key file",
                str(error),
                "restore the key file from a backup, or remove it to "
                "begin a new stream with a new key",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidInput("key file", type(key).__name__, "use an Ed25519 key")
        return cls(key)

    def to_pem(self) -> bytes:
        """The private key for a file that only its owner may read."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, content: bytes) -> str:
        """The base64 signature over exactly these bytes."""
        return base64.b64encode(self._private.sign(content)).decode("ascii")

    def __repr__(self) -> str:
        return f"SigningKey(public_key={self.public_key!r})"


def fingerprint(public_key: str) -> str:
    """The hex SHA-256 of a base64 public key's raw bytes."""
    return hashlib.sha256(_decoded("public_key", public_key, PUBLIC_KEY_BYTES)).hexdigest()


def verify(public_key: str, signature: str, content: bytes) -> None:
    """Raise `SignatureInvalid` unless `signature` covers `content` under `public_key`."""
    raw_key = _decoded("public_key", public_key, PUBLIC_KEY_BYTES)
    raw_signature = _decoded("signature", signature, SIGNATURE_BYTES)
    try:
        Ed25519PublicKey.from_public_bytes(raw_key).verify(raw_signature, content)
    except (InvalidSignature, ValueError) as error:
        raise SignatureInvalid(
            "signature: it does not cover these header bytes under this public key; send the "
            "sealed bytes unchanged"
        ) from error


def _decoded(field: str, text: str, length: int) -> bytes:
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise InvalidInput(field, text, "give base64 text") from error
    if len(raw) != length or base64.b64encode(raw).decode("ascii") != text:
        raise InvalidInput(field, text, f"give exactly {length} bytes in canonical base64")
    return raw
