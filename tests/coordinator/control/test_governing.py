"""Records that say who orders a run, and who may come in."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.committee import SEATS, entry
from tests.support.service_world import MakeWorld, World
from tests.support.slow_log import SlowLog
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.control.orders import Order, no_strategy
from thinwire.coordinator.control.owner import write_order
from thinwire.coordinator.entry.rules import EntryRules
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.messages import CommitteeEntry, Reseated, SeatEntry, digest_of
from thinwire.coordinator.state import StateDir

BANNED, OTHER = sorted(SEATS[4:6])


def founder(world: World, *others: int) -> CommitteeEntry:
    """The run's founder, and these."""
    first = SeatEntry(peer_id=world.ledger.genesis.coordinator, addresses=("/ip4/127.0.0.1/tcp/9",))
    seats = (first, *(seat for seat in (entry(others).seats if others else ())))
    return CommitteeEntry(seats=seats, need=len(seats) // 2 + 1)


def test_a_committee_is_named_with_the_open_round(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    committee = founder(world, 1, 2)
    ordered = world.service.name_committee(committee, world.now_s)
    assert ordered.round == 1
    assert "2 of 3 must sign" in ordered.told[0]
    assert world.service.head == 0
    world.round(1, "a", "b")
    body = world.ledger.commits(0, 1)[0].body
    assert ordered.is_in(body)
    assert (len(body.offers), body.committee) == (2, committee)
    assert body.access is not None
    assert (body.access.token, body.access.mode) == (digest_of(b"secret"), "open")
    world.round(2, "a", "b")
    world.wait(100.0, "a", "b")
    assert world.service.head == 1, "the reign of one has ended"
    with pytest.raises(ConfigError, match="does not lead any more"):
        world.service.order(Order(what="pause"), world.now_s)
    world.restart()
    world.sessions.clear()
    world.train("a", "b")
    world.round(2, "a", "b")
    assert world.service.head == 1, "nor does it begin again"


def test_a_committee_is_named_alone_where_nobody_works(make_world: MakeWorld) -> None:
    world = make_world()
    world.service.name_committee(founder(world, 1, 2), world.now_s)
    assert world.service.head == 1
    assert world.ledger.committee.seats[1:] == SEATS[1:3]


def test_what_followers_would_refuse_is_refused(make_world: MakeWorld) -> None:
    world = make_world()
    for strange, text in (
        (entry([1, 2, 3]), "step by step"),
        (entry([1], recovered_with=b"r" * 32), "recovery"),
    ):
        with pytest.raises(ConfigError, match=text):
            world.service.name_committee(strange, world.now_s)
    with pytest.raises(ConfigError, match="no seat"):
        world.service.reseat(SEATS[1], bytes(16), world.now_s)
    assert world.service.head == 0


def test_a_seat_that_rests_is_named_by_itself_in_a_new_epoch(make_world: MakeWorld) -> None:
    world = make_world()
    log = SlowLog(world)
    world.start(log=log)
    committee = founder(world)
    world.service.name_committee(committee.model_copy(update={"recovery": b"r" * 32}), world.now_s)
    log.seal(world.now_s)
    seat = committee.seats[0].peer_id
    log.resting = {seat: b"n" * 16}
    for _ in range(3):
        world.service.tick(world.now_s)
    (body, _), *more = log.proposed
    assert not more
    assert body.reseat == (Reseated(seat=seat, nonce=b"n" * 16),)
    assert body.committee == committee, "the ballots of the epoch that it has forgotten are void"
    log.resting = {}
    log.seal(world.now_s)
    world.service.reseat(seat, bytes(16), world.now_s)
    assert log.proposed[0][0].reseat == (Reseated(seat=seat, nonce=bytes(16)),)


def test_who_may_come_in_is_the_ledger_s_matter_once_it_tells(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.service.guard(frozenset([OTHER]), "secret", ("told",), world.now_s).is_done
    assert world.service.head == 0
    world.service.name_committee(founder(world), world.now_s)
    banned = frozenset([OTHER, BANNED])
    ordered = world.service.guard(banned, "new", ("told",), world.now_s, EntryRules.of("invited", ()))
    assert not ordered.is_done
    assert ordered.is_in(world.ledger.commits(ordered.round - 1, 1)[0].body)
    for token, rules in (("secret", EntryRules()), ("x", EntryRules.of("listed", [BANNED]))):
        world.restart(banned=frozenset(), rules=rules)
        world.service._token = token
        with pytest.raises(ConfigError, match="banned"):
            world.open(BANNED, token="new")
        with pytest.raises(ConfigError, match="takes invited peers only"):
            world.open("c", token="secret")
        assert world.status()["admission"] == {"mode": "invited", "banned": [BANNED, OTHER]}
    world.service.check_looker("new")
    with pytest.raises(ConfigError, match="token is wrong"):
        world.service.check_looker("secret")


def test_what_is_banned_while_a_record_waits_stays_banned(make_world: MakeWorld) -> None:
    world = make_world()
    log = SlowLog(world)
    world.start(log=log)
    world.service.name_committee(founder(world), world.now_s)
    world.service.guard(frozenset([BANNED]), "secret", (), world.now_s)
    log.seal(world.now_s)
    with pytest.raises(ConfigError, match="banned"):
        world.open(BANNED)
    world.service.tick(world.now_s)
    access = log.proposed[0][0].access
    assert access is not None
    assert access.banned == (BANNED,)
    too_many = frozenset(str(i) for i in range(5000))
    with pytest.raises(ConfigError, match="room for 4096"):
        world.service.guard(too_many, "secret", (), world.now_s)


def test_an_order_without_a_coordinator_goes_where_the_ledger_tells(
    tmp_path: Path, make_world: MakeWorld, key: Ed25519PrivateKey
) -> None:
    world = make_world()
    world.service.name_committee(founder(world), world.now_s)
    folder = tmp_path / "state"
    with StateDir(folder) as state:
        save(key, state.key_path)
        world.ledger.close()
        (world.path / "ledger.db").rename(state.ledger_path)
    answer = write_order(folder, Order(what="ban", peers=(BANNED,)), no_strategy)
    assert (answer.what, answer.round) == ("done", 2)
    answer = write_order(folder, Order(what="rotate-token"), no_strategy)
    with StateDir(folder) as state:
        world.ledger = Ledger.open(state.ledger_path, key.public_key())
        accesses = [commit.body.access for commit in world.ledger.all_commits()]
        assert [a is not None and a.banned for a in accesses] == [(), (BANNED,), (BANNED,)]
        assert accesses[-1] is not None
        assert accesses[-1].token == digest_of(state.token().encode())
    world.ledger.close()
    write_order(folder, Order(what="listed", peers=(OTHER,)), no_strategy)
    with StateDir(folder) as state:
        world.ledger = Ledger.open(state.ledger_path, key.public_key())
        (listed,) = world.ledger.commits(3, 9)
        assert listed.body.access == accesses[-1].model_copy(update={"mode": "listed", "listed": (OTHER,)})
    assert world.ledger.committee.is_only(world.ledger.genesis.coordinator)
