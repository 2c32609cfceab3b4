"""What each share of a round counts for in its mean, for strategies that send vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Final

from ...compression.base import Compressor, Turn
from ...compression.exact import exact_arithmetic
from ..base import Parameter, Share, Strategy, wholes
from ..parts.clip import Terms, Weighing, clipped_weights, sample_weights, total, weigh
from .centred import centred

NEXT_TO_NOTHING: Final = 16.0
"""So many times less than the largest weight of the round."""


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
        w = weigh(norms, shares, not equal, bound, terms_of(strategy))
    else:
        clip = strategy.option("clip")
        weights = [1.0] * len(shares) if equal else sample_weights([s.n_samples for s in shares], clip)
        if clips_norms:
            weights = clipped_weights(_norms(compressor, parameters, shares, turn), weights, clip)
        w = Weighing(weights, weights)
    if strategy.option("aggregate") == "centred":
        return centred(compressor, parameters, shares, turn, w, terms_of(strategy))
    return w


def terms_of(strategy: Strategy) -> Terms:
    """As the options of the strategy have them."""
    return Terms(**{f.name: strategy.option(f.name) for f in fields(Terms)})


def n_moving(w: Weighing) -> int:
    """Payloads of a round whose values move something: of those that hold nothing, and of those of next to no
    weight, as of many who are new, there may be any number."""
    least = max(w.whole, default=0.0) / NEXT_TO_NOTHING
    sizes = w.sizes or (1.0,) * len(w.weights)
    return sum(
        weight > 0.0 and whole >= least and size > 0.0
        for weight, whole, size in zip(w.weights, w.whole, sizes, strict=True)
    )


def sender_floor_of(strategy: Strategy) -> float | None:
    """Of a mean over the senders of a coefficient; None of the mean over all."""
    return float(strategy.option("sender_floor")) if strategy.option("mean") == "senders" else None


def _norms(
    compressor: Compressor, parameters: Sequence[Parameter], shares: Sequence[Share], turn: Turn
) -> list[float]:
    """The L1 norm of every payload, of whole parameters, whatever this rank holds of them."""
    with exact_arithmetic():
        norms = compressor.magnitudes([s.payload for s in shares], wholes(parameters), turn)
    return [total(of_share) for of_share in zip(*norms, strict=True)] if norms else [0.0] * len(shares)
