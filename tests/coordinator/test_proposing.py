"""A service whose records take their time until they are sealed, as those of a committee do."""

from __future__ import annotations

import pytest

from tests.support.service_world import MakeWorld, World, offer
from tests.support.slow_log import SlowLog
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.protocol.messages import Change, NodeState, Notice, State


def slow(make_world: MakeWorld, **config: int) -> tuple[World, SlowLog]:
    world = make_world(**config)
    log = SlowLog(world)
    world.start(log=log)
    world.train("a", "b")
    world.round(1, "a", "b")
    return world, log


def test_nothing_happens_twice_while_a_record_waits_for_its_seal(make_world: MakeWorld) -> None:
    world, log = slow(make_world)
    world.say("a", offer(1))  # sent again
    world.train("c")
    world.say("c", offer(1, b"too late"))
    world.wait(10.0, "a", "b", "c")
    assert [body.round for body, _ in log.proposed] == [1]
    assert [o.peer for o in log.proposed[0][0].offers] == [0, 1]
    assert (world.service.head, world.service.proposed, world.committed) == (0, 1, [])
    assert world.status()["round"] == 0
    assert "to sign its record" in world.messages(Notice, "a")[-1].text
    world.round(2, "a", "b")  # nobody can know that round 2 is open
    assert world.status()["rejected"] == {"late_offer": 1, "wrong_round": 2}
    log.seal(world.now_s)
    assert (world.service.head, world.service.proposed, world.committed) == (1, None, [1])
    for peer in "abc":
        world.say(peer, offer(2, peer.encode()))
    assert [o.peer for o in log.proposed[0][0].offers] == [0, 1, 2]
    assert world.status()["timed_rounds"] == 1
    log.seal(world.now_s)
    assert world.ledger.pending_admissions() == ()


def test_a_run_is_over_once_its_last_record_is_sealed(make_world: MakeWorld) -> None:
    world, log = slow(make_world, rounds=1)
    assert not world.service.is_over
    world.wait(70.0, "a", "b")
    assert not world.service.finished
    log.seal(world.now_s)
    world.service.tick(world.now_s)
    assert world.service.is_over
    assert not world.service.finished, "nobody has said that it has the last record"
    world.wait(60.0, "a", "b")
    assert world.service.finished


def test_an_order_waits_for_the_record_that_is_open(make_world: MakeWorld) -> None:
    world, log = slow(make_world)
    change = Change(key="schedule.warmup_rounds", value=3)
    ordered = world.service.order(Order(what="set", changes=(change,)), world.now_s)
    assert ordered.round == 2
    assert len(log.proposed) == 1
    assert log.proposed[0][0].changes == ()
    log.seal(world.now_s)
    world.service.tick(world.now_s)
    assert log.proposed == [], "it goes with the record that closes round 2"
    world.round(2, "a", "b")
    assert log.proposed[0][0].changes == (change,)


def test_an_order_after_the_last_round_goes_alone(make_world: MakeWorld) -> None:
    world, log = slow(make_world, rounds=1)
    ordered = world.service.order(Order(what="extend", rounds=2), world.now_s)
    assert (ordered.round, ordered.told) == (2, ("run.rounds 1 -> 4",))
    log.seal(world.now_s)
    world.service.tick(world.now_s)
    assert [(body.round, body.offers) for body, _ in log.proposed] == [(2, ())]
    world.service.tick(world.now_s)
    log.seal(world.now_s)
    assert not world.service.is_over
    world.round(3, "a", "b")
    assert [body.round for body, _ in log.proposed] == [3]


def test_a_pause_waits_for_its_seal(make_world: MakeWorld) -> None:
    world, log = slow(make_world)
    log.seal(world.now_s)
    for peer in "ab":
        world.say(peer, State(state=NodeState.JOINING))
    world.service.order(Order(what="pause"), world.now_s)
    assert world.status()["state"] == "training"
    log.seal(world.now_s)
    assert world.status()["state"] == "paused"
    with pytest.raises(ValueError, match="nothing was proposed"):
        log.on_sealed(world.ledger.commits(0, 1)[0], world.now_s)
