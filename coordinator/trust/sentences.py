"""What the owners of condemned peers are told, and the log."""

from __future__ import annotations

import logging
from typing import Final

from ..announcer import Announcer
from ..observe.peer_names import PeerNames
from ..protocol.messages import Notice
from ..protocol.trust.standing import Standing

log = logging.getLogger("thinwire.coordinator")

FOUND: Final = (
    "other peers have done this node's work again and found that its offers are not what that work gives, or "
    "undo it"
)
LOOK_FOR: Final = (
    "Look for other data or another version of the task than the run's, or for broken memory (thinwire "
    "doctor)"
)

FLOOD: Final = (
    "most newcomers of late have failed their first audit: until fewer do, others weigh nothing before "
    "theirs has passed"
)
FLOOD_IS_OVER: Final = "newcomers weigh something again: fewer of them have failed their first audit of late"

TOLD_EVERY: Final = 50
"""Rounds after which a peer that goes on offering is told again."""


class Sentences:
    """Of one run; `standing`: as of its newest commit."""

    def __init__(self, standing: Standing, announcer: Announcer, names: PeerNames) -> None:
        self._standing, self._announcer, self._names = standing, announcer, names
        self._told: dict[int, int] = {}
        """By peer: the round in which it was told last."""

    def committed(self) -> None:
        """A new commit: who is condemned by its audits, and whose term is over, is told."""
        condemned, back = self._standing.changed()
        for peer in condemned:
            _, n_failed = self._standing.audited(peer)
            log.warning(
                "%s is condemned up to round %d: %d audits of its offers have failed so far",
                self._names.short(peer),
                self._standing.condemned_until(peer),
                n_failed,
            )
            self._tell(peer)
        for peer in self._standing.fallen():
            log.warning("an audit of the offers of %s has failed", self._names.short(peer))
            text = f"{FOUND}: they weigh nothing until an audit passes. {LOOK_FOR}"
            self._announcer.send(Notice(text=text, warning=True), [peer])
        if (begins := self._standing.flood_turns()) is not None:
            log.warning(FLOOD if begins else FLOOD_IS_OVER)
        for peer in back:
            self._told.pop(peer, None)
            count = self._count_again(peer)
            log.info("the term of %s is over: its offers %s", self._names.short(peer), count)
            self._announcer.send(
                Notice(text=f"this node's term is over: its offers {count}", warning=False), [peer]
            )

    def refused(self, peer: int) -> None:
        """An offer of a condemned peer was not taken: its owner hears why, once in a while."""
        if self._standing.round >= self._told.get(peer, -TOLD_EVERY) + TOLD_EVERY:
            self._tell(peer)

    def _tell(self, peer: int) -> None:
        self._told[peer] = self._standing.round
        self._announcer.send(Notice(text=self._text(peer), warning=True), [peer])

    def _text(self, peer: int) -> str:
        last = self._standing.condemned_until(peer)
        return f"{FOUND}: up to round {last} they do not count, then they are taken again. {LOOK_FOR}"

    def _count_again(self, peer: int) -> str:
        if self._standing.has_failed_in(peer, self._standing.round + 1):
            return "are taken again, and count once an audit has passed"
        return "count again"
