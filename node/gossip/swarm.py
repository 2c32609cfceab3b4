"""Gossip's neighbours in a run: who they are says the ledger, their bytes come over the node's link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...compression.errors import ConfigError
from ...optim.base import Strategy
from ...optim.gossip.neighbours import Exchange
from ...optim.gossip.strategy import Gossip
from ..replica import Replica
from .base import NeighbourLink

_BORROW_S = 20.0

Counted = Callable[[int], Mapping[str, int]]


class SwarmNeighbours:
    """See `Neighbours`. `counted`: peers in the commit of a round, by id, and the index of each."""

    def __init__(self, me: str, link: NeighbourLink, counted: Counted, patience_s: float) -> None:
        self._me, self._link, self._counted, self._patience_s = me, link, counted, patience_s

    @property
    def me(self) -> str:
        return self._me

    def peers(self, round_: int) -> Mapping[str, int]:
        return self._counted(round_)

    def exchange(self, round_: int, with_: Sequence[str], data: bytes) -> Exchange:
        self._link.send(round_, with_, data)
        return _OnLink(self._link, round_, self._counted, self._patience_s)

    def secret(self, peer: str) -> bytes:
        return self._link.secret(peer)

    def borrow(self) -> list[tuple[int, bytes]]:
        return self._link.latest(_BORROW_S)


class _OnLink:
    """See `Exchange`. Those whose offers the round's commit has counted have sent before they offered: only
    they are waited for, so that nobody waits for a neighbour that is slow, frozen or gone."""

    def __init__(self, link: NeighbourLink, round_: int, counted: Counted, patience_s: float) -> None:
        self._link, self._round, self._counted, self._patience_s = link, round_, counted, patience_s

    def received(self) -> list[tuple[str, bytes]]:
        return self._link.received(self._round, self._counted(self._round), self._patience_s)


def meet_neighbours(replica: Replica, link: NeighbourLink | None) -> None:
    """A strategy that has neighbours gets them. Raises ConfigError where the link has none to give."""
    strategy: Strategy = replica.strategy
    if not isinstance(strategy, Gossip):
        return
    if link is None:
        raise ConfigError("gossip needs streams between nodes, which this network does not have: use join")
    patience_s = float(strategy.option("patience_s"))

    def counted(round_: int) -> dict[str, int]:
        indices = {peer: index for index, peer in replica.peers.items()}
        return {peer: indices[peer] for peer in replica.counted.get(round_, ())}

    strategy.neighbours = SwarmNeighbours(replica.peer_id, link, counted, patience_s)
