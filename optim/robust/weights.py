"""What each share of a round counts for in its mean, for strategies that send vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ...compression.base import Compressor, Turn
from ...compression.exact import exact_arithmetic
from ..base import Parameter, Share, Strategy
from ..parts.clip import Weighing, clipped_weights, sample_weights, total, weigh
from .centred import centred


def with_copies(shares: Sequence[Share], sent: Sequence[bytes]) -> list[Share]:
    """The same, and how often each payload is among them. `sent`: their bytes."""
    n_times = Counter(sent)
    return [replace(share, n_copies=n_times[data]) for share, data in zip(shares, sent, strict=True)]


def weighed(
    strategy: Strategy,
    compressor: Compressor,
    parameters: Sequence[Parameter],
    shares: Sequence[Share],
    turn: Turn,
    clips_norms: bool,
) -> Weighing:
    """Of the round's payloads, which hold these parameters. `clips_norms`: also without a bound.

    1 for every offer, or its samples; less for those whose L1 norm is beyond the limit of the round.
    """
    equal, bound = strategy.option("weights") == "equal", strategy.option("bound")
    if bound > 0.0:
        norms = _norms(compressor, parameters, shares, turn)
        share, alone = strategy.option("own_data_share"), strategy.option("own_data_alone")
        w = weigh(norms, shares, not equal, bound, share, alone, strategy.option("newcomers"))
    else:
        clip = strategy.option("clip")
        weights = [1.0] * len(shares) if equal else sample_weights([s.n_samples for s in shares], clip)
        if clips_norms:
            weights = clipped_weights(_norms(compressor, parameters, shares, turn), weights, clip)
        w = Weighing(weights, weights)
    if strategy.option("aggregate") == "centred":
        return centred(compressor, parameters, shares, turn, w)
    return w


def sender_floor_of(strategy: Strategy) -> float | None:
    """Of a mean over the senders of a coefficient; None of the mean over all."""
    return float(strategy.option("sender_floor")) if strategy.option("mean") == "senders" else None


def _norms(
    compressor: Compressor, parameters: Sequence[Parameter], shares: Sequence[Share], turn: Turn
) -> list[float]:
    """The L1 norm of every payload, of whole parameters, whatever this rank holds of them."""
    with exact_arithmetic():
        norms = [
            compressor.magnitudes([s.payload[p.name] for s in shares], p.part.entire, turn)
            for p in parameters
        ]
    return [total(of_share) for of_share in zip(*norms, strict=True)] if norms else [0.0] * len(shares)
