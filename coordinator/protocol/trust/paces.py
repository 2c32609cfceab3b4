"""How often peers' offers count, from the ledger alone: what a mean of rounds with a pace of their own weighs
them by. Pure, fed with every commit in order, the same for all."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Container
from typing import Final

from ..messages import CommitBody

MOST: Final = 16
"""Rounds: who offers more rarely counts as if it offered as often as this."""


class Paces:
    """Four bytes for every counted offer."""

    def __init__(self) -> None:
        self.round = 0
        """The newest commit that is known."""
        self._counted: dict[int, array[int]] = {}

    def committed(self, body: CommitBody, condemned: Container[int] = ()) -> None:
        """The next commit, or one that is known. Raises ValueError: one before it is not."""
        if body.round <= self.round:
            return
        if body.round != self.round + 1:
            raise ValueError("commits are needed from the first on: offers weigh by the rounds between them")
        self.round = body.round
        for offer in body.offers:
            if offer.n_samples > 0 and offer.peer not in condemned:
                self._counted.setdefault(offer.peer, array("I")).append(body.round)

    def gap(self, peer: int, round_: int) -> int:
        """Rounds from the peer's counted offer before this round to the round, at most `MOST`; 1 if there is
        none."""
        rounds = self._counted.get(peer, array("I"))
        i = bisect_left(rounds, round_)
        return min(round_ - rounds[i - 1], MOST) if i else 1

    def n_active(self, round_: int) -> int:
        """Peers of which an offer has counted in this round, or in one of the `MOST` - 1 before it."""
        return sum(self._is_active(rounds, round_) for rounds in self._counted.values())

    @staticmethod
    def _is_active(rounds: array[int], round_: int) -> bool:
        i = bisect_left(rounds, round_ + 1)
        return i > 0 and rounds[i - 1] > round_ - MOST
