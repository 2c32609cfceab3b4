"""Secrets of two peers that nobody else has, without a byte between them: Diffie-Hellman with the keys in
their peer ids (Ed25519), taken to X25519 as RFC 7748 has it."""

from __future__ import annotations

from hashlib import sha512
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ...coordinator.protocol.identity import public_key_of

_P: Final = 2**255 - 19
_CONTEXT: Final = "thinwire 2026 pairs of neighbours"


def pair_secret(key: Ed25519PrivateKey, peer_id: str, run_id: bytes) -> bytes:
    """32 bytes, the same for both. Raises ConfigError: the peer id is none."""
    shared = exchange_key(key).exchange(exchange_public(public_key_of(peer_id)))
    return blake3(shared + run_id, derive_key_context=_CONTEXT).digest()


def exchange_key(key: Ed25519PrivateKey) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(sha512(key.private_bytes_raw()).digest()[:32])


def exchange_public(key: Ed25519PublicKey) -> X25519PublicKey:
    """u = (1 + y) / (1 - y)"""
    y = int.from_bytes(key.public_bytes_raw(), "little") & (2**255 - 1)
    u = (1 + y) * pow(1 - y, -1, _P) % _P
    return X25519PublicKey.from_public_bytes(u.to_bytes(32, "little"))
