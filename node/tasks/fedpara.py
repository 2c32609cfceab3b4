"""FedPara (arXiv 2108.06098): a linear layer's weight as the Hadamard product of two products of low rank.

    W = (X1 Y1^T) o (X2 Y2^T)          W: (m, n); X1, X2: (m, r); Y1, Y2: (n, r)

Its rank is up to r^2, from 2 r (m + n) numbers, and these are what is trained and sent. Files of weights have
W itself, under the name that a plain layer gives it: whoever reads them need not know of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, isqrt
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...optim.parts.ranks import is_sharded

FACTORS: Final = ("fedpara_x1", "fedpara_y1", "fedpara_x2", "fedpara_y2")
"""Parameters in the place of `weight`."""


class HadamardLinear(nn.Module):
    """(..., n) -> (..., m), as `nn.Linear`. Factors of any value."""

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        for name, size in zip(FACTORS, (m, n, m, n), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size, rank)))
        self.bias = nn.Parameter(torch.empty(m))

    def forward(self, x: Tensor) -> Tensor:
        weight = composed(*(getattr(self, name) for name in FACTORS))
        return functional.linear(x, weight, self.bias)


def composed(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """W of its factors."""
    return (x1 @ y1.T) * (x2 @ y2.T)


def rank_of(m: int, n: int, gamma: float) -> int:
    """Between the smallest rank whose square is that of any matrix (gamma 0), and the one that takes as many
    numbers as the matrix itself (gamma 1)."""
    smallest = isqrt(min(m, n) - 1) + 1
    largest = m * n // (2 * (m + n))
    return max(1, ceil((1 - gamma) * smallest + gamma * largest))


def saves(m: int, n: int, gamma: float) -> bool:
    """Whether the factors have fewer numbers than the matrix."""
    return 2 * rank_of(m, n, gamma) * (m + n) < m * n


def linear(n: int, m: int, gamma: float | None) -> nn.Module:
    """A layer from n to m: with factors where these have fewer numbers. `gamma`: None, plain."""
    if gamma is None or not saves(m, n, gamma):
        return nn.Linear(n, m)
    return HadamardLinear(n, m, rank_of(m, n, gamma))


def initial_scale(weight_scale: float, rank: int) -> float:
    """Of the normal noise in each factor, so that W begins with that of its own: that of r terms squared."""
    return float((weight_scale / rank) ** 0.25)


def plain_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same by name, with W in place of its factors. On a node of several ranks all of them call it."""
    found = {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in FACTORS}
    for name in tensors:
        layer, dot, last = name.rpartition(".")
        if last == FACTORS[0]:
            factors = [tensors[f"{layer}{dot}{factor}"].detach() for factor in FACTORS]
            found[f"{layer}{dot}weight"] = composed(*map(_whole, factors))
    return found


def _whole(t: Tensor) -> Tensor:
    whole: Tensor = t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]
    return whole
