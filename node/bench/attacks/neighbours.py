"""Attacks on gossip: what a bad peer's neighbours are sent in place of its model. Its offers are honest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ....optim.gossip.mixing import ModelMixing
from ....optim.gossip.neighbours import Exchange, Neighbours
from ....optim.gossip.strategy import Gossip

if TYPE_CHECKING:
    from ...runner import Runner

Lie = Literal["flipped", "scaled-1e3", "stale", "silent"]
"""Of theta - x: with the other sign, a thousand times as long, the first one for ever, or nothing."""


class LyingNeighbours:
    """See `Neighbours`: the honest ones, but for what goes out."""

    def __init__(self, honest: Neighbours, strategy: Gossip, mixing: ModelMixing, lie: Lie) -> None:
        self._honest, self._strategy, self._mixing, self._lie = honest, strategy, mixing, lie
        self._first: dict[str, Tensor] | None = None

    @property
    def me(self) -> str:
        return self._honest.me

    def peers(self, round_: int) -> Mapping[str, int]:
        return self._honest.peers(round_)

    def secret(self, peer: str) -> bytes:
        return self._honest.secret(peer)

    def borrow(self) -> list[tuple[int, bytes]]:
        return self._honest.borrow()

    def exchange(self, round_: int, with_: Sequence[str], data: bytes) -> Exchange:
        if self._lie == "silent":
            return self._honest.exchange(round_, [], data)
        assert self._strategy.met is not None
        turn = self._strategy.met.turn
        said = self._changed(self._mixing.model_of(data, turn))
        return self._honest.exchange(round_, with_, self._mixing.message_of(said, turn))

    def _changed(self, moved: dict[str, Tensor]) -> Mapping[str, Tensor]:
        if self._lie == "stale":
            self._first = self._first or moved
            return self._first
        factor = -1.0 if self._lie == "flipped" else 1e3
        return {name: t * factor for name, t in moved.items()}


def lie_to_neighbours(lie: Lie, runner: Runner) -> None:
    """From now on the runner does. Before its first round."""
    strategy = runner.replica.strategy
    assert isinstance(strategy, Gossip)
    assert strategy.neighbours is not None
    assert isinstance(strategy.mixing, ModelMixing)
    strategy.neighbours = LyingNeighbours(strategy.neighbours, strategy, strategy.mixing, lie)
