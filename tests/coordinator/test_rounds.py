"""Which offers count: told by a script of events and times, then by generated ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.coordinator.policy import KEPT_ROUNDS
from thinwire.coordinator.rounds import (
    Action,
    BytesArrived,
    Excused,
    OfferKept,
    OfferMade,
    OfferRefused,
    PeerStops,
    PeerTrains,
    RoundClosed,
    RoundEvent,
    RoundOpened,
    Rounds,
    TimePassed,
)


class Prompt(Rounds):
    """Its records are sealed as soon as its rounds close."""

    def handle(self, event: RoundEvent, now_s: float) -> list[Action]:
        actions = super().handle(event, now_s)
        return [*actions, *self.sealed(now_s)] if self.is_closing else actions


def new(**changes: Any) -> Rounds:
    arguments: dict[str, Any] = {
        "n_rounds": 100,
        "min_peers": 2,
        "eval_every": 1000,
        "policy": "deadline",
        "max_offers": 8,
        "head": 0,
        "now_s": 0.0,
    }
    return Prompt(**{**arguments, **changes})


def started(n: int, **changes: Any) -> Rounds:
    rounds = new(min_peers=n, **changes)
    for peer in range(n):
        rounds.handle(PeerTrains(peer), 0.0)
    return rounds


def offer(
    peer: int, round_: int, digest: bytes = b"d", has_bytes: bool = True, n_samples: int = 1
) -> OfferMade:
    return OfferMade(peer, round_, digest, has_bytes, n_samples)


def closed(actions: list[Action]) -> list[tuple[int, tuple[int, ...]]]:
    return [(a.round, a.peers) for a in actions if isinstance(a, RoundClosed)]


def why(actions: list[Action]) -> list[str]:
    return [a.why for a in actions if isinstance(a, RoundClosed)]


def refusals(actions: list[Action]) -> list[str]:
    return [a.reason for a in actions if isinstance(a, OfferRefused)]


def warm(rounds: Rounds, n: int, seconds: float = 1.0) -> float:
    """Three rounds in which everybody took `seconds`; returns the time."""
    now_s = 0.0
    for round_ in (1, 2, 3):
        now_s += seconds
        for peer in range(n):
            rounds.handle(offer(peer, round_), now_s)
    assert rounds.head == 3
    return now_s


def test_rounds_at_a_pace_close_with_what_is_there_and_nobody_is_absent_for_long_work() -> None:
    rounds = started(3, policy="async", every_s=2.0)
    assert rounds.wake_s() is None, "there is nothing to close with"
    assert closed(rounds.handle(TimePassed(), 5.0)) == []
    assert closed(rounds.handle(offer(0, 1), 6.0)) == [(1, (0,))]
    now_s = 6.0
    for round_ in range(2, 8):
        rounds.handle(offer(0, round_), now_s + 0.5)
        assert closed(rounds.handle(offer(1, round_), now_s + 1.0)) == []
        assert rounds.wake_s() == now_s + 2.0
        now_s += 2.0
        actions = rounds.handle(TimePassed(), now_s)
        assert closed(actions) == [(round_, (0, 1))]
        assert [a.expected for a in actions if isinstance(a, RoundOpened)] == [(0, 1, 2)]
    for peer in range(3):
        actions = rounds.handle(offer(peer, 8), now_s + 0.1)
    assert closed(actions) == [(8, (0, 1, 2))], "all are there"


def test_the_first_round_waits_for_min_peers() -> None:
    rounds = new(min_peers=2)
    assert rounds.handle(PeerTrains(0), 0.0) == []
    assert closed(rounds.handle(offer(0, 1), 0.1)) == []
    assert rounds.handle(PeerTrains(1), 1.0) == [RoundOpened(1, (0, 1))]
    assert closed(rounds.handle(offer(1, 1), 2.0)) == [(1, (0, 1))]
    assert rounds.round == 2


def test_a_round_closes_when_everybody_expected_is_in() -> None:
    rounds = started(3)
    assert closed(rounds.handle(offer(2, 1), 1.0)) == []
    assert closed(rounds.handle(offer(0, 1), 1.0)) == []
    actions = rounds.handle(offer(1, 1), 1.5)
    assert closed(actions) == [(1, (0, 1, 2))]
    assert actions[-1] == RoundOpened(2, (0, 1, 2))
    assert next(a for a in actions if isinstance(a, RoundClosed)).duration_s == 1.5
    assert why(actions) == ["complete"]


def test_who_trains_later_is_not_awaited_but_counts() -> None:
    rounds = started(2)
    rounds.handle(PeerTrains(7), 0.5)
    rounds.handle(offer(0, 1), 1.0)
    rounds.handle(offer(7, 1), 1.0)
    actions = rounds.handle(offer(1, 1), 1.0)
    assert closed(actions) == [(1, (0, 1, 7))]
    assert actions[-1] == RoundOpened(2, (0, 1, 7))


def test_an_offer_counts_once_its_bytes_are_here() -> None:
    rounds = started(2)
    rounds.handle(offer(0, 1), 1.0)
    assert closed(rounds.handle(offer(1, 1, b"blob", has_bytes=False), 1.0)) == []
    assert rounds.missing() == [1]
    assert closed(rounds.handle(BytesArrived(b"other"), 1.1)) == []
    assert closed(rounds.handle(BytesArrived(b"blob"), 1.2)) == [(1, (0, 1))]


def test_sending_the_same_offer_again_changes_nothing() -> None:
    rounds = started(2)
    assert rounds.handle(offer(0, 1), 1.0) == [OfferKept(0, True)]
    assert rounds.handle(offer(0, 1), 1.1) == [OfferKept(0, False)]
    rounds.handle(offer(1, 1), 1.2)
    assert rounds.handle(offer(0, 1), 1.3) == [OfferKept(0, False)], "it crossed with the commit"


def test_a_different_offer_is_refused() -> None:
    rounds = started(2)
    rounds.handle(offer(0, 1, b"first"), 1.0)
    assert refusals(rounds.handle(offer(0, 1, b"second"), 1.1)) == ["changed_offer"]


def test_offers_for_other_rounds_are_refused() -> None:
    rounds = started(2)
    assert refusals(rounds.handle(offer(0, 2), 1.0)) == ["wrong_round"]
    now_s = warm(rounds, 2)
    rounds.handle(PeerStops(1), now_s)
    while rounds.head < KEPT_ROUNDS:
        rounds.handle(offer(0, rounds.round), now_s)
    assert refusals(rounds.handle(offer(1, 5), now_s)) == ["late_offer"]
    rounds.handle(offer(0, rounds.round), now_s)
    assert refusals(rounds.handle(offer(1, 1), now_s)) == ["late_offer"], "though nobody remembers that round"


def test_more_offers_than_the_run_allows_are_refused() -> None:
    rounds = started(2, max_offers=3)
    for peer in (5, 6, 7):
        rounds.handle(offer(peer, 1), 1.0)
    assert refusals(rounds.handle(offer(0, 1), 1.0)) == ["too_many_offers"]


def test_a_peer_that_stops_is_not_awaited_but_what_it_offered_counts() -> None:
    rounds = started(3)
    rounds.handle(offer(0, 1), 1.0)
    rounds.handle(offer(1, 1), 1.0)
    rounds.handle(PeerStops(1), 1.1)
    actions = rounds.handle(PeerStops(2), 1.2)
    assert closed(actions) == [(1, (0, 1))]
    assert actions[-1] == RoundOpened(2, (0,))


def test_no_round_is_empty() -> None:
    rounds = started(2)
    rounds.handle(PeerStops(0), 1.0)
    rounds.handle(PeerStops(1), 1.0)
    assert closed(rounds.handle(TimePassed(), 10_000.0)) == []
    assert rounds.wake_s() is None
    assert closed(rounds.handle(offer(5, 1), 10_001.0)) == [(1, (5,))]


def test_an_offer_without_samples_is_not_awaited_and_ends_no_round() -> None:
    rounds = started(3)
    now_s = warm(rounds, 3)
    assert closed(rounds.handle(offer(0, 4, n_samples=0), now_s + 0.1)) == []
    assert rounds.missing() == [1, 2]
    assert rounds.wake_s() is None, "no time runs for the others"
    assert closed(rounds.handle(TimePassed(), now_s + 10_000.0)) == []
    assert closed(rounds.handle(offer(1, 4), now_s + 10_000.0)) == [(4, (0, 1))]


def test_a_round_in_which_nobody_has_samples_ends_when_all_have_said_so() -> None:
    rounds = started(2)
    assert closed(rounds.handle(offer(0, 1, n_samples=0), 1.0)) == []
    assert closed(rounds.handle(offer(1, 1, n_samples=0), 1.0)) == [(1, (0, 1))]


def test_who_does_nothing_quickly_makes_no_deadline_shorter() -> None:
    rounds = started(3)
    now_s = 0.0
    for round_ in range(1, 20):
        rounds.handle(offer(2, round_, n_samples=0), now_s)
        now_s += 1.0
        for peer in (0, 1):
            rounds.handle(offer(peer, round_), now_s)
    rounds.handle(offer(0, 20), now_s + 1.0)
    assert rounds.wake_s() == now_s + 1.5


def test_the_deadline_closes_without_the_slow_one() -> None:
    rounds = started(3)
    now_s = warm(rounds, 3)
    rounds.handle(offer(0, 4), now_s + 1.0)
    rounds.handle(offer(1, 4), now_s + 1.0)
    assert rounds.wake_s() == now_s + 1.5
    assert closed(rounds.handle(TimePassed(), now_s + 1.49)) == []
    actions = rounds.handle(TimePassed(), now_s + 1.5)
    assert closed(actions) == [(4, (0, 1))]
    assert next(a for a in actions if isinstance(a, RoundClosed)).missing == (2,)
    assert why(actions) == ["deadline"]
    assert actions[-1] == RoundOpened(5, (0, 1, 2)), "it is awaited again"


def test_past_the_deadline_the_first_offer_closes() -> None:
    rounds = started(2)
    now_s = warm(rounds, 2)
    assert closed(rounds.handle(TimePassed(), now_s + 50)) == []
    assert closed(rounds.handle(offer(1, 4), now_s + 51)) == [(4, (1,))]


def test_late_offers_move_the_deadline() -> None:
    rounds = started(2)
    now_s = warm(rounds, 2)
    for round_ in range(4, 24):
        rounds.handle(offer(0, round_), now_s + 1.0)
        limit_s = rounds.wake_s()
        if limit_s is None:
            break
        rounds.handle(TimePassed(), min(limit_s, now_s + 3.0))
        late = rounds.handle(offer(1, round_), now_s + 3.0)
        if refusals(late) == []:
            break
        assert refusals(late) == ["late_offer"]
        now_s = now_s + 3.0
    else:
        raise AssertionError("the deadline never grew to the slow peer's three seconds")
    assert round_ > 4


def test_a_late_blob_is_measured_when_it_has_arrived() -> None:
    rounds = started(2)
    now_s = warm(rounds, 2)
    rounds.handle(offer(1, 4, b"late", has_bytes=False), now_s + 1.0)
    rounds.handle(offer(0, 4), now_s + 1.0)
    assert closed(rounds.handle(TimePassed(), now_s + 1.5)) == [(4, (0,))]
    n = len(rounds.times.values(before=100))
    rounds.handle(BytesArrived(b"late"), now_s + 2.0)
    values = rounds.times.values(before=100)
    assert len(values) == n + 1
    assert values[-1] == 2.0


def test_the_fastest_do_not_wait_for_the_others() -> None:
    """Six peers take a second, one two, one four: after the measured rounds six offers are enough."""
    times_s = {**dict.fromkeys(range(6), 1.0), 6: 2.0, 7: 4.0}
    rounds = started(8, policy="fastest")
    now_s, busy_until_s = 0.0, dict.fromkeys(times_s, 0.0)
    works_on = dict.fromkeys(times_s, 1)
    closings, reasons = [], []
    while rounds.head < 20:
        for peer, time_s in times_s.items():  # whoever is idle begins with the open round
            has_work = works_on[peer] <= rounds.head or busy_until_s[peer] == 0.0
            if has_work and busy_until_s[peer] <= now_s:
                works_on[peer], busy_until_s[peer] = rounds.round, now_s + time_s
        now_s = min(s for peer, s in busy_until_s.items() if s > now_s)
        for peer in [peer for peer, s in busy_until_s.items() if s == now_s]:
            actions = rounds.handle(offer(peer, works_on[peer], bytes([peer])), now_s)
            closings += [(a.round, len(a.peers), a.duration_s) for a in actions if isinstance(a, RoundClosed)]
            reasons += why(actions)
            assert refusals(actions) in ([], ["late_offer"])
    assert reasons == ["complete"] * 3 + ["enough"] * 17
    assert closings[:3] == [(r, 8, 4.0) for r in (1, 2, 3)]
    assert {entry[1:] for entry in closings[3:]} == {(6, 1.0)}


def test_the_fastest_are_not_held_up_by_a_hung_one() -> None:
    """Four equal peers, one of which hangs: rounds are as long as the three need, after a while."""
    rounds = started(4, policy="fastest")
    now_s = warm(rounds, 4)
    durations = []
    for round_ in range(4, 40):
        for peer in range(3):
            rounds.handle(offer(peer, round_), now_s + 1.0)
        if rounds.head < round_:
            wake_s = rounds.wake_s()
            assert wake_s is not None
            assert closed(rounds.handle(TimePassed(), wake_s)) == [(round_, (0, 1, 2))]
            durations.append(wake_s - now_s)
            now_s = wake_s
        else:
            durations.append(1.0)
            now_s += 1.0
    assert durations[0] == 1.5
    assert durations[-16:] == [1.0] * 16
    late = rounds.handle(offer(3, rounds.round), now_s)
    assert refusals(late) == [], "it counts when it comes"


def test_an_offer_that_is_rounds_late_is_measured_without_its_payload() -> None:
    rounds = started(2)
    now_s = warm(rounds, 2)
    for round_ in (4, 5):
        rounds.handle(offer(0, round_), now_s + 1.0)
        rounds.handle(TimePassed(), now_s + 1.5)
        now_s += 1.5
    n = len(rounds.times.values(before=100))
    assert refusals(rounds.handle(offer(1, 4, b"late", has_bytes=False), now_s)) == ["late_offer"]
    assert rounds.times.values(before=100)[n - 1 :] == [3.0, 1.0], "of rounds 4 and 5"
    rounds.handle(BytesArrived(b"late"), now_s + 1.0)
    assert rounds.times.values(before=100)[n - 1 :] == [4.0, 1.0]


def test_all_drops_a_hung_trainer_until_it_offers_again() -> None:
    rounds = started(2, policy="all")
    now_s = warm(rounds, 2)
    rounds.handle(offer(0, 4), now_s + 1.0)
    assert closed(rounds.handle(TimePassed(), now_s + 59)) == []
    actions = rounds.handle(TimePassed(), now_s + 60)
    assert closed(actions) == [(4, (0,))]
    assert why(actions) == ["hung"]
    assert actions[-1] == RoundOpened(5, (0,))
    rounds.handle(offer(1, 4), now_s + 61)
    assert rounds.handle(offer(0, 5), now_s + 61)[-1] == RoundOpened(6, (0, 1))


def idle(rounds: Rounds, now_s: float, n: int) -> list[float]:
    """Rounds in which peers 0 and 1 take a second and peer 2 makes no offer: how long they last."""
    durations_s = []
    for _ in range(n):
        opened_s, round_ = now_s, rounds.round
        now_s += 1.0
        actions = rounds.handle(offer(0, round_), now_s) + rounds.handle(offer(1, round_), now_s)
        if not closed(actions):
            wake_s = rounds.wake_s()
            assert wake_s is not None
            now_s = wake_s
            actions = rounds.handle(TimePassed(), now_s)
        assert closed(actions) == [(round_, (0, 1))]
        durations_s.append(now_s - opened_s)
    return durations_s


@pytest.mark.parametrize(("policy", "first_s"), [("deadline", [1.5, 1.5]), ("all", [60.0])])
def test_nobody_waits_for_a_trainer_that_never_offers(policy: str, first_s: list[float]) -> None:
    rounds = started(3, policy=policy)
    now_s = warm(rounds, 3)
    durations_s = idle(rounds, now_s, 10)
    assert durations_s == first_s + [1.0] * (10 - len(first_s))


def test_an_idle_trainer_is_awaited_again_when_it_has_worked_and_not_when_it_comes_back() -> None:
    rounds = started(3)
    now_s = warm(rounds, 3)
    now_s += sum(idle(rounds, now_s, 4))
    for _ in range(3):
        rounds.handle(PeerStops(2), now_s)
        rounds.handle(PeerTrains(2), now_s)
        assert idle(rounds, now_s, 1) == [1.0], "it says that it trains"
        now_s += 1.0
    round_ = rounds.round
    for peer in (2, 0, 1):
        actions = rounds.handle(offer(peer, round_), now_s + 1.0)
    assert closed(actions) == [(round_, (0, 1, 2))], "its offer counts"
    assert actions[-1] == RoundOpened(round_ + 1, (0, 1, 2))
    assert idle(rounds, now_s + 1.0, 3) == [1.5, 1.5, 1.0]


def test_a_late_offer_is_work() -> None:
    """Of a peer that has become slow: it is awaited as the policy says."""
    rounds = started(3)
    now_s = warm(rounds, 3)
    for _ in range(6):
        round_ = rounds.round
        (lasted_s,) = idle(rounds, now_s, 1)
        now_s += lasted_s
        assert 2 in rounds.expected
        assert refusals(rounds.handle(offer(2, round_, has_bytes=False), now_s + 0.1)) == ["late_offer"]


def test_who_is_not_awaited_does_not_evaluate() -> None:
    rounds = started(3, eval_every=1)
    now_s = warm(rounds, 3)
    evaluators = set()
    for _ in range(8):
        opened_s, round_ = now_s, rounds.round
        now_s += 1.0
        actions = rounds.handle(offer(0, round_), now_s) + rounds.handle(offer(1, round_), now_s)
        if not closed(actions):
            now_s = opened_s + 10.0
            actions = rounds.handle(TimePassed(), now_s)
        if round_ > 6:
            evaluators |= {a.evaluator for a in actions if isinstance(a, RoundClosed)}
    assert evaluators == {0, 1}


def test_an_offer_whose_bytes_never_came_is_replaced() -> None:
    rounds = started(1)
    rounds.handle(offer(0, 1, b"before the node died", has_bytes=False), 1.0)
    actions = rounds.handle(offer(0, 1, b"after", has_bytes=True), 2.0)
    assert actions[0] == OfferKept(0, is_new=True), actions
    assert closed(actions) == [(1, (0,))]
    rounds.handle(BytesArrived(b"before the node died"), 3.0)
    assert rounds.head == 1


def test_excused_peers_are_not_awaited_in_that_round_only() -> None:
    rounds = started(2)
    rounds.handle(offer(1, 1, b"never comes", has_bytes=False), 0.5)
    rounds.handle(Excused(1, 1), 0.6)
    actions = rounds.handle(offer(0, 1), 1.0)
    assert closed(actions) == [(1, (0,))]
    assert actions[-1] == RoundOpened(2, (0, 1))
    assert rounds.handle(Excused(1, 7), 1.0) == []
    assert rounds.missing() == [0, 1]


def test_who_is_excused_from_a_round_that_closes_already_is_awaited_in_the_next() -> None:
    """Its record is not sealed yet."""
    rounds = Rounds(
        n_rounds=100, min_peers=2, eval_every=1000, policy="deadline", max_offers=8, head=0, now_s=0.0
    )
    for peer in range(2):
        rounds.handle(PeerTrains(peer), 0.0)
    for peer in range(2):
        rounds.handle(offer(peer, 1), 1.0)
    assert rounds.is_closing
    rounds.handle(Excused(0, 1), 1.1)
    assert rounds.sealed(1.2) == [RoundOpened(2, (0, 1))]


def test_who_is_excused_before_a_round_opens_is_not_awaited_in_it() -> None:
    rounds = new(min_peers=2)
    rounds.handle(PeerTrains(0), 0.0)
    rounds.handle(Excused(0, 1), 0.0)
    assert rounds.handle(PeerTrains(1), 0.0) == [RoundOpened(1, (1,))]
    assert closed(rounds.handle(offer(1, 1), 1.0)) == [(1, (1,))]
    assert rounds.missing() == [0, 1]


def test_the_evaluator_rotates() -> None:
    rounds = started(3, eval_every=2, n_rounds=7)
    seen = {}
    for round_ in range(1, 8):
        assert rounds.missing() == [0, 1, 2]
        for peer in range(3):
            for action in rounds.handle(offer(peer, round_), float(round_)):
                if isinstance(action, RoundClosed):
                    seen[round_] = action.evaluator
    assert seen == {1: None, 2: 0, 3: None, 4: 1, 5: None, 6: 2, 7: 0}
    assert rounds.is_over


def evaluated(late_s: float, n_times: int) -> tuple[Rounds, list[int]]:
    """Two peers, rounds of 1 s, every fourth evaluated. Who evaluated offers so much later in the round after
    next. Returns rounds, and those that closed with one offer."""
    rounds = started(2, eval_every=4, policy="deadline", n_rounds=10**6)
    now_s, evaluators, alone = 0.0, dict[int, int | None](), list[int]()
    while rounds.head < 4 * n_times + 3:
        round_, opened_s = rounds.round, now_s
        late = evaluators.get(round_ - 2)
        due = sorted((opened_s + 1 + (late_s if peer == late else 0), peer) for peer in (0, 1))
        actions: list[Action] = []
        for at_s, peer in due:
            if (wake_s := rounds.wake_s()) is not None and wake_s < at_s:
                actions += rounds.handle(TimePassed(), wake_s)
            actions += rounds.handle(offer(peer, round_), at_s)
        close = next(a for a in actions if isinstance(a, RoundClosed))
        evaluators[round_] = close.evaluator
        alone += [round_] * (len(close.peers) == 1)
        now_s = max(opened_s + close.duration_s, due[0][0])
    return rounds, alone


@pytest.mark.parametrize("late_s", [0.0, 0.4, 0.9])
def test_rounds_do_not_close_without_the_evaluator(late_s: float) -> None:
    """It has offered before it evaluates; the round after next waits as much longer as that usually takes."""
    assert evaluated(late_s, 8)[1] == []


def test_an_evaluation_longer_than_a_round_is_not_awaited() -> None:
    """The others would stand still for longer than its offer is worth: after the first ones they go on."""
    rounds, alone = evaluated(5.0, 8)
    assert alone == [6 + 4 * i for i in range(8) if 6 + 4 * i <= rounds.head]
    assert not rounds.times.is_worth_waiting(rounds.round)


def test_evaluators_skip_who_is_gone() -> None:
    rounds = started(3, eval_every=1)
    rounds.handle(PeerStops(0), 0.1)
    rounds.handle(offer(2, 1), 1.0)
    actions = rounds.handle(offer(1, 1), 1.0)
    assert next(a for a in actions if isinstance(a, RoundClosed)).evaluator == 1


def test_the_run_ends_with_its_last_round() -> None:
    rounds = started(1, n_rounds=1)
    actions = rounds.handle(offer(0, 1), 1.0)
    assert closed(actions) == [(1, (0,))]
    assert not any(isinstance(a, RoundOpened) for a in actions)
    assert rounds.is_over
    assert rounds.wake_s() is None
    assert refusals(rounds.handle(offer(0, 2), 2.0)) == ["wrong_round"]


def test_after_a_restart_the_next_round_is_open_for_the_recalled() -> None:
    rounds = new(head=5, training=(1, 2, 4), evaluator=2, evaluates=2, eval_every=6)
    assert rounds.missing() == [1, 2, 4]
    rounds.handle(offer(1, 6), 1.0)
    rounds.handle(offer(2, 6), 1.0)
    actions = rounds.handle(offer(4, 6), 1.0)
    assert closed(actions) == [(6, (1, 2, 4))]
    assert next(a for a in actions if isinstance(a, RoundClosed)).evaluator == 4


@given(st.lists(st.sampled_from(["round", "back"]), max_size=60), st.sampled_from(["all", "deadline"]))
@settings(max_examples=100)
def test_an_idle_trainer_costs_two_waits_whatever_it_says(script: list[str], policy: str) -> None:
    """Peers 0 and 1 offer in every round; peer 2 only ever says that it trains, again and again."""
    rounds = started(3, policy=policy)
    now_s, n_waits = warm(rounds, 3), 0
    for what in script:
        if what == "back":
            rounds.handle(PeerStops(2), now_s)
            rounds.handle(PeerTrains(2), now_s)
        else:
            (lasted_s,) = idle(rounds, now_s, 1)
            now_s += lasted_s
            n_waits += lasted_s > 1.0
    assert n_waits <= 2


PEERS = st.integers(0, 4)
EVENTS = st.one_of(
    st.builds(PeerTrains, PEERS),
    st.builds(PeerStops, PEERS),
    st.builds(
        lambda p, back, d, b: ("offer", p, back, d, b), PEERS, st.integers(-1, 2), PEERS, st.booleans()
    ),
    st.builds(lambda d: BytesArrived(bytes([d])), PEERS),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 2.0, 30.0, 100.0])),
)


@given(
    st.lists(EVENTS, max_size=120),
    st.sampled_from(["all", "deadline", "fastest"]),
    st.integers(1, 3),
    st.integers(1, 4),
)
@settings(max_examples=200)
def test_any_schedule(script: list[Any], policy: str, min_peers: int, eval_every: int) -> None:
    """One commit per round, none empty, only complete first offers in it; and nothing waits for nobody."""
    rounds = new(policy=policy, min_peers=min_peers, eval_every=eval_every, n_rounds=30)
    again = new(policy=policy, min_peers=min_peers, eval_every=eval_every, n_rounds=30)
    now_s, trains, commits = 0.0, set[int](), 0
    offers: dict[int, bytes] = {}
    complete: set[int] = set()
    for step in script:
        event = step
        if isinstance(step, tuple) and step[0] == "wait":
            now_s += step[1]
            event = TimePassed()
        elif isinstance(step, tuple):
            _, peer, back, digest, has_bytes = step
            event = OfferMade(peer, rounds.round - back, bytes([digest]), has_bytes)
            if back == 0 and not rounds.is_over:
                if peer not in complete:  # one without its bytes may be replaced
                    offers[peer] = event.digest
                complete |= {peer} if has_bytes else set()
        elif isinstance(step, PeerTrains):
            trains.add(step.peer)
        elif isinstance(step, PeerStops):
            trains.discard(step.peer)
        else:
            complete |= {peer for peer, digest in offers.items() if digest == step.digest}
        actions = rounds.handle(event, now_s)
        assert again.handle(event, now_s) == actions, "the same events give the same actions"
        for action in actions:
            if isinstance(action, RoundClosed):
                commits += 1
                assert action.round == commits == rounds.head
                assert action.peers == tuple(sorted(complete))
                assert action.peers
                assert set(action.missing).isdisjoint(action.peers)
                offers, complete = {}, set()
        assert rounds.expected <= trains, "who is gone is not awaited"
        if rounds.opened_s is not None and complete:
            assert rounds.missing(), "all that are awaited are here"
        wake_s = rounds.wake_s()
        assert wake_s is None or wake_s > now_s
    if rounds.is_over or rounds.opened_s is None:
        return
    head = rounds.head
    rounds.handle(OfferMade(9, rounds.round, b"x", True), now_s)
    wakes = list[float]()
    while rounds.head == head:  # it may look again for a limit that is more by then
        wake_s = rounds.wake_s()
        assert wake_s is not None
        rounds.handle(TimePassed(), wake_s)
        wakes.append(wake_s)
    assert len(wakes) <= 2


def test_nobody_waits_for_condemned_peers_nor_takes_their_offers() -> None:
    rounds = started(3, eval_every=1)
    rounds.condemn({1})
    assert refusals(rounds.handle(offer(1, 1), 0.1)) == ["condemned"]
    rounds.handle(offer(0, 1), 0.2)
    assert closed(rounds.handle(offer(2, 1), 0.3)) == [(1, (0, 2))]
    evaluators = set()
    for round_ in range(2, 6):
        rounds.handle(offer(0, round_), round_)
        (end,) = (a for a in rounds.handle(offer(2, round_), round_) if isinstance(a, RoundClosed))
        evaluators.add(end.evaluator)
    assert evaluators == {0, 2}
    rounds.condemn(())
    rounds.handle(offer(0, 6), 6.0)
    assert closed(rounds.handle(offer(2, 6), 6.0)) == [(6, (0, 2))]
    rounds.handle(offer(0, 7), 7.0)
    rounds.handle(offer(2, 7), 7.0)
    assert rounds.missing() == [1], "it is awaited again, from the next round on"
    assert closed(rounds.handle(offer(1, 7), 7.5)) == [(7, (0, 1, 2))]


def test_a_round_in_which_only_condemned_peers_are_missing_closes() -> None:
    rounds = started(3)
    rounds.handle(offer(0, 1), 0.1)
    rounds.handle(offer(2, 1), 0.1)
    assert rounds.missing() == [1]
    rounds.condemn({1})
    assert closed(rounds.handle(TimePassed(), 0.2)) == [(1, (0, 2))]
