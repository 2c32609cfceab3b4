"""No offer can wreck a run: nothing counts for more than a multiple of the median of what was counted."""

from __future__ import annotations

from collections.abc import Sequence


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
