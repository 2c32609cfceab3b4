"""Centred clipping (arXiv 2012.10333): what is far from the centre of the round counts for less.

    v = 0
    three times:  v = v + mean of (x_i - v) min(1, r / |x_i - v|)

x_i are the payloads, after the bound; |.| is the L1 norm over all parameters, r the lower median of these
norms, so that nobody has to choose it. v is a weighted sum of the x_i: what is found are its weights, and the
mean by them is taken as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from ...compression.base import Compressor, Turn
from ...compression.exact import exact_arithmetic, to_float32
from ...compression.numerics.reduce import l1_norm
from ..base import Parameter, Share
from ..parts.clip import SMALLEST_WEIGHT, Terms, Weighing, bounded, total

N_STEPS: Final = 3


def centred(
    compressor: Compressor, parameters: Sequence[Parameter], shares: Sequence[Share], turn: Turn, w: Weighing,
    terms: Terms,
) -> Weighing:  # fmt: skip
    """The same round, by the weights of its centre. `terms`: of the median."""
    of_all = total(w.whole)
    if of_all == 0.0:
        return w
    kept = w.kept or (1.0,) * len(shares)
    part_S = [whole / of_all for whole in w.whole]  # of the round's weight
    centre_S = [0.0] * len(shares)
    for _ in range(N_STEPS):
        far_S = _distances(compressor, parameters, shares, turn, kept, centre_S)
        near_S = bounded(far_S, shares, 1.0, terms)
        step_S = [p * near for p, near in zip(part_S, near_S, strict=True)]
        left = 1.0 - total(step_S)
        centre_S = [c * left + s for c, s in zip(centre_S, step_S, strict=True)]
    weights = [to_float32(c * k) for c, k in zip(centre_S, kept, strict=True)]
    weights = [x if x >= SMALLEST_WEIGHT else 0.0 for x in weights]
    found = tuple(c * k / p if p else 0.0 for c, k, p in zip(centre_S, kept, part_S, strict=True))
    return replace(w, weights=weights, dilution=to_float32(total(weights)), kept=found)


def _distances(
    compressor: Compressor, parameters: Sequence[Parameter], shares: Sequence[Share], turn: Turn,
    kept: Sequence[float], centre_S: Sequence[float],
) -> list[float]:  # fmt: skip
    """From every payload to the centre, of whole parameters, whatever this rank holds of them."""
    norm_S = [0.0] * len(shares)
    with exact_arithmetic():
        for p in parameters:
            x_S = [
                compressor.decode([s.payload[p.name]], [1.0], p.part.entire, turn).mul_(to_float32(k))
                for s, k in zip(shares, kept, strict=True)
            ]
            centre = _sum(x_S, centre_S)
            for i, x in enumerate(x_S):
                norm_S[i] += l1_norm(x.sub_(centre))
    return norm_S


def _sum(x_S: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """In order, one rounding per operation."""
    found = torch.zeros_like(x_S[0])
    for x, w in zip(x_S, weights, strict=True):
        found.add_(x * to_float32(w))
    return found
