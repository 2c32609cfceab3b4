"""What peers say to a service in their sessions, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable

from ...compression.errors import Incompatible, ThinwireError
from ..admission import AdmissionControl
from ..ledger import Ledger
from ..membership import MembershipEvent, SessionClosed, SessionOpened, SignOfLife, StateSaid
from ..protocol.messages import (
    READER,
    Audit,
    BadMessage,
    Evaluation,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Offer,
    Report,
    State,
)
from .parts import Parts


class Hearing:
    """Of one service. `parts`: as they are now; `end`: tells a peer why its session is over."""

    def __init__(
        self,
        ledger: Ledger,
        admission: AdmissionControl,
        parts: Callable[[], Parts],
        end: Callable[[str, ThinwireError], object],
    ) -> None:
        self._ledger, self._admission, self._now, self._end = ledger, admission, parts, end

    @property
    def _parts(self) -> Parts:
        return self._now()

    def opened(self, peer_id: str, session: int, hello: Hello, now_s: float) -> int:
        """The peer is in; returns its index. Raises what `Service.open` raises."""
        index = self._parts.peers.admit(
            peer_id, session, hello, lambda stranger: self._make_room(stranger, now_s), now_s
        )
        self.handle(SessionOpened(index, session, hello.agent == READER), now_s)
        return index

    def _make_room(self, stranger: int, now_s: float) -> None:
        """For a peer that has worked, among those that have not."""
        text = "the swarm is full, and a peer whose work has counted came back: try again later"
        self._end(self._ledger.peer_id(stranger), self._admission.refused("full", Incompatible(text)))
        self.leaves(stranger, now_s)

    def closed(self, index: int, session: int, now_s: float) -> None:
        """The session's connection is over, for whatever reason."""
        if self._parts.members.is_current(index, session):
            self.handle(SessionClosed(index, session), now_s)

    def leaves(self, index: int, now_s: float) -> None:
        """Nobody waits for this peer any more."""
        self.handle(StateSaid(index, NodeState.LEAVING), now_s)

    def handle(self, event: MembershipEvent, now_s: float) -> None:
        """What the event means for the open round takes its course."""
        for change in self._parts.peers.handle(event, now_s):
            self._parts.open_round.handle(change, now_s)

    def receive(self, index: int, session: int, message: Message, now_s: float) -> None:
        """Raises BadMessage for what a peer must not send; frames of a replaced session are dropped."""
        if not self._parts.members.is_current(index, session):
            self._admission.rejected["old_session"] += 1
            return
        if not isinstance(message, State):
            self.handle(SignOfLife(index), now_s)
        match message:
            case State():
                if message.last_word:
                    self._parts.notices.failed(index, message.last_word)
                self.handle(self._parts.peers.said(index, message), now_s)
            case Offer():
                self._parts.open_round.offered(index, message, now_s)
            case Report():
                self._reported(index, message)
            case Evaluation():
                self._known_round(message.round)
                self._parts.derived.reports.note_evaluation(message)
            case Audit():
                self._known_round(message.round)
                self._parts.derived.audits.note(index, message)
            case Heartbeat():
                self._parts.derived.statistics.heartbeat(index, message)
                self._parts.derived.page_history.beat(index, message)
                self._parts.derived.peer_sizes.heard(index, message.sizes, now_s)
                if message.gossip is not None:
                    self._parts.derived.gossip[index] = message.gossip
            case _:
                text = f"{type(message).__name__} is not for the coordinator"
                raise self._admission.refused("wrong_message", BadMessage(text))

    def _reported(self, index: int, report: Report) -> None:
        self._known_round(report.round)
        differ = self._parts.derived.reports.note(index, report)
        if differ:
            self._parts.notices.differs(index, report.round, differ)

    def _known_round(self, round_: int) -> None:
        if round_ > self._ledger.head_round:
            text = f"a report on round {round_} to come"
            raise self._admission.refused("report_round", BadMessage(text))
