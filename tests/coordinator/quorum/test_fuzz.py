"""Whatever is said to a seat, it stays up, keeps its promises, and votes once in a ballot."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.coordinator.quorum.oracle import Oracle
from tests.coordinator.quorum.stand_ins import RUN, Body, Disk, Key, Records
from tests.coordinator.quorum.world import MILD
from thinwire.coordinator.protocol.messages import (
    MAX_ROUND,
    BadMessage,
    digest_of,
    encode_message,
)
from thinwire.coordinator.protocol.trust.seals import MAX_BALLOT, Committee, Seal, Sealed, vote_bytes
from thinwire.coordinator.quorum.events import Role
from thinwire.coordinator.quorum.seat import Seat
from thinwire.coordinator.quorum.words import (
    Accepted,
    Aye,
    Batch,
    Canvass,
    Follow,
    Nack,
    Ping,
    Pong,
    Prepare,
    Promise,
    Propose,
    Sealing,
    Voted,
    Word,
    decode_word,
)

NAMES = ("seat-0", "seat-1", "seat-2")
COMMITTEE = Committee.majority(0, NAMES)


def _ballot(number: int, seat: str) -> int:
    ballot = 0
    for _ in range(number):
        ballot = COMMITTEE.ballot_above(ballot, seat)
    return ballot


def _sealed(record: bytes, round_: int, ballot: int, seats: tuple[str, ...]) -> Sealed:
    data = vote_bytes(RUN, ballot, round_, digest_of(record))
    votes = {NAMES.index(seat): Key(seat).sign(data) for seat in seats}
    return Sealed(record=record, seal=Seal(ballot, votes).to_bytes())


def _chain(length: int) -> list[bytes]:
    records, parent = list[bytes](), RUN
    for round_ in range(1, length + 1):
        records.append(Body(round_, parent, 0).packed())
        parent = digest_of(records[-1])
    return records


CHAIN = _chain(3)
OTHER = [Body(1, RUN, 1).packed(), Body(2, digest_of(CHAIN[0]), 1).packed()]

ballots = st.one_of(
    st.builds(_ballot, st.integers(0, 4), st.sampled_from(NAMES)),
    st.builds(_ballot, st.integers(1, 9), st.sampled_from(["seat-0", "seat-2"])),
    st.sampled_from([Committee.majority(2, NAMES).ballot_above(0, "seat-0"), MAX_BALLOT, MAX_BALLOT >> 32]),
    st.integers(0, MAX_BALLOT),
)
heads = st.sampled_from([0, 0, 0, 1, 1, 2, 3, MAX_ROUND])
records = st.one_of(st.sampled_from(CHAIN + OTHER), st.binary(max_size=20))
seats = st.sampled_from([("seat-0",), ("seat-0", "seat-2"), ("seat-0", "seat-1", "seat-2")])
seals = st.one_of(
    st.builds(_sealed, records, heads, ballots, seats),
    st.builds(Sealed, record=records, seal=st.binary(min_size=64, max_size=80)),
    st.integers(0, 2).map(lambda i: _sealed(CHAIN[i], i + 1, _ballot(1, "seat-0"), ("seat-0", "seat-2"))),
)
accepted = st.builds(Accepted, ballot=ballots, round=heads, record=records)
nonces = st.none() | st.binary(min_size=16, max_size=16)


def _voted(seat: str, ballot: int, round_: int, record: bytes) -> Voted:
    digest = digest_of(record)
    signature = Key(seat).sign(vote_bytes(RUN, ballot, round_, digest))
    return Voted(ballot=ballot, round=round_, digest=digest, signature=signature)


def _sealing(sealed: Sealed, head: int) -> Sealing:
    return Sealing(head=head, digest=digest_of(sealed.record), seal=sealed.seal)


words: SearchStrategy[Word] = st.one_of(
    st.builds(Ping, ballot=ballots, head=heads),
    st.builds(Pong, ballot=ballots, head=heads, nonce=nonces),
    st.builds(Canvass, highest=ballots, head=heads),
    st.builds(Aye, highest=ballots),
    st.builds(Prepare, ballot=ballots, head=heads),
    st.builds(Prepare, ballot=ballots, head=st.just(0)),
    st.builds(Promise, ballot=ballots, head=heads, accepted=st.none() | accepted),
    st.builds(Nack, promised=ballots, head=heads),
    st.builds(Propose, ballot=ballots, round=heads, record=records),
    st.builds(Propose, ballot=ballots, round=st.just(1), record=st.sampled_from([CHAIN[0], OTHER[0]])),
    st.builds(_voted, st.sampled_from(NAMES), ballots, heads, records),
    st.builds(Follow, after=heads),
    st.builds(Batch, head=heads, sealed=st.lists(seals, min_size=1, max_size=3).map(tuple)),
    st.builds(_sealing, seals, heads),
)
senders = st.sampled_from([None, None, "seat-0", "seat-2", "nobody"])
"""None: the seat whose ballot it is."""
said = st.tuples(senders, words, st.sampled_from([0.0, 0.1, 2.0]))


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(said, min_size=12, max_size=30), st.booleans(), st.integers(0, 3))
def test_a_seat_bears_all_that_is_said(
    said: list[tuple[str | None, Word, float]], rests: bool, seed: int
) -> None:
    oracle, now_s = Oracle(COMMITTEE), 10.0
    disk = Disk(COMMITTEE, me="seat-1", rests=bytes(16) if rests else None)
    sent: list[Word] = []
    key = Key("seat-1", oracle.signed)
    seat = Seat(
        RUN,
        key,
        disk,
        Records(),
        lambda _to, word: sent.append(word),
        now_s,
        rng=random.Random(seed),
        timing=MILD,
    )
    for sender, word, later_s in said:
        promised, head = disk.vote.promised, disk.head
        now_s += later_s
        owner = COMMITTEE.owner(getattr(word, "ballot", 0))
        seat.receive(sender or owner or "nobody", word, now_s)
        seat.tick(now_s)
        seat.vote_again(now_s)
        if seat.role is Role.LEADING and seat.proposal is None:
            seat.propose(Body(disk.head + 1, disk.head_digest, 7).packed(), now_s)
        assert disk.vote.promised >= promised
        assert disk.head >= head
        assert not (rests and disk.vote.promised)
        assert seat.wake_s > now_s or seat.role in (Role.LEADING, Role.RECOVERING)
    for i, sealed in enumerate(disk.records):
        assert COMMITTEE.has_sealed(RUN, i + 1, sealed.record, sealed.seal, key.check)
    for word in sent:
        assert decode_word(encode_message(word)) == word


@given(words)
def test_a_word_is_itself_again(word: Word) -> None:
    assert decode_word(encode_message(word)) == word


@given(st.data())
def test_a_word_with_a_wrong_byte_is_another_word_or_none(data: st.DataObject) -> None:
    packed = bytearray(encode_message(data.draw(words)))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        word = decode_word(bytes(packed))
    except BadMessage:
        return
    assert decode_word(encode_message(word)) == word


@given(st.data())
def test_no_seal_but_the_right_one_holds(data: st.DataObject) -> None:
    good = _sealed(CHAIN[0], 1, _ballot(1, "seat-0"), ("seat-0", "seat-2"))
    assert COMMITTEE.has_sealed(RUN, 1, good.record, good.seal, Key("").check)
    packed = bytearray(encode_message(Batch(head=1, sealed=(good,))))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        word = decode_word(bytes(packed))
    except BadMessage:
        return
    if isinstance(word, Batch) and word.sealed[0] != good:
        assert not COMMITTEE.has_sealed(RUN, 1, word.sealed[0].record, word.sealed[0].seal, Key("").check)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_seal_or_bad(data: bytes) -> None:
    try:
        seal = Seal.parse(data)
    except BadMessage:
        return
    assert seal.to_bytes() == data
    assert not COMMITTEE.has_sealed(RUN, 1, CHAIN[0], data, Key("").check)
