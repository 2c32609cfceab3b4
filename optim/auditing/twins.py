"""Which payloads of a round are too much alike to be two peers' own work, though not bit for bit.

Payloads of one round point the same way as far as their batches agree, and then it is about the same for any
two of them: a pair that agrees far better than others do has one origin. That says nothing of whose it is:
an auditor asks both peers' batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Final

FEWEST: Final = 3
"""Others of the round: two say nothing of what is usual."""

NEAR: Final = 0.1
"""Of what usually is missing to a cosine of 1. Peers with ten times the samples of others come as near."""


def nearest_twins(cosines: Sequence[float]) -> list[int]:
    """Those of the others, by their place, that are one payload with the one that they were compared with.
    `cosines`: with each; see `Strategy.cosines`."""
    if len(cosines) < FEWEST:
        return []
    usual = 1.0 - median_low(cosines)
    return [i for i, cosine in enumerate(cosines) if 1.0 - cosine < NEAR * usual]
