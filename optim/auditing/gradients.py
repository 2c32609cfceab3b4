"""An offer of a strategy that works with gradients, compared with the gradient of its peer's own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from ...compression.base import Compressor, Payload, Turn
from ...compression.exact import exact_arithmetic
from ..base import Draw, Parameter, Strategy
from ..parts.gradients import MeanGradient, backward
from ..parts.ranks import Ranks, is_sharded
from .evidence import Agreement, Evidence

MAX_BATCHES: Final = 4
"""So many of a peer's batches are looked at: more hardly change the cosine."""

MOST_LIMIT: Final = 0.02
"""Of small models."""

CLEAR: Final = 3.0
"""In limits. Where a learning rate is so large that rounds overshoot, a gradient after the round may point
away from an honest offer."""

MOMENTUM: Final = 0.5
"""`Evidence.by_chance` of a payload out of a momentum, which comes late where rounds overshoot: honest ones
had -0.47 on other batches."""

SPREADS: Final = 6.0
"""The limit of large models, in units of one over the root of the number of parameters: noise has a cosine of
about 0 +- 1.5 of them."""


def gradient_evidence(
    strategy: Strategy,
    compressor: Compressor,
    payloads: Sequence[Payload],
    draw: Draw,
    turn: Turn,
    n_batches: int,
) -> list[Evidence | None]:
    """Of all parameters, with one gradient for all payloads. `n_batches`: that the peer says it had. None: no
    batch has a finite gradient that is not zero. Gradients that are in place stay there."""
    options = audited_gradient(strategy, draw, n_batches), strategy.ranks, MOMENTUM
    parameters = strategy.parameters_in_order()
    return [compared(compressor, parameters, payload, turn, *options) for payload in payloads]


def audited_gradient(strategy: Strategy, draw: Draw, n_batches: int) -> Callable[[Parameter], Tensor]:
    """The mean gradient of a peer's batches: what this rank holds of it, flat, zero where nothing was
    finite."""
    parameters = strategy.parameters_in_order()
    with no_gradients(strategy):
        gradient = MeanGradient(parameters, strategy.ranks)
        for _ in range(max(1, min(n_batches, MAX_BATCHES))):
            strategy.zero_grad(set_to_none=True)
            gradient.take_in(backward(draw(), strategy.ranks))

    def own(parameter: Parameter) -> Tensor:
        found = torch.zeros(parameter.local.numel(), device=parameter.local.device)
        gradient.add_to(found, parameter.name, 0.0, 1.0)
        return found

    return own


def compared(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    payload: Payload,
    turn: Turn,
    own: Callable[[Parameter], Tensor],
    ranks: Ranks,
    by_chance: float = 0.0,
) -> Evidence | None:
    """`parameters`: those that the payload is about; `turn`: as the compressor counts rounds; `own`: what the
    work comes to, flat, as far as this rank holds it. None: that is zero or not finite."""
    agreement, n = Agreement(), 0
    for p in parameters:
        n += p.part.n_global
        if ranks.index > 0 and not is_sharded(p.tensor):
            continue  # every rank has it whole
        expected = own(p)
        with exact_arithmetic():
            sent = compressor.decode_on(p.local.device, [payload[p.name]], [1.0], p.part, turn)
        agreement.add(sent, expected)
    agreement.sum_over(ranks)
    cosine = agreement.cosine
    limit = min(MOST_LIMIT, SPREADS / max(1.0, n**0.5))
    return None if cosine is None else Evidence(cosine, limit, CLEAR * limit, agreement.where_sent, by_chance)


@contextmanager
def no_gradients(strategy: Strategy) -> Iterator[None]:
    """Those in place are put aside meanwhile."""
    tensors = [p.tensor for p in strategy.parameters_in_order()]
    aside = [t.grad for t in tensors]
    try:
        yield
    finally:
        for t, grad in zip(tensors, aside, strict=True):
            t.grad = grad
