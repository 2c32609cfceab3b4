"""How noisy a peer's payload is against what all peers share: the gradient noise scale, across peers.

Of payloads p_i, each made from n_i samples (McCandlish et al., "An Empirical Model of Large-Batch Training",
arXiv 1812.06162, "simple" noise scale; here from pairs, so that the n_i may differ):

    |G|^2 = mean of <p_i, p_j>, i != j          what they share
    tr S  = mean of n_i (|p_i|^2 - |G|^2)       the variance that one sample brings
    B     = tr S / |G|^2                        samples: a round with many more gains little by still more

The first two are unbiased, and noisy: B is a quotient of their means over rounds. They are given as shares of
the round's mean |p_i|^2, so that neither the learning rate nor the length of the gradient matters.

Where peers select the coefficients that they send, what only one of them sends counts as noise: B is too
large. Of pseudo-gradients B is about what H inner steps have in common, not about single gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from ..compression.base import Compressor, Turn
from ..compression.exact import exact_arithmetic
from .base import Noise, Parameter, Share, Vectors
from .parts.clip import Weighing

MOST: Final = 16
"""Payloads that are looked at."""


def noise_of(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    shares: Sequence[Share],
    turn: Turn,
    weighing: Weighing | None,
    of: Vectors,
) -> Noise | None:
    """None: fewer than two payloads hold anything. `parameters`: those that the payloads are about; `turn`:
    as the compressor counts rounds; `weighing`: of the round, so that nobody's payload decides by its size.
    """
    kept = (1.0,) * len(shares) if weighing is None or not weighing.kept else weighing.kept
    every = list(zip(shares, kept, strict=True))
    chosen = every[:: max(1, -(-len(every) // MOST))]
    squares, of_sum = [0.0] * len(chosen), 0.0
    for p in parameters:
        total = torch.zeros(p.part.n_global, dtype=torch.float64, device=p.local.device)
        for i, (share, times) in enumerate(chosen):
            with exact_arithmetic():
                sent = compressor.decode_on(total.device, [share.payload[p.name]], [1.0], p.part.entire, turn)
            x = sent.double().mul_(times)
            squares[i] += float(torch.dot(x, x))
            total += x
        of_sum += float(torch.dot(total, total))
    return _noise([share.n_samples for share, _ in chosen], squares, of_sum, of)


def _noise(n_samples: Sequence[int], squares: Sequence[float], of_sum: float, of: Vectors) -> Noise | None:
    """`squares`: |p_i|^2; `of_sum`: of the sum of all."""
    known = [(n, square) for n, square in zip(n_samples, squares, strict=True) if square > 0.0]
    if len(known) < 2:
        return None
    n, mean = len(known), sum(square for _, square in known) / len(known)
    signal = (of_sum / mean - n) / (n * (n - 1))
    noise = sum(samples * (square / mean - signal) for samples, square in known) / n
    return Noise(signal, noise, sum(samples for samples, _ in known) / n, of)
