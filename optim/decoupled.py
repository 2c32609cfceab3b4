"""Decoupled momentum: DeMo (arXiv 2411.19870), FlexDeMo (arXiv 2502.06728). Per parameter and round:

    theta = theta (1 - lr wd)
    delta = beta delta + lr grad                  local momentum, never sent whole
    q     = select(delta)                         what the compressor packs, decoded
    delta = delta - alpha q                       what is sent leaves the momentum
    G     = mean of q over all counted offers
    theta = theta - lr sign(G), or without sign   theta = theta - G

An offer that missed its commit goes back into the momentum: delta += beta^lag alpha q, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from thinwire.compression.base import Compressor, Fields, Packed, Part, Payload, Turn
from thinwire.compression.errors import ConfigError
from thinwire.compression.exact import exact_arithmetic, to_float32
from thinwire.optim import options
from thinwire.optim.base import (
    Closure,
    Draw,
    NamedParameters,
    Own,
    Parameter,
    Share,
    Strategy,
    flattened,
    refuse_names,
)
from thinwire.optim.clip import clip_limit

Sends = dict[int, tuple[int, Packed]]
"""Round -> (how often the momentum had decayed when it was sent, what was sent), while its fate is open."""


class Decoupled(Strategy):
    """See the module's docstring. Replicated: the parameters. Local: momentum and sends of open fate.

    Counters: `decays` of the momentum; `dropped_batches` whose loss or gradient was not finite;
    `lost_sends` whose fate this replica never learnt, because it took over a snapshot of a later round.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        compressor: Compressor,
        lr: float = 3e-3,
        beta: float = 0.999,
        alpha: float = 1.0,
        sign: bool = True,
        weight_decay: float = 0.0,
        accumulate: int = 1,
        max_grad_norm: float = 0.0,
        clip: float = 10.0,
        seed: int = 0,
    ) -> None:
        """`accumulate`: micro-batches per round, of this peer. `max_grad_norm`: 0 means no limit.

        `clip`: without sign, no offer counts for more than this many times the median L1 norm of the round.
        """
        self.compressor = compressor
        defaults = {
            "compressor": repr(compressor),  # the sends in a `state_dict` are packed with it
            "lr": lr,
            "beta": beta,
            "alpha": alpha,
            "sign": sign,
            "weight_decay": weight_decay,
            "accumulate": accumulate,
            "max_grad_norm": max_grad_norm,
            "clip": clip,
        }
        super().__init__(named_parameters, defaults, seed=seed)

    @classmethod
    def check_options(cls, group: Mapping[str, Any]) -> None:
        options.real(group, "lr", at_least=0)
        options.real(group, "beta", at_least=0, below=1)
        options.real(group, "alpha", at_least=0, at_most=1)
        options.truth(group, "sign")
        options.real(group, "weight_decay", at_least=0)
        options.whole(group, "accumulate", at_least=1, at_most=2**16)
        options.real(group, "max_grad_norm", at_least=0)
        options.real(group, "clip", at_least=1)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        packed_with = state_dict["param_groups"][0]["compressor"]
        if packed_with != repr(self.compressor):
            raise ConfigError(f"sends in this state are packed with {packed_with}, not {self.compressor!r}")
        super().load_state_dict(state_dict)

    def fields(self) -> Fields:
        return {p.name: self.compressor.fields(_part(p)) for p in self.parameters_in_order()}

    # --------------------------------------------------------------------------------- local work

    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """`accumulate` micro-batches, then one step of the momentum. Uses and clears the gradients."""
        gradient = _MeanGradient(self.parameters_in_order())
        losses = []
        for _ in range(self.option("accumulate")):
            self.zero_grad(set_to_none=True)
            loss = _backward(draw())
            if gradient.take_in(loss):
                losses.append(loss)
            else:
                self.count("dropped_batches")
        self.last_loss = sum(losses) / len(losses) if losses else None
        payload = self._send(gradient, turn)
        self.zero_grad(set_to_none=True)
        return payload

    def propose_from_grad(self, turn: Turn) -> Payload:
        gradient = _MeanGradient(self.parameters_in_order())
        if not gradient.take_in(loss=0.0):
            self.count("dropped_batches")
        return self._send(gradient, turn)

    def _send(self, gradient: _MeanGradient, turn: Turn) -> Payload:
        """One step of the momentum; packs what is selected of it, which thereby leaves it."""
        self.count("decays")
        scale = gradient.scale(self.option("max_grad_norm"))
        payload = {}
        for parameter in self.parameters_in_order():
            momentum, sends = self._local(parameter)
            momentum.mul_(self.option("beta"))
            # Proposed once more for the same round: what was packed before never counted.
            self._put_back(parameter, turn)
            lr = float(parameter.group["lr"]) * turn.lr_factor
            gradient.add_to(momentum, parameter.name, lr * scale)
            packed = self.compressor.pack(momentum, _part(parameter), turn)
            momentum.sub_(self._sent(parameter, packed, turn, self.option("alpha")))
            sends[turn.round] = (self.counters["decays"], packed)
            payload[parameter.name] = packed
        return payload

    def _local(self, parameter: Parameter) -> tuple[Tensor, Sends]:
        """The flat momentum and the sends of one parameter; zero and none before its first round."""
        state = self.state[parameter.tensor]
        if not state:
            flat = parameter.tensor.detach().reshape(-1)
            state["momentum"] = torch.zeros_like(flat)
            state["sends"] = {}
        return state["momentum"], state["sends"]

    def _sent(self, parameter: Parameter, packed: Packed, turn: Turn, factor: float) -> Tensor:
        """factor * q: what the receivers read from `packed`."""
        with exact_arithmetic():
            q = self.compressor.decode([packed], [1.0], _part(parameter), turn).to(parameter.tensor.device)
            return q if factor == 1.0 else q.mul_(to_float32(factor))

    def _put_back(self, parameter: Parameter, turn: Turn) -> None:
        """Adds this round's send to the momentum again, as far as it would have decayed since. Only once."""
        momentum, sends = self._local(parameter)
        if turn.round not in sends:
            return
        n_decays, packed = sends.pop(turn.round)
        factor = float(self.option("alpha"))
        for _ in range(self.counters["decays"] - n_decays):
            factor *= self.option("beta")
        momentum.add_(self._sent(parameter, packed, turn, factor))

    def _settle(self, parameter: Parameter, turn: Turn, own: Own) -> None:
        """The fate of this replica's own send of the round.

        A send of this round that the caller knows nothing of (`own` is None) never left this machine, so it
        cannot have counted: it is treated as missed. Sends of earlier rounds are still open only if a
        snapshot made this replica skip their commits; putting one back that had counted would send it twice,
        so they are given up.
        """
        sends = self.state[parameter.tensor].get("sends", {}) if parameter.tensor in self.state else {}
        if own == "counted":
            sends.pop(turn.round, None)
        elif turn.round in sends:
            self._put_back(parameter, turn)
        lost = [r for r in sends if r < turn.round]
        for r in lost:
            del sends[r]
        if parameter.index == 0:
            self.count("lost_sends", len(lost))

    # --------------------------------------------------------------------------------- replicated work

    def check(self, payload: Payload, turn: Turn) -> None:
        parameters = self.parameters_in_order()
        refuse_names(payload, [p.name for p in parameters])
        with exact_arithmetic():
            for parameter in parameters:
                self.compressor.check(payload[parameter.name], _part(parameter), turn)

    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Parameter by parameter: scratch is a few times the largest one. No shares, no change."""
        weights = self._weights(shares, turn)
        for parameter in self.parameters_in_order():
            self._settle(parameter, turn, own)
            if shares:
                with exact_arithmetic(), flattened(parameter.tensor) as theta:
                    self._update(parameter, theta, [s.payload[parameter.name] for s in shares], weights, turn)

    def _update(
        self, parameter: Parameter, theta: Tensor, packs: Sequence[Packed], weights: list[float], turn: Turn
    ) -> None:
        """One rounding per operation: no fused forms (`alpha=`, foreach)."""
        lr = float(parameter.group["lr"]) * turn.lr_factor
        wd = parameter.group["weight_decay"] if parameter.decays else 0.0
        step = self.compressor.decode(packs, weights, _part(parameter), turn).to(theta.device)
        if self.option("sign"):
            step.sign_().mul_(to_float32(lr))
        if wd != 0.0:
            theta.mul_(to_float32(1.0 - lr * wd))
        theta.sub_(step)

    def _weights(self, shares: Sequence[Share], turn: Turn) -> list[float]:
        """1 for every offer; without sign less for those whose L1 norm is beyond the limit of the round."""
        if self.option("sign"):
            return [1.0] * len(shares)
        parameters = self.parameters_in_order()
        with exact_arithmetic():
            norms = [
                sum(self.compressor.magnitude(s.payload[p.name], _part(p), turn) for p in parameters)
                for s in shares
            ]
        limit = clip_limit(norms, self.option("clip"))
        return [1.0 if norm <= limit else _small_weight(limit / norm) for norm in norms]


def _small_weight(weight: float) -> float:
    """A weight below what compressors take is as good as none."""
    return to_float32(weight) if weight >= 2.0**-40 else 0.0


class _MeanGradient:
    """The mean gradient of a round's micro-batches. A gradient of None counts as zero."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[str, Tensor] = {}
        self._n_batches = 0

    def take_in(self, loss: float) -> bool:
        """Takes the gradients that are in place; False, and nothing is taken, if anything is not finite."""
        grads = {p.name: _dense(p.tensor.grad) for p in self._parameters if p.tensor.grad is not None}
        if not isfinite(loss) or not isfinite(_norm(grads.values())):
            return False
        for name, grad in grads.items():
            # The first gradient is kept, not copied: `propose` takes it away from the parameter.
            self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
        self._n_batches += 1
        return True

    def scale(self, max_norm: float) -> float:
        """From the sum to the mean, clipped to `max_norm` unless that is 0."""
        if self._n_batches == 0:
            return 0.0
        norm = _norm(self._sums.values()) / self._n_batches if max_norm > 0 else 0.0
        return min(1.0, max_norm / norm if norm > 0 else 1.0) / self._n_batches

    def add_to(self, momentum: Tensor, name: str, factor: float) -> None:
        if name in self._sums:
            # Local work: a fused multiply-add is welcome here.
            momentum.add_(self._sums[name].reshape(-1), alpha=factor)


def _backward(closure: Closure) -> float:
    """The loss; its gradients are left in the parameters, unless it is not finite."""
    with torch.enable_grad():
        loss = closure()
        value = float(loss.detach())
        if isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
    return value


def _dense(grad: Tensor) -> Tensor:
    """float32, for embeddings with sparse gradients too."""
    return (grad.to_dense() if grad.is_sparse else grad).detach().float()


def _norm(grads: Iterable[Tensor]) -> float:
    """The L2 norm over all gradients; not finite if a single element is not."""
    squares = [float(torch.linalg.vector_norm(g)) ** 2 for g in grads]
    return sqrt(sum(squares))


def _part(parameter: Parameter) -> Part:
    return Part.whole(parameter.tensor.shape)
