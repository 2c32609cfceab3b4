"""Auditors' reports at the coordinator: which ones it takes, and what becomes of condemned peers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.support.service_world import MakeWorld, World, offer
from thinwire.coordinator.protocol.messages import Audit, BadMessage, CommitBody, Notice, Verdict
from thinwire.coordinator.protocol.trust.drawing import Draw
from thinwire.coordinator.protocol.trust.judging import REPORT_ROUNDS
from thinwire.coordinator.protocol.trust.signatures import NOT_SIGNED
from thinwire.coordinator.protocol.trust.standing import Standing

NAMES = ("a", "b", "c", "d", "e", "f")
FAILED = Verdict.FAILED


def audited(make_world: MakeWorld, rules: Mapping[str, object] = {}, **config: object) -> World:
    audits = {"rate": 1.0, "failures": 1, "window_rounds": 30, **rules}
    world = make_world(min_peers=len(NAMES), rounds=10_000, eval_every=0, audits=audits, **config)
    world.train(*NAMES)
    return world


def standing(world: World) -> Standing:
    """What anybody makes of the ledger."""
    found = Standing(world.ledger.run_id, world.service.course.settings.audits)
    for commit in world.service.commits(0, 10_000):
        found.committed(commit.body, commit.digest)
    return found


def play(world: World, *absent: str) -> CommitBody:
    """The next round."""
    round_ = world.service.head + 1
    world.round(round_, *(name for name in NAMES if name not in absent))
    assert world.service.head == round_
    return world.service.commits(round_ - 1, 1)[0].body


def drawn(world: World, target: int) -> Draw:
    for _ in range(500):
        play(world)
        for draw in standing(world).drawn(world.service.head):
            if draw.target == target and not draw.for_suspects:
                return draw
    raise AssertionError("never drawn")


def report(round_: int, target: int, verdict: Verdict = FAILED, signature: bytes = NOT_SIGNED) -> Audit:
    return Audit(round=round_, target=target, verdict=verdict, signature=signature)


def test_reports_of_auditors_go_into_the_next_commit_in_order(make_world: MakeWorld) -> None:
    world = audited(make_world)
    draw, round_ = drawn(world, 1), world.service.head
    for auditor in reversed(draw.auditors):
        world.say(NAMES[auditor], report(round_, 1, Verdict.PASSED))
        world.say(NAMES[auditor], report(round_, 1, FAILED))  # the first word stands
    body = play(world)
    assert [(a.round, a.target, a.auditor, a.verdict) for a in body.audits] == [
        (round_, 1, auditor, Verdict.PASSED) for auditor in draw.auditors
    ]
    assert play(world).audits == ()
    for auditor in draw.auditors:  # again, as after a reconnect
        world.say(NAMES[auditor], report(round_, 1, Verdict.PASSED))
    assert play(world).audits == ()
    assert world.status()["rejected"] == {}
    assert standing(world).audited(1) == (1, 0)


def test_reports_that_nobody_asked_for_are_counted(make_world: MakeWorld) -> None:
    world = audited(make_world)
    draw, round_ = drawn(world, 1), world.service.head
    auditor = NAMES[draw.auditors[0]]
    with pytest.raises(BadMessage, match="to come"):
        world.say(auditor, report(round_ + 1, 1))
    world.say(NAMES[1], report(round_, 1))  # on itself
    world.say(auditor, report(round_, 60_000))
    world.say(auditor, report(round_, 1, signature=bytes([1] * 64)))
    world.say(auditor, report(round_, 1))  # after a wrong signature none is looked at
    assert play(world).audits == ()
    assert world.status()["rejected"] == {"audit": 4, "report_round": 1}


def test_late_reports_change_nothing(make_world: MakeWorld) -> None:
    world = audited(make_world)
    draw, round_ = drawn(world, 1), world.service.head
    for _ in range(REPORT_ROUNDS):
        play(world)
    world.say(NAMES[draw.auditors[0]], report(round_, 1))
    assert play(world).audits == ()
    assert world.status()["rejected"] == {}


def condemn(world: World, target: int) -> int:
    """The round whose record says so."""
    draw, round_ = drawn(world, target), world.service.head
    for auditor in draw.auditors:
        world.say(NAMES[auditor], report(round_, target))
    play(world)
    return world.service.head


def test_a_condemned_peer_is_told_and_not_awaited_until_its_term_is_over(make_world: MakeWorld) -> None:
    world = audited(make_world)
    last = condemn(world, 1) + 30
    told = [notice.text for notice in world.messages(Notice, to="b") if notice.warning]
    assert len(told) == 1
    assert f"up to round {last} they do not count" in told[0]
    assert not [notice for notice in world.messages(Notice, to="a") if notice.warning]
    # Its offers are refused, and a round closes without it.
    world.say("b", offer(world.service.head + 1))
    assert world.status()["rejected"] == {"condemned": 1}
    assert 1 not in [o.peer for o in play(world, "b").offers]
    happened = [h["text"] for h in world.service.overview(world.now_s)["happenings"]]
    assert any(f"b: its offers up to round {last} do not count" in text for text in happened)
    # A restart knows it from the ledger.
    world.restart()
    world.train(*NAMES)
    assert 1 not in [o.peer for o in play(world, "b").offers]
    while world.service.head < last:
        play(world, "b")
    assert world.messages(Notice, to="b")[-1].text == "this node's term is over: its offers count again"
    assert 1 in [o.peer for o in play(world).offers]
    assert standing(world).condemned_in(last) == {1}
    assert standing(world).condemned_in(last + 1) == frozenset()


def test_whose_audit_has_failed_is_told_what_its_offers_weigh(make_world: MakeWorld) -> None:
    world = audited(make_world, {"failures": 2, "newcomers_rate": 1.0, "newcomers_budget": 10.0})
    condemn(world, 1)
    (told,) = [notice.text for notice in world.messages(Notice, to="b") if notice.warning]
    assert "they weigh nothing until an audit passes" in told
    assert standing(world).has_failed_in(1, world.service.head + 1)
    last = condemn(world, 1) + 30
    while world.service.head < last:
        play(world, "b")
    assert world.messages(Notice, to="b")[-1].text.endswith("taken again, and count once an audit has passed")


def test_what_condemned_peers_report_is_not_taken_up(make_world: MakeWorld) -> None:
    world = audited(make_world)
    for _ in range(REPORT_ROUNDS // 2):
        play(world)
    condemn(world, 1)
    # Drawn before its term, reported within it.
    found = [
        (round_, draw.target)
        for round_ in range(world.service.head - REPORT_ROUNDS + 1, world.service.head)
        for draw in standing(world).drawn(round_)
        if 1 in draw.auditors
    ]
    assert found
    for round_, target in found:
        world.say("b", report(round_, target))
    assert play(world, "b").audits == ()
