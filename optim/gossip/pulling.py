"""What a peer's model is pulled by: how its neighbours' differ from it, none for more than it may."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from ..base import Parameter

REMEMBERED = 16
"""Lengths of earlier differences: with a neighbour or two in a round there is no median to speak of."""


@dataclass(frozen=True, slots=True)
class Pull:
    """A neighbour's model less one's own: flat float32 for each parameter, made when it is asked for.
    `weight`: of it in the round."""

    peer: str
    weight: float
    difference: Callable[[Parameter], Tensor]


class Limiter:
    """No difference pulls as if it were longer than `factor` times the median of the neighbours', of this
    round and of the last ones; the lower one of two. A peer that has seen fewer than two takes how far it is
    from the reference model itself for the median."""

    def __init__(self) -> None:
        self._earlier: deque[float] = deque(maxlen=REMEMBERED)

    def kept(self, lengths: Sequence[float], own_way: float, factor: float) -> list[float]:
        """What is left of each: 1, or less. `own_way`: L2, from the reference model."""
        known = sorted([*self._earlier, *(x for x in lengths if isfinite(x))])
        usual = known[(len(known) - 1) // 2] if len(known) > 1 else own_way
        limit = factor * usual
        shares = [_share(x, limit) for x in lengths]
        self._earlier.extend(x * share for x, share in zip(lengths, shares, strict=True) if share > 0)
        return shares


def _share(length: float, limit: float) -> float:
    if not isfinite(length):
        return 0.0
    return 1.0 if length <= limit else limit / length


def lengths(parameters: Sequence[Parameter], pulls: Sequence[Pull]) -> list[float]:
    """L2, over all parameters."""
    return [length(parameters, pull.difference) for pull in pulls]


def length(parameters: Sequence[Parameter], values: Callable[[Parameter], Tensor]) -> float:
    """L2 over all parameters."""
    return sqrt(sum(float(torch.linalg.vector_norm(values(p))) ** 2 for p in parameters))


def pulled(parameter: Parameter, pulls: Sequence[Pull], kept: Sequence[float]) -> Tensor:
    """The sum of the differences by weight; flat, a tensor of its own."""
    total = torch.zeros(parameter.part.n_local, device=parameter.local.device)
    for pull, share in zip(pulls, kept, strict=True):
        if share > 0:
            total.add_(pull.difference(parameter).to(total.device) * (pull.weight * share))
    return total
