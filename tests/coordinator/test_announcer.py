"""Who is told what of the members: all of them once, then what has changed, and not too often."""

from __future__ import annotations

from collections import defaultdict

from thinwire.coordinator.announcer import FEW, Announcer
from thinwire.coordinator.membership import Membership, SessionClosed, SessionOpened
from thinwire.coordinator.protocol.messages import Member, Members, Message, decode_message, encode_message
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
