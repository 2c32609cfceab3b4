"""What auditors sign."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.audited_ledger import KEYS, PEERS, RUN
from thinwire.coordinator.protocol.messages import (
    Audit,
    AuditEntry,
    BadMessage,
    Verdict,
    decode_message,
    decode_record,
    digest_of,
    encode_message,
    encode_record,
)
from thinwire.coordinator.protocol.trust.audits import check_audit, sign_audit, signed_bytes
from thinwire.coordinator.protocol.trust.signatures import NOT_SIGNED

WHAT = (RUN, 7, PEERS[1], digest_of(b"payload"), Verdict.FAILED)


@pytest.mark.parametrize(
    "other",
    [
        (digest_of(b"another run"), *WHAT[1:]),
        (RUN, 8, *WHAT[2:]),
        (RUN, 7, PEERS[2], *WHAT[3:]),
        (*WHAT[:3], digest_of(b"another payload"), Verdict.FAILED),
        (*WHAT[:4], Verdict.PASSED),
    ],
    ids=["run", "round", "target", "payload", "verdict"],
)
def test_a_signature_is_of_one_verdict_on_one_offer(other: tuple[bytes, int, str, bytes, Verdict]) -> None:
    signature = sign_audit(KEYS[0], signed_bytes(*WHAT))
    assert check_audit(PEERS[0], signature, signed_bytes(*WHAT))
    assert not check_audit(PEERS[0], signature, signed_bytes(*other))
    assert not check_audit(PEERS[3], signature, signed_bytes(*WHAT))


def test_who_is_only_a_name_signs_nothing() -> None:
    claim = signed_bytes(*WHAT)
    assert sign_audit(None, claim) == NOT_SIGNED
    assert check_audit("peer-0", NOT_SIGNED, claim)
    assert not check_audit("peer-0", bytes([1] * 64), claim)
    assert not check_audit(PEERS[0], NOT_SIGNED, claim)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_audit_or_a_bad_message(data: bytes) -> None:
    for decode in (decode_message, lambda d: decode_record(AuditEntry, d)):
        try:
            decode(data)
        except BadMessage:
            continue


@given(
    round_=st.integers(1, 2**32 - 1),
    target=st.integers(0, 2**16 - 1),
    verdict=st.sampled_from(Verdict),
    signature=st.binary(min_size=64, max_size=64),
    claim=st.binary(max_size=100),
)
def test_audits_survive_the_wire_and_no_signature_is_an_error(
    round_: int, target: int, verdict: Verdict, signature: bytes, claim: bytes
) -> None:
    audit = Audit(round=round_, target=target, verdict=verdict, signature=signature)
    assert decode_message(encode_message(audit)) == audit
    entry = AuditEntry(round=round_, target=target, auditor=0, verdict=verdict, signature=signature)
    assert decode_record(AuditEntry, encode_record(entry)) == entry
    assert not check_audit(PEERS[0], signature, claim)
