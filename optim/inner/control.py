"""Control variates against peers' drift on uneven data: SCALLION and SCAFCOM (arXiv 2308.08165), for local
training by any inner optimizer.

The papers' variates are gradients; these are what a round moves the parameters by, which is the same for
plain SGD inside (times its rate and its steps) and says something of every other optimizer, too. Per round:

    H times: an inner step, then  theta_i -= (c - c_i) / H
    d_i   = theta - theta_i - (c - c_i)                what the inner steps alone have moved
    v_i   = (1 - momentum) v_i + momentum d_i          SCAFCOM's, from d_i on; with 1, SCALLION's, it is d_i
    q     = select(rate (v_i - c_i))                   sent
    c_i   = decay (c_i + q)                            local; without q where it did not count
    c     = decay (c + mean of q)                      replicated
    Delta = c + mean of q                              (the old c) in the place of a mean of d_i

While all offers count, c stays the mean of the c_i, and Delta is the mean of d_i, whatever `select` loses. A
peer that leaves, or whose offer is bounded, makes them differ by what fades with `decay`. A joiner begins
with c_i = c, so that it changes no mean. c_i follows from the ledger: a peer reads its own sends there.

All shares of a round count as if their peers were all there are: c takes the whole mean of q, not S/N of
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compression.base import Compressor, Payload, Turn
from ...compression.exact import to_float32
from ..base import Own, Parameter, Share, Strategy
from ..parts.packing import pack_all
from .phase import InnerPhase

NONE = "none"
MEAN = "control_mean"
"""The entry of the state that holds c, which is replicated."""

_OWN = "control"
_MOMENTUM = "control_momentum"
_STEPS = "corrected"
"""The counter of inner steps since the last round that were corrected."""


class Control:
    """See the module's docstring. Reads the strategy's options `control_...`, and `most_batches`, which is H.
    Of no use unless `is_on`."""

    def __init__(self, strategy: Strategy, compressor: Compressor, phase: InnerPhase) -> None:
        self._strategy, self._compressor, self._phase = strategy, compressor, phase

    @property
    def is_on(self) -> bool:
        return bool(self._strategy.option("control") != NONE)

    # --------------------------------------------------------------------------------- local work

    @torch.no_grad()
    def correct(self) -> None:
        """After an inner step, within the phase."""
        for p in self._strategy.parameters_in_order():
            correction = self._mean(p) - self.of(p)
            p.local.sub_(correction.div_(self._strategy.most_batches).view(p.local.shape))
        self._strategy.count(_STEPS)

    @torch.no_grad()
    def send(self, parameters: Sequence[Parameter], turn: Turn, *, is_void: bool) -> Payload:
        """Within the phase. `is_void`: the inner parameters are the outer ones again."""
        strategy = self._strategy
        n_steps = strategy.counters.pop(_STEPS, 0)
        corrected = 0.0 if is_void else n_steps / strategy.most_batches
        momentum, rate = float(strategy.option(_MOMENTUM)), float(strategy.option("control_rate"))

        def change(p: Parameter) -> Tensor:
            own = self.of(p)
            moved = self._phase.moved(p) - (self._mean(p) - own).mul_(corrected)
            if momentum < 1.0:
                state = strategy.state[p.tensor]
                if _MOMENTUM not in state:
                    state[_MOMENTUM] = moved.clone().view(p.local.shape)
                moved = state[_MOMENTUM].view(-1).mul_(1.0 - momentum).add_(moved.mul_(momentum))
            return (moved - own).mul_(rate)

        payload = pack_all(strategy.ranks, self._compressor, parameters, change, turn)
        share = strategy.allotted.share
        if share < 1:
            strongest = self._compressor.strongest
            payload = {p.name: strongest(payload[p.name], p.part.entire, share) for p in parameters}
        return payload

    def of(self, parameter: Parameter) -> Tensor:
        """c_i, flat; c before its first use."""
        state = self._strategy.state[parameter.tensor]
        if _OWN not in state:
            state[_OWN] = self._mean(parameter).clone().view(parameter.local.shape)
        own: Tensor = state[_OWN]
        return own.view(-1)

    def forget(self) -> None:
        """What is known of one's own work is of a replica that has been moved since."""
        for p in self._strategy.parameters_in_order():
            if p.tensor in self._strategy.state:
                for entry in (_OWN, _MOMENTUM):
                    self._strategy.state[p.tensor].pop(entry, None)
        self._strategy.counters.pop(_STEPS, None)

    # --------------------------------------------------------------------------------- replicated work

    def follow(self, parameter: Parameter, shares: Sequence[Share], turn: Turn, own: Own, seed: int) -> None:
        """c_i after a round that changes something; nothing where there is none. Before c changes. `seed`:
        this peer's of the round."""
        if _OWN not in self._strategy.state[parameter.tensor]:
            return
        control = self.of(parameter)
        mine = [s for s in shares if s.seed == seed] if own == "counted" else []
        for share in mine:
            packs = [share.payload[parameter.name]]
            control.add_(self._compressor.decode_on(control.device, packs, [1.0], parameter.part, turn))
        control.mul_(to_float32(self._strategy.option("control_decay")))

    def outer(self, parameter: Parameter, step: Tensor) -> None:
        """`step`, the round's mean of q, becomes Delta; c goes on. Exact."""
        mean = self._mean(parameter)
        mean.add_(step)
        step.copy_(mean)
        mean.mul_(to_float32(self._strategy.option("control_decay")))

    def _mean(self, parameter: Parameter) -> Tensor:
        return self._strategy.replicated_state(parameter)[MEAN].view(-1)
