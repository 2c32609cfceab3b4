"""Seals: a majority has signed, which anybody can check; what is forged is refused with its reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import combinations
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.committee import KEY_OF, KEYS, RECOVERY_KEY, SEATS, Sealing, entry, raw_public, seal_of
from thinwire.compression.errors import LedgerCorrupt
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.figures import short
from thinwire.coordinator.protocol.messages import (
    MAX_SEAL_BYTES,
    MAX_SEATS,
    BadMessage,
    Commit,
    CommitBody,
    CommitteeEntry,
    GenesisBody,
    SeatEntry,
    decode_record,
    digest_of,
    encode_message,
    encode_record,
)
from thinwire.coordinator.protocol.trust.seals import MAX_BALLOT, Committee, Seal, Sealed, vote_bytes
from thinwire.coordinator.protocol.trust.signatures import key_of

A, B, C, D = SEATS[:4]
RUN, RECORD = bytes(32), b"a record"
THREE = Committee.majority(5, SEATS[:3])


@pytest.fixture
def run(make_genesis: Callable[..., GenesisBody]) -> Sealing:
    """Ordered by three since record 2; record 0 names a recovery key."""
    recovery = digest_of(raw_public(RECOVERY_KEY))
    run = Sealing(make_genesis().model_copy(update={"coordinator": A, "recovery": recovery}))
    run.add(run.body())
    run.add(run.governing(committee=entry([0, 1, 2])))
    return run


def votes(
    run: Sealing, *places: int, by: dict[int, int] | None = None, ballot: int | None = None, **other: Any
) -> bytes:
    """A seal of the next record with votes in these places; `by`: which key's vote stands in a place instead;
    `other`: what the votes are for instead."""
    ballot = run.chain.committee.ballot_above(0, A) if ballot is None else ballot
    signed = {
        "run_id": run.run_id,
        "ballot": ballot,
        "round_": run.chain.round + 1,
        "digest": digest_of(encode_record(run.body())),
    }
    data = vote_bytes(**{**signed, **other})
    made = [bytes([place]) + KEYS[(by or {}).get(place, place)].sign(data) for place in places]
    return ballot.to_bytes(8, "big") + b"".join(made)


def earlier_epoch(run: Sealing) -> int:
    return Committee.majority(1, SEATS[:3]).ballot_above(0, A)


def of_no_seat(run: Sealing) -> int:
    return run.chain.committee.ballot_above(0, A) + 3


FORGED: dict[str, tuple[Callable[[Sealing], bytes], str]] = {
    "one vote": (lambda run: votes(run, 1), "it has 1 vote of 2 that are needed"),
    "one vote twice": (lambda run: votes(run, 1, 1), "each seat has one vote, in the order of the seats"),
    "out of order": (lambda run: votes(run, 2, 1), "each seat has one vote, in the order of the seats"),
    "a stranger's": (
        lambda run: votes(run, 0, 1, by={1: 5}),
        f"the vote of {short(B)} is not its own for this record",
    ),
    "one seat for another": (
        lambda run: votes(run, 0, 1, by={1: 0}),
        f"the vote of {short(B)} is not its own for this record",
    ),
    "a wrong vote beside enough": (
        lambda run: votes(run, 0, 1, 2, by={2: 4}),
        f"the vote of {short(C)} is not its own for this record",
    ),
    "a place that nobody has": (lambda run: votes(run, 0, 1, 3), "it has a vote of seat 4 of 3"),
    "a place that nobody can have": (lambda run: votes(run, 0, 7, by={7: 0}), "these bytes are no seal"),
    "another ballot": (
        lambda run: (
            votes(run, 0, 1, ballot=run.chain.committee.ballot_above(0, B))[:8] + votes(run, 0, 1)[8:]
        ),
        f"the vote of {short(A)} is not its own for this record",
    ),
    "votes of two ballots": (
        lambda run: votes(run, 0) + votes(run, 1, ballot=run.chain.committee.ballot_above(0, A) + 8)[8:],
        f"the vote of {short(B)} is not its own for this record",
    ),
    "an earlier committee's": (
        lambda run: votes(run, 0, 1, ballot=earlier_epoch(run)),
        "its ballot is void since record 2 named that",
    ),
    "a ballot of no seat": (
        lambda run: votes(run, 0, 1, ballot=of_no_seat(run)),
        "its ballot is void since record 2 named that",
    ),
    "another run": (
        lambda run: votes(run, 0, 1, run_id=bytes(32)),
        f"the vote of {short(A)} is not its own for this record",
    ),
    "another round": (
        lambda run: votes(run, 0, 1, round_=9),
        f"the vote of {short(A)} is not its own for this record",
    ),
    "another record": (
        lambda run: votes(run, 0, 1, digest=bytes(32)),
        f"the vote of {short(A)} is not its own for this record",
    ),
    "the founder's signature alone": (
        lambda run: KEYS[0].sign(encode_record(run.body())),
        "these bytes are no seal",
    ),
    "too long": (lambda run: votes(run, 0, 1) + b"x", "these bytes are no seal"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_seal_is_refused_with_its_reason(run: Sealing, name: str) -> None:
    make, why = FORGED[name]
    record = encode_record(run.body())
    text = f"record 3: its signature is not a majority's of its committee: {why}"
    with pytest.raises(LedgerCorrupt) as e:
        run.chain.check(Commit(record=record, signature=make(run)))
    assert str(e.value) == text
    assert run.chain.round == 2
    run.chain.check(Commit(record=record, signature=votes(run, 0, 1)))


def test_a_seal_is_none_for_a_committee_of_one(run: Sealing) -> None:
    seals = [votes(run, 0, 1), votes(run, 0)]
    run.add(run.governing(committee=entry([1])))
    record = encode_record(run.body())
    for seal in (*seals, KEYS[0].sign(record)):
        with pytest.raises(LedgerCorrupt, match="record 4: its signature is not the coordinator's"):
            run.chain.check(Commit(record=record, signature=seal))
    run.add(run.body())


def recovering(run: Sealing, **says: Any) -> Commit:
    """By the recovery key, but for what is said."""
    key = says.pop("key", RECOVERY_KEY)
    fields = {"recovered_with": raw_public(says.pop("names", key)), **says}
    record = encode_record(run.governing(committee=entry([3, 4], **fields)))
    return Commit(record=record, signature=key.sign(record))


def sealed_by_two(run: Sealing) -> Commit:
    named = entry([3, 4], recovered_with=raw_public(RECOVERY_KEY))
    return run.sealing(run.governing(committee=named)).commit


def of_another_head(run: Sealing) -> Commit:
    named = entry([3, 4], recovered_with=raw_public(RECOVERY_KEY))
    body = run.governing(committee=named).model_copy(update={"parent": bytes(32)})
    return Commit(record=encode_record(body), signature=RECOVERY_KEY.sign(encode_record(body)))


def with_offers(run: Sealing) -> Commit:
    named = entry([3, 4], recovered_with=raw_public(RECOVERY_KEY))
    record = encode_record(run.body(committee=named))
    return Commit(record=record, signature=RECOVERY_KEY.sign(record))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda run: recovering(run, key=KEYS[0]),
            "it is signed with a key that is not the run's recovery key",
        ),
        (
            lambda run: recovering(run, key=KEYS[0], names=RECOVERY_KEY),
            "its signature is not the recovery key's",
        ),
        (sealed_by_two, "its signature is not the recovery key's"),
        (
            lambda run: recovering(run, recovery=digest_of(b"another")),
            "it changes the recovery key, which is set once",
        ),
        (
            lambda run: run.sealing(run.governing(committee=entry([0], recovery=bytes(32)))).commit,
            "it changes the recovery key, which is set once",
        ),
        (of_another_head, "it does not follow record 2"),
        (with_offers, "a record of the recovery key counts no offers"),
    ],
)
def test_a_forged_recovery_is_refused_with_its_reason(
    run: Sealing, make: Callable[[Sealing], Commit], why: str
) -> None:
    with pytest.raises(LedgerCorrupt) as e:
        run.chain.check(make(run))
    assert str(e.value) == f"record 3: {why}"
    assert run.chain.committee.seats == SEATS[:3]
    run.chain.check(recovering(run))
    assert run.chain.committee == Committee.majority(3, SEATS[3:5])


def test_a_run_without_a_recovery_key_gets_one_once(make_genesis: Callable[..., GenesisBody]) -> None:
    run = Sealing(make_genesis().model_copy(update={"coordinator": A}))
    with pytest.raises(LedgerCorrupt, match="record 1: it is signed with a key that is not the run's"):
        run.chain.check(recovering(run))
    run.add(run.governing(committee=entry([0, 1, 2], recovery=digest_of(raw_public(RECOVERY_KEY)))))
    with pytest.raises(LedgerCorrupt, match="record 2: it changes the recovery key"):
        run.add(run.governing(committee=entry([0], recovery=digest_of(raw_public(RECOVERY_KEY)))))
    run.recover(entry([4]))
    run.add(run.body())


def test_a_seat_needs_a_key(run: Sealing) -> None:
    named = entry([0, 1, 2])
    for name in ("a name", "12D3KooW" + "1" * 44):
        seats = (*named.seats[:2], SeatEntry(peer_id=name, addresses=()))
        with pytest.raises(LedgerCorrupt, match=f"record 3: it names a seat without a key, '{name}'"):
            run.add(run.governing(committee=named.model_copy(update={"seats": seats})))


def test_enough_seats_seal_whichever_they_are() -> None:
    for n in range(2, MAX_SEATS + 1):
        committee = Committee.majority(0, SEATS[:n])
        for voters in combinations(committee.seats, committee.need):
            seal = seal_of(committee, RUN, 1, RECORD, voters)
            assert committee.why_not_sealed(RUN, 1, RECORD, seal) is None
            assert not committee.has_sealed(RUN, 1, RECORD, seal_of(committee, RUN, 1, RECORD, voters[1:]))
        everybody = seal_of(committee, RUN, 1, RECORD, committee.seats)
        assert committee.has_sealed(RUN, 1, RECORD, everybody)
        assert len(everybody) <= MAX_SEAL_BYTES


def test_with_three_seats_a_commit_is_at_most_90_bytes_longer(run: Sealing) -> None:
    """As a node gets it, and as its copy keeps it: two of three have voted."""
    for body in (run.body(), run.body(time_ms=2**47, offers=run.body().offers * 9)):
        record = encode_record(body)
        alone = Commit(record=record, signature=KEYS[0].sign(record))
        sealed = run.sealing(body).commit
        assert len(Seal.parse(sealed.signature).votes) == 2
        assert len(sealed.signature) - len(alone.signature) == 74
        assert len(encode_message(sealed)) - len(encode_message(alone)) <= 90


# ----------------------------------------------------------------------------------------- any bytes


@given(st.binary(max_size=MAX_SEAL_BYTES + 70))
@settings(max_examples=300)
def test_any_bytes_are_a_seal_or_a_bad_message(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        assert Seal.parse(data).to_bytes() == data
    assert not THREE.has_sealed(RUN, 6, RECORD, data)


@given(
    ballot=st.integers(0, MAX_BALLOT),
    votes=st.dictionaries(st.integers(0, MAX_SEATS - 1), st.binary(min_size=64, max_size=64), min_size=1),
)
def test_seals_come_back_from_their_bytes(ballot: int, votes: dict[int, bytes]) -> None:
    seal = Seal(ballot, votes)
    assert Seal.parse(seal.to_bytes()) == seal
    assert isinstance(THREE.why_not_sealed(RUN, 6, RECORD, seal.to_bytes()), str)


@given(st.data())
@settings(max_examples=300)
def test_a_changed_seal_is_none(data: st.DataObject) -> None:
    good = seal_of(THREE, RUN, 6, RECORD, data.draw(st.sampled_from([(A, B), (B, C), (A, B, C)])))
    changed = bytearray(good)
    at = data.draw(st.integers(0, len(good) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            changed[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del changed[at : at + data.draw(st.integers(1, 70))]
        case _:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=70))
    # Without the third vote it is a seal all the same.
    is_shorter = len(changed) == 8 + 2 * 65 and len(good) > len(changed)
    assert not THREE.has_sealed(RUN, 6, RECORD, bytes(changed)) or is_shorter


@given(epoch=st.integers(0, 2**32 - 1), ballot=st.integers(0, MAX_BALLOT), seat=st.sampled_from(SEATS[:3]))
def test_ballots_grow_and_have_one_owner(epoch: int, ballot: int, seat: str) -> None:
    committee = Committee.majority(epoch, SEATS[:3])
    with contextlib.suppress(OverflowError):
        above = committee.ballot_above(ballot, seat)
        assert committee.owner(above) == seat
        assert above > ballot or ballot >> 31 > epoch
        assert committee.ballot_above(above, seat) > above
    assert committee.owner(ballot) in (None, *committee.seats)


NAMES = st.sampled_from([*SEATS, "a name", ""])
LISTS = st.tuples(NAMES, st.lists(st.sampled_from(["/ip4/1.2.3.4/tcp/1", ""]), max_size=9))
KEYS_OR_NOT = st.sampled_from([b"", bytes(32), bytes(31), None, "text"])


@given(
    seats=st.lists(LISTS, max_size=9),
    need=st.integers(-1, 9) | st.none(),
    rest=st.lists(KEYS_OR_NOT, max_size=3),
)
@settings(max_examples=400)
def test_any_values_are_a_committee_or_a_bad_message(
    seats: list[tuple[str, list[str]]], need: int | None, rest: list[object]
) -> None:
    packed = msgpack.packb([seats, need, *rest])
    try:
        found = decode_record(CommitteeEntry, packed)
    except BadMessage:
        return
    assert encode_record(found) == packed
    committee = Committee.named(1, found)
    assert len(found.seats) // 2 < committee.need <= len(set(committee.seats)) <= MAX_SEATS


GOVERNING = encode_record(
    CommitBody(
        round=1,
        parent=RUN,
        offers=(),
        admitted=(),
        lr_factor_bits=0,
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=1,
        committee=entry([0, 1, 2], recovery=bytes(32)),
    )
)


@given(at=st.integers(0, len(GOVERNING) - 1), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=400)
def test_a_changed_committee_record_is_read_or_refused_and_never_sealed(
    at: int, flip: int, cut: bool
) -> None:
    changed = bytearray(GOVERNING)
    changed[at] ^= flip
    if cut:
        del changed[at:]
    chain = Chain(RUN, A)
    with pytest.raises(LedgerCorrupt, match=r"^record 1: "):
        chain.check(Commit(record=bytes(changed), signature=KEY_OF[A].sign(GOVERNING)))
    with contextlib.suppress(LedgerCorrupt):  # a founder may sign anything
        chain.check(Commit(record=bytes(changed), signature=KEY_OF[A].sign(bytes(changed))))
        assert all(key_of(seat) is not None for seat in chain.committee.seats)


def test_a_record_of_a_newer_thinwire_says_so() -> None:
    newer = msgpack.packb([*msgpack.unpackb(GOVERNING), [], None, b"new"])
    with pytest.raises(BadMessage, match="CommitBody has 15 fields, not 16: it is of a newer thinwire"):
        decode_record(CommitBody, newer)


def test_sealed_records_come_back() -> None:
    for work in (b"", b"w" * 64):
        sealed = Sealed(record=GOVERNING, seal=bytes(138), work=work)
        assert decode_record(Sealed, encode_record(sealed)) == sealed
