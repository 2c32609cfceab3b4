"""Who is joining, training or gone: told by a script of events and times."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.coordinator.membership import (
    RECONNECT_S,
    Became,
    Membership,
    MembershipEvent,
    PeerState,
    SessionClosed,
    SessionOpened,
    SignOfLife,
    StateSaid,
    TimePassed,
)
from thinwire.coordinator.protocol.messages import NodeState

SILENCE_S = 10.0


def new(*recalled: int) -> Membership:
    return Membership(SILENCE_S, frozenset(recalled), 0.0)


def trained(peer: int = 0) -> Membership:
    members = new()
    members.handle(SessionOpened(peer, 1), 0.0)
    members.handle(StateSaid(peer, NodeState.TRAINING), 0.0)
    return members


def states(actions: list[Became]) -> list[PeerState]:
    return [action.state for action in actions]


def test_a_peer_joins_trains_and_leaves() -> None:
    members = new()
    assert states(members.handle(SessionOpened(3, 1), 0.0)) == [PeerState.JOINING]
    assert states(members.handle(StateSaid(3, NodeState.TRAINING), 1.0)) == [PeerState.TRAINING]
    assert members.training() == [3]
    assert members.handle(StateSaid(3, NodeState.TRAINING), 2.0) == []
    assert states(members.handle(StateSaid(3, NodeState.LEAVING), 3.0)) == [PeerState.GONE]
    assert members.alive() == []
    assert members.handle(SignOfLife(3), 4.0) == [], "who has left does not come back by a late heartbeat"


def test_silence_makes_it_gone_and_a_heartbeat_brings_it_back() -> None:
    members = trained()
    assert members.wake_s() == SILENCE_S
    assert members.handle(TimePassed(), SILENCE_S - 0.01) == []
    assert states(members.handle(TimePassed(), SILENCE_S)) == [PeerState.GONE]
    assert members.wake_s() is None
    back = members.handle(SignOfLife(0), 30.0)
    assert states(back) == [PeerState.TRAINING]


def test_heartbeats_keep_it() -> None:
    members = trained()
    for t in range(1, 100):
        assert members.handle(SignOfLife(0), float(t)) == []
    assert members.training() == [0]


def test_a_broken_connection_has_two_seconds() -> None:
    members = trained()
    members.handle(SessionClosed(0, 1), 5.0)
    assert members.training() == [0]
    assert members.wake_s() == 5.0 + RECONNECT_S
    assert states(members.handle(TimePassed(), 5.0 + RECONNECT_S)) == [PeerState.GONE]


def test_who_comes_back_in_time_goes_on() -> None:
    members = trained()
    members.handle(SessionClosed(0, 1), 5.0)
    assert members.handle(SessionOpened(0, 2), 6.0) == []
    assert members.handle(StateSaid(0, NodeState.TRAINING), 6.1) == []
    assert members.handle(TimePassed(), 6.1 + RECONNECT_S) == []
    assert members.training() == [0]


def test_who_comes_back_without_saying_that_it_trains_is_not_awaited() -> None:
    members = trained()
    members.handle(SessionOpened(0, 2), 6.0)
    assert members.wake_s() == 6.0 + RECONNECT_S
    assert states(members.handle(TimePassed(), 6.0 + RECONNECT_S)) == [PeerState.JOINING]


def test_the_end_of_an_old_session_is_no_news() -> None:
    members = trained()
    members.handle(SessionOpened(0, 2), 1.0)
    members.handle(StateSaid(0, NodeState.TRAINING), 1.0)
    members.handle(SessionClosed(0, 1), 2.0)
    assert members.handle(TimePassed(), 5.0) == []
    assert members.is_current(0, 2)
    assert not members.is_current(0, 1)
    assert not members.is_newer(0, 2)
    assert members.is_newer(0, 3)


def test_recalled_peers_stay_expected_for_a_while() -> None:
    members = new(1, 2)
    assert members.training() == [1, 2]
    assert members.connected() == []
    members.handle(SessionOpened(1, 1), 3.0)
    members.handle(StateSaid(1, NodeState.TRAINING), 3.0)
    gone = members.handle(TimePassed(), SILENCE_S)
    assert [(action.peer, action.state) for action in gone] == [(2, PeerState.GONE)]
    assert members.training() == [1]


def test_a_recalled_peer_that_never_comes_back_has_trained() -> None:
    members = new(0)
    members.handle(TimePassed(), SILENCE_S)
    assert members.state(0) is PeerState.GONE
    assert members.takes_part(0)


def test_who_could_not_be_heard_while_the_coordinator_stood_still_is_not_gone() -> None:
    members = new(2)
    for peer in (0, 1):
        members.handle(SessionOpened(peer, 1), 0.0)
        members.handle(StateSaid(peer, NodeState.TRAINING), 0.0)
    back_s = SILENCE_S + 5.0
    assert members.handle(SignOfLife(0), back_s) == []
    assert members.training() == [0, 1, 2]
    assert members.wake_s() == back_s + RECONNECT_S
    gone = members.handle(TimePassed(), back_s + RECONNECT_S)
    assert [(action.peer, action.cause) for action in gone] == [(1, "silent"), (2, "connection_lost")]
    assert members.training() == [0]


PEERS = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["open", "close", "life"]), PEERS, st.none()),
    st.tuples(st.just("say"), PEERS, st.sampled_from(NodeState)),
    st.tuples(
        st.sampled_from(["wait", "stall"]), st.just(0), st.sampled_from([0.1, 1.0, 1.9, 2.0, 5.0, 11.0])
    ),
)


@given(st.lists(STEPS, max_size=60), st.frozensets(PEERS))
@settings(max_examples=150)
def test_any_schedule(script: list[tuple[str, int, Any]], recalled: frozenset[int]) -> None:
    """Nobody is alive for longer than the rules give, and every change is told exactly once. In a stall
    nobody looks: there is some time more then."""
    members, now_s, sessions = Membership(SILENCE_S, recalled, 0.0), 0.0, [0, 0, 0]
    spared_s = 0.0
    told = {p: PeerState.TRAINING if p in recalled else PeerState.GONE for p in range(3)}
    opened, heard_s, closed_s = set[int](), [0.0] * 3, [0.0] * 3
    for what, peer, extra in script:
        if peer not in opened and what in ("close", "say", "life"):
            continue
        event: MembershipEvent = TimePassed()
        match what:
            case "wait":
                end_s = now_s + extra
                while (wake_s := members.wake_s()) is not None and wake_s < end_s:
                    for action in members.handle(event, wake_s):
                        told[action.peer] = action.state
                now_s = end_s
            case "stall":
                now_s += extra
                spared_s = now_s + RECONNECT_S
            case "open":
                sessions[peer] += 1
                event = SessionOpened(peer, sessions[peer])
                opened.add(peer)
            case "close":
                event = SessionClosed(peer, sessions[peer])
                opened.discard(peer)
                closed_s[peer] = now_s
            case "say":
                event = StateSaid(peer, extra)
            case "life":
                event = SignOfLife(peer)
        if what in ("open", "say", "life"):
            heard_s[peer] = now_s
        for action in members.handle(event, now_s):
            assert told[action.peer] is not action.state
            told[action.peer] = action.state
        assert told == {p: members.state(p) for p in range(3)}
        for p in members.alive():
            grace_s = RECONNECT_S if sessions[p] else SILENCE_S
            assert now_s < max(spared_s, heard_s[p] + SILENCE_S if p in opened else closed_s[p] + grace_s)
        wake_s = members.wake_s()
        assert (wake_s is None) == (not members.alive())
        assert wake_s is None or wake_s > now_s
        assert members.connected() == sorted(opened)


def test_who_only_reads_or_never_trained_takes_no_part() -> None:
    members = Membership(SILENCE_S, frozenset(), 0.0)
    members.handle(SessionOpened(0, 1, is_reader=True), 0.0)
    members.handle(SessionOpened(1, 1), 0.0)
    members.handle(SessionOpened(2, 1), 0.0)
    assert [members.takes_part(peer) for peer in range(4)] == [False, True, True, False]
    members.handle(StateSaid(1, NodeState.TRAINING), 1.0)
    for peer in (1, 2):
        members.handle(StateSaid(peer, NodeState.LEAVING), 2.0)
    assert [members.takes_part(peer) for peer in range(4)] == [False, True, False, False]
