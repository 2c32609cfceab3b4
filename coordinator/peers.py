"""The peers of a run: who is let in, who is there, and what their coming and going means for the round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from .admission import AdmissionControl
from .announcer import Announcer
from .derived_state import DerivedState
from .ledger import Ledger
from .membership import Membership, MembershipEvent, PeerState, StateSaid
from .observe.counters import Counters
from .observe.notices import Notices
from .protocol.messages import BadMessage, Hello, NodeState, State
from .rounds import PeerStops, PeerTrains

log = logging.getLogger("thinwire.coordinator")

SCRAPED_S = 3600.0
"""A peer that went without a word is listed for this long to be scraped, so that it is seen to be down."""


class Peers:
    """Peers by their peer id, as sessions know them, and by their index, as the ledger does."""

    def __init__(
        self,
        ledger: Ledger,
        admission: AdmissionControl,
        members: Membership,
        announcer: Announcer,
        notices: Notices,
        derived: DerivedState,
        counters: Counters,
    ) -> None:
        self._ledger, self._admission, self._members = ledger, admission, members
        self._announcer, self._notices = announcer, notices
        self._page_history, self._retention = derived.page_history, derived.retention
        self._standing = derived.standing
        self._counters = counters

    def admit(
        self,
        peer_id: str,
        session: int,
        hello: Hello,
        make_room: Callable[[int], object],
        now_s: float,
    ) -> int:
        """Lets a peer in, and back in; returns its index. `make_room`: takes a peer that gives its place to
        one that has worked. Raises what `Service.open` raises."""
        invitation = self._admission.check_hello(peer_id, hello)
        self._admission.check_head(hello)
        known = self._ledger.index_of(peer_id)
        self._check_session(known, session, make_room)
        if known is None and not invitation:
            self._admission.gate.newcomer()
        index = self._ledger.admit(peer_id, invitation)
        if known is None:
            by = f", invited as {invitation}" if invitation else ""
            text = "admitted %s as peer %d (%s)%s"
            self._notices.lines.say(logging.INFO, peer_id, "admitted", text, peer_id, index, hello.agent, by)
        self._counters.joined["new" if known is None else "returned"] += 1
        self._announcer.opened(index, hello.addresses)
        self._page_history.opened(index, hello.device)
        self._retention.welcomed(index)
        self._notices.session_opened(now_s)
        return index

    def _check_session(self, known: int | None, session: int, make_room: Callable[[int], object]) -> None:
        """Raises Incompatible (a full swarm) or BadMessage (a session older than the open one)."""
        if known is not None and not self._members.is_newer(known, session):
            raise self._admission.refused("old_session", BadMessage(f"session {session} has been replaced"))
        present = self.present()
        if known in present or self._admission.has_room(len(present)):
            return
        stranger = self._newest_stranger() if known is not None and self._standing.has_worked(known) else None
        if stranger is None:
            raise self._admission.full(len(present))
        make_room(stranger)

    def _newest_stranger(self) -> int | None:
        """Of those that are there: the last one to be admitted of whom no work has counted."""
        return max((p for p in self._members.alive() if not self._standing.has_worked(p)), default=None)

    def has_worked(self, peer_id: str) -> bool:
        """Whether work of the peer's has counted."""
        index = self._ledger.index_of(peer_id)
        return index is not None and self._standing.has_worked(index)

    def handle(self, event: MembershipEvent, now_s: float) -> Iterator[PeerTrains | PeerStops]:
        """What the event means for the open round, one peer after the other."""
        for became in self._members.handle(event, now_s):
            if became.cause is not None:
                self._counters.left[became.cause] += 1
            self._notices.became(became)
            is_training = became.state is PeerState.TRAINING
            yield PeerTrains(became.peer) if is_training else PeerStops(became.peer)

    def said(self, index: int, message: State) -> StateSaid:
        """What a peer says of itself, for `handle`; what it is going to apply stays on the disk."""
        if message.state is not NodeState.JOINING:
            self._retention.needs_nothing(index)
        elif message.needs_after is not None:
            self._retention.needs(index, message.needs_after)
        return StateSaid(index, message.state)

    def index(self, peer_id: str) -> int | None:
        """None: it was never let in."""
        return self._ledger.index_of(peer_id)

    def is_member(self, peer_id: str) -> bool:
        """Whether the peer is admitted and connected."""
        index = self._ledger.index_of(peer_id)
        return index is not None and self._members.is_connected(index)

    def present(self) -> set[int]:
        """Peers that are there, or have been a moment ago."""
        return {*self._members.alive(), *self._members.connected()}

    def scraped(self, now_s: float) -> list[str]:
        """Peers whose metrics are to be asked for: all that are connected, and those that went without a word
        not long ago."""
        listed = {*self._members.connected(), *self._members.missed(now_s, SCRAPED_S)}
        return [self._ledger.peer_id(index) for index in sorted(listed)]
