"""What the owners of condemned peers are told, and the log."""

from __future__ import annotations

import logging
from typing import Final

from ..announcer import Announcer
from ..observe.peer_names import PeerNames
from ..protocol.messages import Notice
from ..protocol.trust.standing import Standing

log = logging.getLogger("thinwire.coordinator")

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
        for peer in back:
            self._told.pop(peer, None)
            log.info("the term of %s is over: its offers count again", self._names.short(peer))
            self._announcer.send(
                Notice(text="this node's term is over: its offers count again", warning=False), [peer]
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
        return (
            f"other peers have done this node's work again and found that its offers are not what that work "
            f"gives, or undo it: up to round {last} they do not count, then they are taken again. Look for "
            f"other data or another version of the task than the run's, or for broken memory (thinwire "
            f"doctor)"
        )
