"""Who is joining, training or gone: a pure state machine. Peers are named by their index, time is given."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush
from typing import Literal

from .protocol.messages import NodeState

RECONNECT_S = 2.0
"""A peer whose connection broke stays what it was for this long, and so does one that has just come back
until it says what it does."""

LATE_S = 1.0
"""Whoever's time was up that long ago, or others' was, without anybody looking: this process stood still, and
what they have said meanwhile may be unread. They have `RECONNECT_S` more."""


class PeerState(StrEnum):
    JOINING = "joining"
    TRAINING = "training"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class SessionOpened:
    peer: int
    session: int
    is_reader: bool = False


@dataclass(frozen=True, slots=True)
class SessionClosed:
    peer: int
    session: int


@dataclass(frozen=True, slots=True)
class StateSaid:
    peer: int
    state: NodeState


@dataclass(frozen=True, slots=True)
class SignOfLife:
    peer: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    pass


MembershipEvent = SessionOpened | SessionClosed | StateSaid | SignOfLife | TimePassed


Cause = Literal["said_so", "connection_lost", "silent"]
"""How a peer went."""


@dataclass(frozen=True, slots=True)
class Became:
    """The only action: a peer's state changed, and why. `cause`: of one that is gone, for counting."""

    peer: int
    state: PeerState
    reason: str
    cause: Cause | None = None


@dataclass(slots=True)
class _Peer:
    state: PeerState
    session: int | None
    seen_s: float
    said: NodeState = NodeState.JOINING
    is_reader: bool = False
    has_trained: bool = False
    grace_until_s: float | None = None
    """Without a session: gone then. With one: joining then, unless it has said that it trains."""
    looked_at_s: float | None = None
    """When its time may be up at the earliest: it stands in the heap."""
    spared_until_s: float = 0.0


class Membership:
    """`recalled`: peers of the last commits before a restart, taken for training for `silence_s`."""

    def __init__(self, silence_s: float, recalled: frozenset[int], now_s: float) -> None:
        self._silence_s = silence_s
        self._peers = {
            peer: _Peer(
                PeerState.TRAINING,
                None,
                now_s,
                NodeState.TRAINING,
                has_trained=True,
                grace_until_s=now_s + silence_s,
            )
            for peer in sorted(recalled)
        }
        self._newest_session: dict[int, int] = {}
        self._due: list[tuple[float, int]] = []
        """A heap: when to look whose time is up. What a peer says moves its time, not its place in here."""
        self._connected: list[int] = []
        """Sorted."""
        self.n_changes = 0
        """Grows whenever `connected` is another list."""
        for peer in self._peers:
            self._look_again(peer)

    def handle(self, event: MembershipEvent, now_s: float) -> list[Became]:
        """The changes that the event, and the time until now, have brought. `now_s`: monotonic."""
        actions: list[Became] = []
        match event:
            case SessionOpened(peer, session, is_reader):
                self._opened(peer, session, now_s, actions)
                self._peers[peer].is_reader = is_reader
            case SessionClosed(peer, session):
                self._closed(peer, session, now_s)
            case StateSaid(peer, state):
                self._said(peer, state, now_s, actions)
            case SignOfLife(peer):
                self._seen(peer, now_s, actions)
            case TimePassed():
                pass
        self._expire(now_s, actions)
        if not isinstance(event, TimePassed):
            self._look_again(event.peer)
        return actions

    def is_current(self, peer: int, session: int) -> bool:
        """Whether this is the peer's newest session, and open."""
        known = self._peers.get(peer)
        return known is not None and known.session == session

    def is_newer(self, peer: int, session: int) -> bool:
        """Whether no session of the peer's with this number or a higher one was ever opened."""
        return session > self._newest_session.get(peer, -1)

    def state(self, peer: int) -> PeerState:
        """GONE also for a peer that never came."""
        known = self._peers.get(peer)
        return PeerState.GONE if known is None else known.state

    def takes_part(self, peer: int) -> bool:
        """Whether it trains, has trained or may do so soon: not one that reads, or never got that far."""
        known = self._peers.get(peer)
        if known is None:
            return False
        is_coming = known.state is not PeerState.GONE and not known.is_reader
        return known.has_trained or known.state is PeerState.TRAINING or is_coming

    def connected(self) -> list[int]:
        """Peers with an open session, sorted."""
        return list(self._connected)

    def is_connected(self, peer: int) -> bool:
        """Whether the peer has an open session."""
        known = self._peers.get(peer)
        return known is not None and known.session is not None

    def training(self) -> list[int]:
        """Peers that train, sorted."""
        return sorted(p for p, x in self._peers.items() if x.state is PeerState.TRAINING)

    def alive(self) -> list[int]:
        """Peers that are joining or training."""
        return sorted(p for p, x in self._peers.items() if x.state is not PeerState.GONE)

    def missed(self, now_s: float, for_s: float) -> list[int]:
        """Peers that are not there and did not say that they leave, for at most so long."""
        return sorted(
            p
            for p, x in self._peers.items()
            if x.session is None and x.said is not NodeState.LEAVING and now_s < x.seen_s + for_s
        )

    def seen_s(self, peer: int) -> float | None:
        """When the peer was last heard of; None: not since the coordinator started."""
        known = self._peers.get(peer)
        return None if known is None else known.seen_s

    def wake_s(self) -> float | None:
        """When the next peer's time is up."""
        while self._due:
            due_s, peer = self._due[0]
            known = self._peers[peer]
            is_current = known.looked_at_s == due_s
            if is_current and known.state is not PeerState.GONE and self._up_s(known) <= due_s:
                return due_s
            heappop(self._due)
            if is_current:
                known.looked_at_s = None
                self._look_again(peer)
        return None

    def _up_s(self, peer: _Peer) -> float:
        up_s = peer.seen_s + self._silence_s
        if peer.grace_until_s is not None:
            up_s = peer.grace_until_s if peer.session is None else min(up_s, peer.grace_until_s)
        return max(up_s, peer.spared_until_s)

    def _opened(self, peer: int, session: int, now_s: float, actions: list[Became]) -> None:
        self._newest_session[peer] = session
        known = self._peers.setdefault(peer, _Peer(PeerState.GONE, None, now_s))
        if known.session is None:
            insort(self._connected, peer)
            self.n_changes += 1
        known.session, known.seen_s, known.said = session, now_s, NodeState.JOINING
        known.grace_until_s = now_s + RECONNECT_S if known.state is PeerState.TRAINING else None
        if known.state is PeerState.GONE:
            self._become(peer, PeerState.JOINING, "connected", actions)

    def _closed(self, peer: int, session: int, now_s: float) -> None:
        if self.is_current(peer, session):
            known = self._peers[peer]
            known.session, known.grace_until_s = None, now_s + RECONNECT_S
            del self._connected[bisect_left(self._connected, peer)]
            self.n_changes += 1

    def _said(self, peer: int, state: NodeState, now_s: float, actions: list[Became]) -> None:
        known = self._peers[peer]
        known.seen_s, known.said, known.grace_until_s = now_s, state, None
        self._become(peer, _STATE_OF[state], _SAID[state], actions, "said_so")

    def _seen(self, peer: int, now_s: float, actions: list[Became]) -> None:
        known = self._peers[peer]
        known.seen_s = now_s
        if known.state is PeerState.GONE and known.session is not None:
            self._become(peer, _STATE_OF[known.said], "heard of again", actions)

    def _expire(self, now_s: float, actions: list[Became]) -> None:
        if not self._due or self._due[0][0] > now_s:
            return
        first_s = self.wake_s()
        stood_still = first_s is not None and now_s > first_s + LATE_S
        for peer in self._take_due(now_s):
            known = self._peers[peer]
            if known.state is PeerState.GONE or now_s < self._up_s(known):
                pass
            elif stood_still:
                known.spared_until_s = now_s + RECONNECT_S
            elif known.session is None:
                self._become(peer, PeerState.GONE, "connection lost", actions, "connection_lost")
            elif now_s >= known.seen_s + self._silence_s:
                silent = f"silent for {now_s - known.seen_s:.0f} s"
                self._become(peer, PeerState.GONE, silent, actions, "silent")
            else:
                known.grace_until_s = None
                self._become(peer, PeerState.JOINING, "came back without saying that it trains", actions)
            self._look_again(peer)

    def _take_due(self, now_s: float) -> list[int]:
        """Peers to look at now, sorted."""
        taken = []
        while self._due and self._due[0][0] <= now_s:
            due_s, peer = heappop(self._due)
            if self._peers[peer].looked_at_s == due_s:
                self._peers[peer].looked_at_s = None
                taken.append(peer)
        return sorted(taken)

    def _look_again(self, peer: int) -> None:
        """When its time is up, unless somebody looks before."""
        known = self._peers.get(peer)
        if known is None or known.state is PeerState.GONE:
            return
        up_s = self._up_s(known)
        if known.looked_at_s is None or up_s < known.looked_at_s:
            known.looked_at_s = up_s
            heappush(self._due, (up_s, peer))

    def _become(
        self, peer: int, state: PeerState, reason: str, actions: list[Became], cause: Cause | None = None
    ) -> None:
        known = self._peers[peer]
        if known.state is not state:
            known.state = state
            known.has_trained |= state is PeerState.TRAINING
            actions.append(Became(peer, state, reason, cause if state is PeerState.GONE else None))


_SAID = {
    NodeState.JOINING: "it is catching up",
    NodeState.TRAINING: "it has caught up",
    NodeState.LEAVING: "it has left",
}

_STATE_OF = {
    NodeState.JOINING: PeerState.JOINING,
    NodeState.TRAINING: PeerState.TRAINING,
    NodeState.LEAVING: PeerState.GONE,
}
