"""Messages and records: whatever the bytes, a value of the expected type or `BadMessage`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.errors import (
    ConfigError,
    Incompatible,
    LedgerCorrupt,
    ReplicaDiverged,
    SwarmUnreachable,
    ThinwireError,
)
from thinwire.coordinator.protocol.chain import Forked
from thinwire.coordinator.protocol.messages import (
    MESSAGES,
    Admission,
    AskMetrics,
    Audit,
    BadMessage,
    Commit,
    CommitBody,
    Elsewhere,
    Evaluation,
    Figure,
    Follow,
    GenesisBody,
    Head,
    Heartbeat,
    Hello,
    Member,
    Members,
    Message,
    Metrics,
    NodeState,
    Notice,
    Offer,
    Offered,
    OfferEntry,
    Record,
    Refused,
    Report,
    ReportEntry,
    SeatEntry,
    SnapshotEntry,
    State,
    Verdict,
    Welcome,
    decode_message,
    decode_record,
    digest_of,
    encode_message,
    encode_record,
)
from thinwire.coordinator.protocol.streams import BadFrame

D = bytes(range(32))
COMMIT = CommitBody(
    round=3,
    parent=D,
    offers=(
        OfferEntry(peer=0, n_samples=4, n_tokens=64, loss=1.5, n_bytes=3, payload=b"abc", digest=None),
        OfferEntry(peer=2, n_samples=4, n_tokens=64, loss=None, n_bytes=9000, payload=None, digest=D),
    ),
    admitted=(Admission(index=2, peer_id="12D3KooW"),),
    lr_factor_bits=0x3F800000,
    reports=(ReportEntry(peer=0, round=2, fingerprint=b"12345678", checked=True),),
    snapshots=(SnapshotEntry(peer=2, round=2, manifest=D, n_bytes=10**9),),
    evaluator=2,
    time_ms=1_700_000_000_000,
)
EXAMPLES: list[Message] = [
    Hello(
        version=1,
        run_id=D,
        token="secret",
        head_round=3,
        head_digest=D,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        agent="thinwire",
    ),
    Welcome(
        genesis=b"record",
        signature=bytes(64),
        head_round=3,
        head_digest=D,
        kept_from=2,
        peer_index=1,
        heartbeat_s=1.5,
    ),
    Refused(error="Incompatible", text="the swarm is full"),
    Elsewhere(
        leader="12D3KooW",
        seats=(SeatEntry(peer_id="12D3KooW", addresses=("/ip4/1.2.3.4/tcp/1",)),),
        waits_for="",
    ),
    State(state=NodeState.JOINING, needs_after=3),
    Offer(round=4, n_samples=2, n_tokens=8, loss=0.5, n_bytes=3, payload=b"abc", digest=None),
    Follow(after=7),
    Commit(record=encode_record(COMMIT), signature=bytes(64)),
    Head(round=7),
    Report(round=7, fingerprint=b"12345678", checked=True, held_out=2.5, snapshot=D, snapshot_bytes=10**9),
    Evaluation(round=7, figures=(Figure(name="accuracy", value=0.5),), failed="no room"),
    Audit(round=7, target=3, verdict=Verdict.FAILED, signature=bytes(64)),
    Heartbeat(round=7, sent_bytes=1, received_bytes=2, payload_bytes=3),
    Offered(round=7, holder="12D3KooW", digest=D, n_bytes=9000),
    Members(members=(Member(peer_id="12D3KooW", addresses=("/ip4/127.0.0.1/tcp/1",)),)),
    Notice(text="waiting", warning=False),
    AskMetrics(),
    Metrics(text=b"compressed"),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(m) for m in EXAMPLES} == set(MESSAGES.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_messages_come_back_as_they_were_sent(message: Message) -> None:
    data = encode_message(message)
    assert decode_message(data) == message
    assert encode_message(decode_message(data)) == data


def test_records_come_back_as_they_were_signed() -> None:
    data = encode_record(COMMIT)
    assert decode_record(CommitBody, data) == COMMIT
    assert encode_record(decode_record(CommitBody, data)) == data


def test_a_copy_with_other_values_is_another_message() -> None:
    commit = Commit(record=b"record", signature=bytes(64))
    before = (commit.digest, encode_message(commit))
    other = commit.model_copy(update={"record": b"another"})
    assert (other.digest, encode_message(other)) == (
        digest_of(b"another"),
        encode_message(Commit(record=b"another", signature=bytes(64))),
    )
    assert (commit.digest, encode_message(commit)) == before


def test_genesis_comes_back(make_genesis: Callable[..., GenesisBody]) -> None:
    genesis = make_genesis()
    assert decode_record(GenesisBody, encode_record(genesis)) == genesis


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        msgpack.packb([]),
        msgpack.packb([99]),
        msgpack.packb([True, 3]),
        msgpack.packb(["4", "training"]),
        msgpack.packb({"tag": 4}),
        msgpack.packb([4]),
        msgpack.packb([4, "training"]),
        msgpack.packb([4, "dancing", None]),
        msgpack.packb([4, "training", -1]),
        msgpack.packb([4, "training", None, 1]),
        msgpack.packb([6, -1]),
        msgpack.packb([6, 2**32]),
        msgpack.packb([6, 1.0]),
        msgpack.packb([6, "1"]),
        msgpack.packb([6, True]),
        msgpack.packb([9, 1, b"short", False, None, None, None]),
        msgpack.packb([9, 1, None, None, None, None, None]),
        msgpack.packb([9, 1, None, False, None, b"short", 1]),
        msgpack.packb([11, 0, "peer", bytes(32), 1]),
        msgpack.packb([11, 1, "", bytes(32), 1]),
        msgpack.packb([12, [["peer", ["a" * 301]]]]),
        msgpack.packb([12, [["peer", ["a"] * 33]]]),
        msgpack.packb([13, "x" * 2001, False]),
        msgpack.packb([6, 1]) + b"\x00",
        msgpack.packb([6, msgpack.ExtType(1, b"x")]),
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 entries
        b"\xc6\xff\xff\xff\xff",  # 2^32 - 1 bytes
        b"\x91" * 2000,  # nested deeply
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_message(data)


def test_an_offer_entry_has_a_payload_or_a_digest() -> None:
    fields = [0, 1, 1, None, 3]
    for payload, digest in ((None, None), (b"abc", D)):
        with pytest.raises(BadMessage, match="either a payload or a digest"):
            decode_record(OfferEntry, msgpack.packb([*fields, payload, digest]))


def only_bad_message(decode: Callable[[], Record]) -> None:
    with contextlib.suppress(BadMessage):
        decode()


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_random_bytes(data: bytes) -> None:
    only_bad_message(lambda: decode_message(data))
    only_bad_message(lambda: decode_record(CommitBody, data))
    only_bad_message(lambda: decode_record(GenesisBody, data))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(st.sampled_from(sorted(MESSAGES)), st.lists(VALUES, max_size=8))
@settings(max_examples=500)
def test_random_values_behind_a_known_tag(tag: int, fields: list[object]) -> None:
    try:
        data = msgpack.packb([tag, *fields], use_bin_type=True)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        return
    only_bad_message(lambda: decode_message(data))


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500)
def test_mutated_messages(message: Message, data: st.DataObject) -> None:
    changed = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(changed) - 1)))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set" if changed:
                changed[at] = data.draw(st.integers(0, 255))
            case "cut":
                del changed[at:]
            case _:
                changed[at:at] = data.draw(st.binary(max_size=4))
    only_bad_message(lambda: decode_message(bytes(changed)))


@given(st.integers(0, len(encode_record(COMMIT)) - 1), st.integers(1, 255))
@settings(max_examples=300)
def test_mutated_commits(at: int, flip: int) -> None:
    changed = bytearray(encode_record(COMMIT))
    changed[at] ^= flip
    commit = Commit(record=bytes(changed), signature=bytes(64))
    only_bad_message(lambda: commit.body)


@pytest.mark.parametrize("kind", [ConfigError, Incompatible, LedgerCorrupt, SwarmUnreachable, BadMessage])
def test_a_refusal_is_the_same_error_at_the_node(kind: type[ThinwireError]) -> None:
    refused = decode_message(encode_message(Refused.of(kind("why"))))
    assert isinstance(refused, Refused)
    error = refused.as_error()
    assert type(error) is kind
    assert str(error) == "why"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Forked("x"), LedgerCorrupt), (ReplicaDiverged("x"), BadMessage), (BadFrame("hello", "x"), BadMessage)],
)
def test_a_node_is_told_the_nearest_error_that_it_can_answer(
    error: ThinwireError, kind: type[ThinwireError]
) -> None:
    assert type(Refused.of(error).as_error()) is kind
