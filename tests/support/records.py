"""Records of a ledger as tests want them: what they do not name is empty or zero."""

from __future__ import annotations

from typing import Any

from thinwire.coordinator.protocol.messages import Commit, CommitBody, OfferEntry, encode_record

OFFER = OfferEntry(peer=0, n_samples=1, n_tokens=1, loss=1.0, n_bytes=1, payload=b"x", digest=None)


def commit_body(round_: int = 1, **fields: Any) -> CommitBody:
    """With one offer, where none are given."""
    nothing: dict[str, Any] = {
        "parent": bytes(32),
        "offers": (OFFER,),
        "admitted": (),
        "lr_factor_bits": 0,
        "reports": (),
        "snapshots": (),
        "evaluator": None,
        "time_ms": 1,
    }
    return CommitBody(round=round_, **{**nothing, **fields})


def unsigned(body: CommitBody) -> Commit:
    return Commit(record=encode_record(body), signature=bytes(64))
