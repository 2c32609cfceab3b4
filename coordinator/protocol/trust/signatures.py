"""Signatures of peers whose ids carry a key.

Others are only names, as threads of one process and the actors of a Ray cluster have them, one domain of
trust: they sign nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ....compression.errors import ConfigError
from ..identity import public_key_of

SIGNATURE_BYTES: Final = 64
NOT_SIGNED: Final = bytes(SIGNATURE_BYTES)
"""In the place of a signature that is not there."""


@lru_cache(maxsize=4096)
def key_of(peer_id: str) -> Ed25519PublicKey | None:
    """The key in a peer id; None: it is only a name."""
    try:
        return public_key_of(peer_id)
    except ConfigError:
        return None


def verifies(key: Ed25519PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether the signature, any bytes, is the key's over the data. Takes some 0.1 ms."""
    try:
        key.verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def verifies_raw(key: bytes, signature: bytes, data: bytes) -> bool:
    """The same of a raw public key, 32 bytes."""
    try:
        return verifies(Ed25519PublicKey.from_public_bytes(key), signature, data)
    except ValueError:
        return False
