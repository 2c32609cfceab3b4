"""The gradient of the next round's work, taken while the commit of the round before is under way.

Local state: the sums over micro-batches in the entry `ahead` of each parameter, the sum of their losses in
`ahead_loss` of the first one, and as counters `ahead_for` (the round that they are for), `ahead` (those so
far) and `ahead_finite` (those that count). So a restarted peer offers what it would have offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Draw, Strategy
from .gradients import MeanGradient, backward

_COUNTERS = ("ahead_for", "ahead", "ahead_finite")


class Ahead:
    """See the module's docstring."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def is_done(self, round_: int, n_batches: int) -> bool:
        """Whether the round has all its micro-batches."""
        counters = self._strategy.counters
        return counters.get("ahead_for") == round_ and counters.get("ahead", 0) >= n_batches

    def work(self, draw: Draw, round_: int) -> None:
        """A micro-batch of the round's."""
        strategy = self._strategy
        if strategy.counters.get("ahead_for") != round_:
            self.forget()
        strategy.counters["ahead_for"] = round_
        gradient = self._gradient()
        strategy.zero_grad(set_to_none=True)
        loss = backward(draw(), strategy.ranks)
        strategy.count("ahead")
        if gradient.take_in(loss):
            self._keep(gradient, loss)
        else:
            strategy.count("dropped_batches")
        strategy.zero_grad(set_to_none=True)

    def take(self, round_: int) -> tuple[MeanGradient, int, float | None] | None:
        """What there is for the round: the gradient, of how many micro-batches, and their mean loss, None if
        none counts. It is forgotten here. None: there is nothing."""
        counters = self._strategy.counters
        found = None
        if counters.get("ahead_for") == round_:
            n_finite = counters.get("ahead_finite", 0)
            loss = float(self._loss()) / n_finite if n_finite else None
            found = self._gradient(), counters["ahead"], loss
        self.forget()
        return found

    def forget(self) -> None:
        for name in _COUNTERS:
            self._strategy.counters.pop(name, None)
        for p in self._strategy.parameters_in_order():
            if p.tensor in self._strategy.state:
                for entry in ("ahead", "ahead_loss"):
                    self._strategy.state[p.tensor].pop(entry, None)

    def _gradient(self) -> MeanGradient:
        """So far."""
        strategy = self._strategy
        states = {p.name: strategy.state.get(p.tensor, {}) for p in strategy.parameters_in_order()}
        sums = {name: state["ahead"] for name, state in states.items() if "ahead" in state}
        n_finite = strategy.counters.get("ahead_finite", 0)
        return MeanGradient(strategy.parameters_in_order(), strategy.ranks, sums, n_finite)

    def _keep(self, gradient: MeanGradient, loss: float) -> None:
        strategy = self._strategy
        strategy.count("ahead_finite")
        for p in strategy.parameters_in_order():
            if p.name in gradient.sums:
                strategy.state[p.tensor]["ahead"] = gradient.sums[p.name]
        strategy.state[strategy.parameters_in_order()[0].tensor]["ahead_loss"] = self._loss() + loss

    def _loss(self) -> Tensor:
        first = self._strategy.parameters_in_order()[0]
        nothing = torch.zeros((), dtype=torch.float64)
        found: Tensor = self._strategy.state[first.tensor].get("ahead_loss", nothing)
        return found
