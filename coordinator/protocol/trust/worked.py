"""How many samples peers' offers have counted, from the ledger alone: what means weigh them by that are over
several rounds. Pure, fed with every commit in order, the same for all."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Container

from ..messages import CommitBody


class Worked:
    """Twelve bytes for every counted offer."""

    def __init__(self) -> None:
        self.round = 0
        """The newest commit that is known."""
        self._rounds: dict[int, array[int]] = {}
        self._samples: dict[int, array[int]] = {}
        """Of all rounds up to that one."""

    def committed(self, body: CommitBody, condemned: Container[int] = ()) -> None:
        """The next commit, or one that is known. Raises ValueError: one before it is not."""
        if body.round <= self.round:
            return
        if body.round != self.round + 1:
            raise ValueError("commits are needed from the first on: peers weigh by what they did in them")
        self.round = body.round
        for offer in body.offers:
            if offer.n_samples > 0 and offer.peer not in condemned:
                sums = self._samples.setdefault(offer.peer, array("Q"))
                sums.append(offer.n_samples + (sums[-1] if sums else 0))
                self._rounds.setdefault(offer.peer, array("I")).append(body.round)

    def samples(self, peer: int, after: int, up_to: int) -> int:
        """Of the peer's counted offers of the rounds after the one, the other among them."""
        return self._up_to(peer, up_to) - self._up_to(peer, after)

    def _up_to(self, peer: int, round_: int) -> int:
        i = bisect_right(self._rounds.get(peer, ()), round_)
        return self._samples[peer][i - 1] if i else 0
