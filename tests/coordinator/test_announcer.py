"""Who is told what of the members: all of them once, then what has changed, and not too often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

from thinwire.coordinator.announcer import FEW, Announcer
from thinwire.coordinator.membership import Membership, SessionClosed, SessionOpened, StateSaid
from thinwire.coordinator.protocol.messages import (
    Member,
    Members,
    Message,
    NodeState,
    Offer,
    Offered,
    decode_message,
    encode_message,
)
from thinwire.coordinator.serving.fanout import Fanout
from thinwire.node.links.members import MemberList


class Swarm:
    """Peers that hear an announcer, each with its own list; every message over the wire."""

    def __init__(self) -> None:
        self.members, self.sent = Membership(10.0, frozenset(), 0.0), defaultdict[str, list[Members]](list)
        self.lists = defaultdict[str, MemberList](MemberList)
        self.announcer = Announcer(self.send, "p{}".format, "c", Fanout())
        self.n_bytes = 0

    def send(self, peer_id: str, message: Message) -> None:
        said = decode_message(encode_message(message))
        assert isinstance(said, Members)
        self.sent[peer_id].append(said)
        self.lists[peer_id].heard(said)
        self.n_bytes += len(message.encoded)

    def come(self, peer: int, now_s: float, session: int = 1) -> None:
        self.members.handle(SessionOpened(peer, session), now_s)
        self.announcer.opened(peer, (f"/ip4/192.0.2.1/tcp/{peer + 1}",))
        self.announcer.tell(self.members, dict, now_s)

    def go(self, peer: int, now_s: float) -> None:
        self.members.handle(SessionClosed(peer, 1), now_s)
        self.announcer.tell(self.members, dict, now_s)

    def agree(self) -> None:
        present = [f"p{peer}" for peer in self.members.connected()]
        for peer_id in present:
            assert sorted(self.lists[peer_id].connected()) == sorted(present)
            assert self.lists[peer_id].addresses("p1") == ("/ip4/192.0.2.1/tcp/2",)


def test_everybody_knows_everybody_and_hears_what_has_changed() -> None:
    swarm = Swarm()
    for peer in range(8):
        swarm.come(peer, float(peer))
    swarm.agree()
    assert swarm.sent["p0"][-1] == Members(
        members=(Member(peer_id="p7", addresses=("/ip4/192.0.2.1/tcp/8",)),), is_change=True
    )
    swarm.go(4, 10.0)
    swarm.agree()
    assert swarm.sent["p0"][-1] == Members(members=(), left=("p4",), is_change=True)
    swarm.come(4, 11.0, session=2)
    swarm.agree()
    assert not swarm.sent["p4"][-1].is_change


def test_of_many_who_come_one_after_the_other_is_told_together() -> None:
    swarm, n = Swarm(), 4 * FEW
    for peer in range(n):
        swarm.come(peer, peer / 1000)
    assert swarm.announcer.next_s is not None
    swarm.announcer.tell(swarm.members, dict, swarm.announcer.next_s)
    swarm.agree()
    assert swarm.announcer.next_s is None
    entry = len(encode_message(Members(members=(Member(peer_id="p1", addresses=("/ip4/192.0.2.1/tcp/2",)),))))
    assert swarm.n_bytes < 2 * entry * n * n  # a list for each of them, and each of them for everybody


def test_two_messages_that_wait_become_one() -> None:
    a, b, c = (Member(peer_id=name, addresses=(name,)) for name in "abc")
    moved = Member(peer_id="a", addresses=("x",))
    both = Members(members=(a, b)).then(Members(members=(c, moved), left=("b",), is_change=True))
    assert both == Members(members=(moved, c))
    change = Members(members=(b,), left=("a",), is_change=True)
    assert change.then(Members(members=(a,), left=("b",), is_change=True)) == Members(
        members=(a,), left=("b",), is_change=True
    )
    assert change.then(both) == both


def test_copies_come_from_those_that_can_be_dialled() -> None:
    """Public addresses before private ones, where anybody has one; a circuit through others is none."""
    sent: list[tuple[str, Offered]] = []
    fanout = Fanout(1.0)
    for peer in range(4):
        fanout.uploaded(f"p{peer}", 10**9, 1.0)
    members = Membership(10.0, frozenset(), 0.0)

    def send(peer_id: str, message: Message) -> None:
        if isinstance(message, Offered):
            sent.append((peer_id, message))

    announcer = Announcer(send, "p{}".format, "c", fanout)

    def holders(*addresses: str) -> set[str]:
        sent.clear()
        for peer, address in enumerate(addresses):
            members.handle(SessionOpened(peer, 1), 0.0)
            members.handle(StateSaid(peer, NodeState.TRAINING), 0.0)
            announcer.opened(peer, (address,))
        offer = Offer(
            round=1, n_samples=1, n_tokens=1, loss=1.0, n_bytes=10**6, payload=None, digest=bytes(32)
        )
        announcer.tell_offered(0, offer, members)
        assert sorted(peer_id for peer_id, _ in sent) == ["p1", "p2", "p3"]
        return {said.holder for _, said in sent}

    circuit = "/ip4/8.8.4.4/tcp/1/p2p/x/p2p-circuit"
    private = "/ip4/10.0.0.1/tcp/1"
    assert holders(private, private, private, private) == {"p0"}
    assert holders(circuit, private, private, circuit) <= {"c", "p1", "p2"}
    assert holders(private, private, "/ip4/8.8.8.8/tcp/1", private) == {"c", "p2"}
    assert holders(circuit, circuit, circuit, circuit) == {"c"}


class Dealing:
    """Rounds of five peers with wide lines, and a coordinator with a narrow one."""

    def __init__(self) -> None:
        self.fanout, self.members = Fanout(1.0), Membership(10.0, frozenset(), 0.0)
        self.announcer = Announcer(self._send, "p{}".format, "c", self.fanout)
        self._said: list[tuple[str, Offered]] = []
        for peer in range(5):
            self.fanout.uploaded(f"p{peer}", 10**9, 1.0)
            self.members.handle(SessionOpened(peer, 1), 0.0)
            self.members.handle(StateSaid(peer, NodeState.TRAINING), 0.0)
            self.announcer.opened(peer, (f"/ip4/192.0.2.1/tcp/{peer + 1}",))

    def _send(self, peer_id: str, message: Message) -> None:
        if isinstance(message, Offered):
            self._said.append((peer_id, message))

    def round(self, fails: Callable[[str, str], bool]) -> set[str]:
        """Who was to give anything. `fails`: whether the copy for the one is asked for, and not had from the
        other."""
        self._said.clear()
        for peer in range(5):
            offer = Offer(
                round=1,
                n_samples=1,
                n_tokens=1,
                loss=1.0,
                n_bytes=10**6,
                payload=None,
                digest=bytes([peer] * 32),
            )
            self.announcer.tell_offered(peer, offer, self.members)
        self.fanout.round_took(1.0)
        for peer_id, said in self._said:
            if fails(peer_id, said.holder):
                self.fanout.deliveries.asked(peer_id, said.digest)
        return {said.holder for _, said in self._said} - {"c"}


def test_who_does_not_give_what_it_was_to_is_left_out_for_a_while() -> None:
    dealing = Dealing()
    gave = [dealing.round(lambda _, holder: holder == "p1") for _ in range(30)]
    assert "p1" in gave[0]
    of_p1 = [i for i, givers in enumerate(gave) if "p1" in givers]
    assert len(of_p1) < 10, "it is tried again, and ever less often"
    assert all(givers >= {"p0", "p2", "p3", "p4"} for givers in gave)
    assert any("p1" in dealing.round(lambda *_: False) for _ in range(40)), "it may come back"
    assert all("p1" in dealing.round(lambda *_: False) for _ in range(20))


@pytest.mark.parametrize("liar", ["p2", None])
def test_nobody_is_left_out_on_the_word_of_one_or_where_all_are_slow(liar: str | None) -> None:
    dealing = Dealing()
    gave = [dealing.round(lambda peer, _: liar in (peer, None)) for _ in range(20)]
    assert all(len(givers) == 5 for givers in gave)
