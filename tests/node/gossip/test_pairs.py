"""Secrets of two peers."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.node.gossip.pairs import exchange_key, exchange_public, pair_secret

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(6)]
NAMES = [peer_id_of(key.public_key()) for key in KEYS]
RUN = b"r" * 32


def test_both_have_the_same_and_every_pair_and_run_has_another() -> None:
    seen = set()
    for i, one in enumerate(KEYS):
        for j, other in enumerate(KEYS[:i]):
            secret = pair_secret(one, NAMES[j], RUN)
            assert secret == pair_secret(other, NAMES[i], RUN)
            seen |= {secret, pair_secret(one, NAMES[j], b"s" * 32)}
    assert len(seen) == 6 * 5


def test_a_public_key_is_taken_to_where_the_private_one_is() -> None:
    for key in KEYS:
        public = exchange_key(key).public_key()
        assert exchange_public(key.public_key()).public_bytes_raw() == public.public_bytes_raw()
