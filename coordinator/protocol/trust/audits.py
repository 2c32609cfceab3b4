"""What an auditor signs: that it did a peer's work of one round again, and what it found of the offer.

In the place of the signature of a peer whose id carries no key are zeros.
"""

from __future__ import annotations

from typing import Final

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..messages import OfferEntry, Verdict, digest_of
from .signatures import NOT_SIGNED, key_of, verifies

_WHAT: Final = b"thinwire audit\n"


def payload_digest(offer: OfferEntry) -> bytes:
    """BLAKE3 of the offer's payload, wherever that is."""
    if offer.digest is not None:
        return offer.digest
    assert offer.payload is not None
    return digest_of(offer.payload)


def signed_bytes(run_id: bytes, round_: int, target: str, digest: bytes, verdict: Verdict) -> bytes:
    """What an auditor's signature covers. `target`: the peer id; `digest`: of the payload that it offered."""
    said: bytes = msgpack.packb([round_, target, digest, str(verdict)], use_bin_type=True)
    return _WHAT + run_id + said


def sign_audit(key: Ed25519PrivateKey | None, claim: bytes) -> bytes:
    """The signature of what `signed_bytes` gave. `key`: the auditor's, None: its peer id is only a name."""
    return NOT_SIGNED if key is None else key.sign(claim)


def check_audit(auditor: str, signature: bytes, claim: bytes) -> bool:
    """Whether the peer `auditor` has signed the claim, see `signed_bytes`. Takes some 0.1 ms."""
    key = key_of(auditor)
    return signature == NOT_SIGNED if key is None else verifies(key, signature, claim)
