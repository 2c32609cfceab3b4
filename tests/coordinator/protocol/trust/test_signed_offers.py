"""Whose work an offer is: its peer says so, and nobody else can."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.support.records import commit_body
from thinwire.compression.errors import LedgerCorrupt
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import Offer, OfferEntry, digest_of
from thinwire.coordinator.protocol.trust.signatures import NOT_SIGNED
from thinwire.coordinator.protocol.trust.signed_offers import (
    check_work,
    is_signed,
    signed,
    work_of,
)

RUN = digest_of(b"run")
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in (1, 2)]
PEERS = {i: peer_id_of(key.public_key()) for i, key in enumerate(KEYS)}


def offer(**changes: Any) -> Offer:
    plain = Offer(
        round=7, n_samples=4, n_tokens=64, loss=1.5, n_bytes=5, payload=b"bytes", digest=None, own_data=False
    )
    return plain.model_copy(update=changes)


def entry(peer: int, offer: Offer) -> OfferEntry:
    return OfferEntry(peer=peer, **offer.model_dump(exclude={"round", "signature"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 8},
        {"payload": b"other"},
        {"n_samples": 400},
        {"n_tokens": 65},
        {"n_bytes": 6},
        {"loss": 1.4},
        {"loss": None},
        {"own_data": True},
        {"signature": NOT_SIGNED},
        {"signature": b""},
        {"signature": b"short"},
    ],
    ids=str,
)
def test_nothing_of_an_offer_can_be_changed(changes: dict[str, Any]) -> None:
    own = signed(offer(), RUN, KEYS[0])
    assert is_signed(PEERS[0], RUN, own)
    assert not is_signed(PEERS[0], RUN, own.model_copy(update=changes))
    assert not is_signed(PEERS[1], RUN, own)
    assert not is_signed(PEERS[0], digest_of(b"another run"), own)


def test_the_ledger_keeps_what_a_signature_covers() -> None:
    """A payload by its digest, inside of the offer or not; a loss that is no figure as none."""
    inline = signed(offer(loss=float("nan")), RUN, KEYS[0])
    blob = signed(offer(payload=None, digest=digest_of(b"bytes"), loss=None), RUN, KEYS[0])
    assert inline.signature == blob.signature
    kept = entry(0, inline.model_copy(update={"loss": None}))
    assert check_work(RUN, commit_body(7, offers=(kept,)), work_of([inline.signature]), PEERS) == []


def test_what_a_coordinator_makes_up_is_found() -> None:
    own = [signed(offer(), RUN, key) for key in KEYS]
    body = commit_body(7, offers=tuple(entry(i, o) for i, o in enumerate(own)))
    work = work_of(o.signature for o in own)
    assert check_work(RUN, body, work, PEERS) == []
    assert check_work(RUN, body, None, PEERS) == [0, 1], "the blob is gone"
    assert check_work(RUN, body, work_of([own[0].signature, b""]), PEERS) == [1]
    with pytest.raises(LedgerCorrupt, match="the signature of peer 0 is not its own"):
        check_work(RUN, body, work[64:] + work[:64], PEERS)
    invented = commit_body(7, offers=(entry(0, offer(n_samples=2**20)), entry(1, own[1])))
    with pytest.raises(LedgerCorrupt, match="record 7: the signature of peer 0"):
        check_work(RUN, invented, work, PEERS)
    with pytest.raises(LedgerCorrupt, match="record 7: 63 bytes of signatures for 2 offers"):
        check_work(RUN, body, work[:63], PEERS)


def test_a_peer_that_is_only_a_name_signs_nothing() -> None:
    assert is_signed("actor-3", RUN, offer())
    assert work_of([b"", b""]) == b""
    assert check_work(RUN, commit_body(7, offers=(entry(0, offer()),)), None, {0: "actor-3"}) == []


@given(st.binary(max_size=200), st.text(max_size=60))
def test_any_bytes_as_signatures_and_peers(work: bytes, peer_id: str) -> None:
    body = commit_body(7, offers=(entry(0, offer()),))
    try:
        missing = check_work(RUN, body, work, {0: peer_id})
    except LedgerCorrupt:
        return
    assert missing in ([], [0])
    is_signed(peer_id, RUN, offer(signature=work[:64]))
