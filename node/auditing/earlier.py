"""The weights that a round's offers were made from, kept while this node does the work of one again.

When a commit is applied that counted an offer, the weights have moved on, and with large steps a gradient
there may point the other way. So an auditor keeps what it had: the parameters alone, in the memory of the
CPU, from the commit of a round that it was drawn for to the end of the audit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...compression.base import Turn
from ..replica import Replica


class Earlier:
    """The parameters of a replica as they are now, as far as this rank has them, and the round whose offers
    are made from them: `round`, the next one, or so many later as the strategy's `staleness`."""

    def __init__(self, replica: Replica, staleness: int = 0) -> None:
        self._replica = replica
        turn = replica.turn()
        self._turn = replica.turn_of(turn.round + staleness, replica.peer_id, turn.lr_factor)
        strategy = replica.strategy
        self._kept = {
            p.name: strategy.replicated_value(p).detach().to("cpu", copy=True)
            for p in strategy.parameters_in_order()
        }

    @property
    def round(self) -> int:
        return self._turn.round

    def turn_of(self, peer_id: str) -> Turn:
        """The round as that peer had it, but for the learning rate where that came later."""
        return self._replica.turn_of(self.round, peer_id, self._turn.lr_factor)

    def turn_before(self) -> Turn:
        """The round before, which they are kept in: of the same learning rate."""
        return self._replica.turn_of(self.round - 1, self._replica.peer_id, self._turn.lr_factor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has these parameters meanwhile, then its own again, bit for bit."""
        with self._replica.strategy.replica():
            self._swap()
            try:
                yield
            finally:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """One parameter at a time."""
        for p in self._replica.strategy.parameters_in_order():
            now = p.local.to("cpu", copy=True)
            p.local.copy_(self._kept[p.name])
            self._kept[p.name] = now
