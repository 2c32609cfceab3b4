"""What shares weigh whose peers do not offer in every round. Exact: Python floats, rounded once.

favano     times the rounds since the peer's last offer: who offers in one round of five counts five times
           in it, so that over many rounds peers count by their work alone (FAVANO, arXiv 2305.16099, with
           alpha = P(q > 0) q). A round's mean is taken times (sum of these) / (peers that are there), as a
           round without the slow ones is not all of a mean, and one with them more.
discount   times 1 / sqrt(that number): what is old counts less (arXiv 2401.09135, 1 / sqrt(1 + staleness))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from ...compression.exact import root, to_float32
from ..base import Share
from ..parts.clip import Weighing, total

Pace = Literal["none", "favano", "discount"]

MOST: Final = 16.0
"""Rounds between two offers that count; a power of two, so that weights divided by it stay exact."""

MOST_SCALE: Final = 4.0
"""Of a round's mean."""


def by_pace(w: Weighing, shares: Sequence[Share], pace: Pace) -> Weighing:
    """The same, reweighted."""
    if pace == "none":
        return w
    factors = [_factor(share.gap, pace) for share in shares]

    def times(weights: Sequence[float]) -> list[float]:
        return [to_float32(x * factor) for x, factor in zip(weights, factors, strict=True)]

    weights, whole = times(w.weights), times(w.whole)
    n = total(whole)
    dilution = w.dilution if w.dilution == 1.0 or n == 0.0 else to_float32(total(weights) / n)
    return replace(w, weights=weights, whole=whole, dilution=dilution)


def mean_scale(shares: Sequence[Share], pace: Pace) -> float:
    """A float32 value that the round's mean is to be taken times."""
    if pace != "favano" or not shares:
        return 1.0
    n_there = max(len(shares), shares[0].n_active)
    return to_float32(min(MOST_SCALE, total(float(share.gap) for share in shares) / n_there))


def _factor(gap: int, pace: Pace) -> float:
    gap = max(1, gap)
    return min(gap / MOST, 1.0) if pace == "favano" else 1.0 / root(float(gap))
