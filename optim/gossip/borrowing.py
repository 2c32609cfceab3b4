"""Which of its neighbours' models a peer goes on from that has just come."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor

Borrowed = dict[str, Tensor]
"""theta - x_j, flat, by parameter."""


def median_of(models: Sequence[Borrowed]) -> Borrowed | None:
    """The one whose way from theta is the median of theirs, the shorter of two; None: there is none."""
    found = [(way, i) for i, model in enumerate(models) if isfinite(way := _way(model))]
    if not found:
        return None
    return models[sorted(found)[(len(found) - 1) // 2][1]]


def _way(model: Borrowed) -> float:
    return sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in model.values()))
