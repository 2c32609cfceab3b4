"""No offer can wreck a run: nothing counts for more than a multiple of the median of what was counted."""

from __future__ import annotations

from collections.abc import Sequence

from ...compression.exact import to_float32

MAX_WEIGHT = 2**20
"""More samples than that count no more."""

SMALLEST_WEIGHT = 2.0**-40
"""A weight below what compressors take is as good as none."""


def clip_limit(sizes: Sequence[float], clip: float) -> float:
    """`clip` times the median of the sizes that are not zero; 0.0 without one.

    In Python floats, the same on every machine; of an even number of sizes the mean of the middle two.
    """
    nonzero = sorted(size for size in sizes if size != 0.0)
    if not nonzero:
        return 0.0
    half = len(nonzero) // 2
    middle = nonzero[half] if len(nonzero) % 2 else (nonzero[half - 1] + nonzero[half]) / 2
    return clip * middle


def sample_weights(n_samples: Sequence[int], clip: float) -> list[float]:
    """float32 values: the samples of every offer, up to `clip` times their median in the round."""
    counts = [float(min(max(n, 0), MAX_WEIGHT)) for n in n_samples]
    limit = clip_limit(counts, clip)
    return [to_float32(min(n, limit)) for n in counts]


def clipped_weights(norms: Sequence[float], weights: Sequence[float], clip: float) -> list[float]:
    """The offers' weights, float32 values; less for those whose norm is beyond the limit of the round."""
    limit = clip_limit(norms, clip)
    clipped = [w if norm <= limit else w * (limit / norm) for w, norm in zip(weights, norms, strict=True)]
    return [to_float32(w) if w >= SMALLEST_WEIGHT else 0.0 for w in clipped]
