"""Signed work: what a peer signs of its offer, and how anybody can tell later that it was its own.

A coordinator orders offers; it cannot invent them, nor change what they say. The signatures of a commit's
offers, 64 bytes each in their order, are a blob that the commit names (`CommitBody.work`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....compression.errors import LedgerCorrupt
from ..figures import finite
from ..messages import CommitBody, Offer, OfferEntry, digest_of
from .signatures import NOT_SIGNED, SIGNATURE_BYTES, key_of, verifies

_WHAT: Final = b"thinwire offer\n"


def signed_bytes(run_id: bytes, round_: int, offer: Offer | OfferEntry) -> bytes:
    """What the signature of an offer covers: run, round, the payload's digest, and all that the ledger says
    of it. The loss stands there as the ledger has it: None for one that is not finite."""
    payload = offer.digest if offer.payload is None else digest_of(offer.payload)
    counts = (offer.n_samples, offer.n_tokens, offer.n_bytes)
    said: bytes = msgpack.packb([round_, payload, *counts, finite(offer.loss), offer.own_data])
    return _WHAT + run_id + said


def signed(offer: Offer, run_id: bytes, key: Ed25519PrivateKey) -> Offer:
    """The offer with its peer's signature."""
    return offer.model_copy(update={"signature": key.sign(signed_bytes(run_id, offer.round, offer))})


def is_signed(peer_id: str, run_id: bytes, offer: Offer) -> bool:
    """Whether the offer is as `peer_id` has signed it; a peer without a key need not. 0.1 ms."""
    key = key_of(peer_id)
    return key is None or verifies(key, offer.signature, signed_bytes(run_id, offer.round, offer))


def work_of(signatures: Iterable[bytes]) -> bytes:
    """The blob of a commit's signatures, in the order of its offers; empty where nobody has signed."""
    found = [signature or NOT_SIGNED for signature in signatures]
    return b"" if all(signature == NOT_SIGNED for signature in found) else b"".join(found)


def check_work(run_id: bytes, body: CommitBody, work: bytes | None, peers: Mapping[int, str]) -> list[int]:
    """Peers that have a key and did not sign their offer in this commit, by index. `work`: the blob that the
    commit names, None: there is none, or nobody has it; `peers`: peer ids by index.

    Raises LedgerCorrupt for a signature that is not the peer's own.
    """
    n = len(body.offers)
    work = NOT_SIGNED * n if work is None else work
    if len(work) != n * SIGNATURE_BYTES:
        raise LedgerCorrupt(f"record {body.round}: {len(work)} bytes of signatures for {n} offers")
    missing = []
    for i, entry in enumerate(body.offers):
        signature = work[i * SIGNATURE_BYTES : (i + 1) * SIGNATURE_BYTES]
        key = key_of(peers[entry.peer])
        if key is not None and signature == NOT_SIGNED:
            missing.append(entry.peer)
        elif key is not None and not verifies(key, signature, signed_bytes(run_id, body.round, entry)):
            raise LedgerCorrupt(
                f"record {body.round}: the signature of peer {entry.peer} is not its own: the coordinator "
                f"has changed its offer, or made it up"
            )
    return missing
