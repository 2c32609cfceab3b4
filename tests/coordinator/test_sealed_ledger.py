"""The ledger of a seat: records that its committee has sealed, whoever proposed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.committee import KEYS, SEATS, Sealing, entry
from tests.support.records import OFFER
from thinwire.compression.errors import ConfigError, LedgerCorrupt
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.chain import Forked
from thinwire.coordinator.protocol.messages import Admission, BadMessage, CommitBody, GenesisBody, digest_of
from thinwire.coordinator.protocol.trust.seals import Sealed

WORK, OTHER = b"w" * 64, b"o" * 64


@pytest.fixture
def run(make_genesis: Callable[..., GenesisBody]) -> Sealing:
    """A founder that has admitted a peer, and then made itself one of three."""
    genesis = make_genesis().model_copy(update={"coordinator": SEATS[0]})
    run = Sealing(genesis)
    run.add(run.body(admitted=(admission(0, "a"),), work=digest_of(WORK)), work=WORK)
    run.add(run.governing(committee=entry([0, 1, 2])))
    return run


@pytest.fixture
def ledger(tmp_path: Path, run: Sealing) -> Iterator[Ledger]:
    """Of a seat that has caught up."""
    ledger = Ledger.begin(tmp_path / "ledger.db", run.genesis_record, run.genesis_signature)
    for sealed in run.sealed:
        ledger.take(sealed)
    yield ledger
    ledger.close()


def admission(index: int, peer_id: str, invitation: str = "") -> Admission:
    return Admission(index=index, peer_id=peer_id, invitation=invitation)


def admits(run: Sealing, *admissions: Admission) -> Sealed:
    return run.add(run.body(admitted=admissions))


def test_a_seat_catches_up_from_record_0(tmp_path: Path, run: Sealing, ledger: Ledger) -> None:
    assert (ledger.head_round, ledger.committee.seats) == (2, SEATS[:3])
    assert ledger.seats == entry([0, 1, 2]).seats
    assert ledger.sealed(0, 10) == run.sealed
    assert ledger.sealed(1, 10) == run.sealed[1:]
    assert ledger.sealed(0, 1) == run.sealed[:1]
    assert ledger.peers() == {0: "a"}
    assert ledger.work(digest_of(WORK)) == WORK
    ledger.close()
    for key in KEYS:  # this seat may be named later, by any key
        again = Ledger.open(tmp_path / "ledger.db", key.public_key())
        assert (again.head_round, again.committee, again.peers()) == (2, run.chain.committee, {0: "a"})
        assert again.seats == ledger.seats
        again.close()
    with pytest.raises(ConfigError, match="holds a run already"):
        Ledger.begin(tmp_path / "ledger.db", run.genesis_record, run.genesis_signature)
    with pytest.raises(LedgerCorrupt, match="record 0: its signature is not the coordinator's"):
        Ledger.begin(tmp_path / "other.db", run.genesis_record, KEYS[1].sign(run.genesis_record))


def test_the_founder_s_own_ledger_is_the_founder_s_and_its_seats(
    tmp_path: Path, run: Sealing, make_genesis: Callable[..., GenesisBody]
) -> None:
    path = tmp_path / "ledger.db"
    genesis = make_genesis().model_copy(update={"coordinator": SEATS[0]})
    ledger = Ledger.create(path, genesis, KEYS[0])
    ledger.take(run.sealed[0])
    ledger.close()
    with pytest.raises(LedgerCorrupt, match="record 0: its signature is not this coordinator's"):
        Ledger.open(path, KEYS[1].public_key())
    ledger = Ledger.open(path, KEYS[0].public_key())
    commit = ledger.append(run.sealed[1].commit.body, KEYS[0])
    assert commit == run.sealed[1].commit, "sealed alone, as it always was"
    ledger.close()
    Ledger.open(path, KEYS[2].public_key()).close()


def test_alone_nobody_seals_for_a_committee(run: Sealing, ledger: Ledger) -> None:
    for key, text in (
        (KEYS[0], "a committee of 3 coordinators orders this run, not this one alone"),
        (KEYS[5], "this one has no seat in their committee any more"),
    ):
        with pytest.raises(ConfigError, match=text):
            ledger.append(run.body(), key)
    assert ledger.head_round == 2
    ledger.take(run.add(run.governing(committee=entry([1]))))
    with pytest.raises(ConfigError, match="other coordinators order this run"):
        ledger.append(run.body(), KEYS[0])
    assert ledger.append(run.body(), KEYS[1]).body.round == 4


def test_what_is_not_the_next_sealed_record_is_not_taken(run: Sealing, ledger: Ledger) -> None:
    following = run.add(run.body(work=digest_of(OTHER)), work=OTHER)
    later = run.add(run.body())
    other = Sealing(ledger.genesis)
    for sealed in run.sealed[:2]:
        other.added(sealed)
    other.add(other.body(time_ms=5))
    wrong_parent = other.add(other.body())
    forged = following.model_copy(update={"seal": later.seal})
    for sealed, text in (
        (later, "record 3: its signature is not a majority's"),
        (forged, "record 3: its signature is not a majority's"),
        (following.model_copy(update={"work": b"v" * 64}), "record 3: the signatures beside it are not"),
        (run.sealed[1], "record 3: its signature is not a majority's"),
    ):
        with pytest.raises(LedgerCorrupt, match=text):
            ledger.take(sealed)
        assert (ledger.head_round, ledger.digest_at(3), ledger.sealed(2, 9)) == (2, None, [])
    ledger.take(following.model_copy(update={"work": b""}))
    assert ledger.sealed(2, 9)[0].work == b"", "a seat that was restored from a node has none to pass on"
    with pytest.raises(Forked, match="record 4: it does not follow record 3"):
        ledger.take(wrong_parent)


def test_large_records_come_a_few_at_a_time(run: Sealing, ledger: Ledger) -> None:
    audits = tuple("x" * 90 for _ in range(4096))
    assert len(ledger.sealed(0, 64)) == 2
    for _ in range(4):
        access = {"token": bytes(32), "mode": "listed", "banned": audits, "listed": ()}
        ledger.take(run.add(run.governing(access=access)))
    assert [len(ledger.sealed(after, 64)) for after in (0, 2, 4, 6)] == [4, 2, 2, 0]


def test_admissions_that_nobody_contradicts_stay(run: Sealing, ledger: Ledger) -> None:
    """A leader's own: some come in while its record waits for votes."""
    assert [ledger.admit(name) for name in ("b", "c")] == [1, 2]
    ledger.take(admits(run, admission(1, "b")))
    assert [a.peer_id for a in ledger.pending_admissions()] == ["c"]
    ledger.take(run.add(run.body()))
    assert ledger.admit("d") == 3
    assert ledger.index_of("c") == 2


@pytest.mark.parametrize(
    ("sealed", "peers"),
    [
        ([admission(1, "x")], {1: "x"}),
        ([admission(1, "b"), admission(2, "d")], {1: "b", 2: "d"}),
        ([admission(1, "b", "lab#1")], {1: "b"}),
        ([admission(1, "c"), admission(2, "b")], {1: "c", 2: "b"}),
        ([admission(i + 1, name) for i, name in enumerate("bcde")], dict(enumerate("bcde", 1))),
    ],
)
def test_sealed_admissions_win(
    tmp_path: Path, run: Sealing, ledger: Ledger, sealed: list[Admission], peers: dict[int, str]
) -> None:
    for name, invitation in (("b", ""), ("c", "lab#1"), ("d", "lab#1")):
        ledger.admit(name, invitation)
    ledger.take(admits(run, *sealed))
    assert ledger.peers() == {0: "a", **peers}
    assert (ledger.pending_admissions(), ledger.index_of("zz")) == ((), None)
    assert ledger.invited.uses("lab#1") == sum(a.invitation == "lab#1" for a in sealed)
    ledger.close()
    again = Ledger.open(tmp_path / "ledger.db", KEYS[0].public_key())
    assert (again.peers(), again.pending_admissions()) == ({0: "a", **peers}, ())
    assert again.invited.uses("lab#1") == sum(a.invitation == "lab#1" for a in sealed)
    again.close()


@pytest.mark.parametrize("wrong", [admission(3, "b"), admission(1, "a"), admission(0, "b")])
def test_a_sealed_admission_must_fit(run: Sealing, ledger: Ledger, wrong: Admission) -> None:
    ledger.admit("b")
    with pytest.raises(LedgerCorrupt, match=f"record 3: it admits {wrong.peer_id} as peer {wrong.index}"):
        ledger.take(admits(run, wrong))
    assert (ledger.head_round, ledger.peers()) == (2, {0: "a", 1: "b"})


def test_sealed_records_are_given_back(run: Sealing, ledger: Ledger) -> None:
    lost = [run.add(body) for body in following(run)]
    ledger.adopt([sealed.commit for sealed in lost])
    assert (ledger.head_round, ledger.head_digest) == (run.chain.round, run.chain.digest)
    assert ledger.peers() == {0: "a", 1: "b"}
    few = run.add(run.body())
    with pytest.raises(BadMessage, match="a commit was given back, but record 6: its signature is not"):
        ledger.adopt([few.commit.model_copy(update={"signature": few.seal[: 8 + 65]})])


def following(run: Sealing) -> Iterator[CommitBody]:
    yield run.body(admitted=(admission(1, "b"),))
    yield run.body(committee=entry([0, 1, 2, 3, 4]))
    yield run.body(offers=(OFFER, OFFER.model_copy(update={"peer": 1})))
