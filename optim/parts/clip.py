"""No offer can wreck a run: nothing counts for more than a multiple of the median of what was counted.

All of it in Python floats with + - * / only, rounded once to float32: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Protocol

from ...compression.exact import to_float32

MAX_WEIGHT = 2**20
"""More samples than that count no more."""

SMALLEST_WEIGHT = 2.0**-40
"""A weight below what compressors take is as good as none."""

MOST_WORK: Final = 2.0
"""With a bound: nobody's samples or probes count for more than this many times their lower median."""


class Claim(Protocol):
    """What an offer says of itself, see `Share`."""

    @property
    def n_samples(self) -> int: ...

    @property
    def n_copies(self) -> int: ...

    @property
    def own_data(self) -> bool: ...

    @property
    def is_new(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Weighing:
    """What became of a round's shares, in their order.

    The exact mean of the round is `dilution` times the mean by `weights`: weights are smaller for payloads
    that were scaled down, and the sum that they are divided by is that of the `whole` ones. For people, and
    only with a bound: `kept`, what each payload was scaled by, at most 1; `sizes`, norms against the round's
    lower median before that, 0 for those that sent nothing.
    """

    weights: list[float]  # float32 values
    whole: list[float]  # float32 values
    dilution: float = 1.0  # a float32 value
    kept: tuple[float, ...] = ()
    sizes: tuple[float, ...] = ()


def total(values: Iterable[float]) -> float:
    """Added in order. (Python's `sum` compensates for rounding from 3.12 on, and not before.)"""
    found = 0.0
    for value in values:
        found += value
    return found


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


# ------------------------------------------------------------------------------------------- with a bound


def lower_median(sizes: Sequence[float], claims: Sequence[Claim] | None = None) -> float:
    """Of the sizes that are not zero; 0.0 without one. Of an even number of them the smaller middle one, so
    that half of the peers cannot raise it. Copies of a payload count as one."""
    counted = [(size, Fraction(1)) for size in sizes]
    if claims is not None:
        counted = [(size, Fraction(1, c.n_copies)) for size, c in zip(sizes, claims, strict=True)]
    counted = sorted((size, n) for size, n in counted if size != 0.0)
    half, reached = sum((n for _, n in counted), Fraction(0)) / 2, Fraction(0)
    for size, n in counted:
        reached += n
        if reached >= half:
            return size
    return 0.0


def work_weights(
    work: Sequence[float],
    claims: Sequence[Claim],
    own_data_share: float,
    own_data_alone: bool = False,
    newcomers: float = 1.0,
) -> list[float]:
    """What each offer weighs for its samples or probes: `MOST_WORK` lower medians of them at most.

    Copies of a payload share one weight. New peers have `newcomers` of theirs where the others have half of
    all at least: so nobody's part of it doubles. Peers with their own data have `own_data_share` of all at
    most, unless it is 0: then that does not concern them. In a round that has nobody else they have nothing,
    or all if `own_data_alone`.
    """
    limit = MOST_WORK * lower_median(work, claims)
    weights = [min(n, limit) / c.n_copies for n, c in zip(work, claims, strict=True)]
    concerned = [not (c.own_data and own_data_share == 0.0) for c in claims]
    every = list(zip(weights, claims, concerned, strict=True))
    new, known = (total(w for w, c, has_to in every if has_to and c.is_new == x) for x in (True, False))
    if new <= known:
        weights = [w * newcomers if has_to and c.is_new else w for w, c, has_to in every]
    if own_data_share == 0.0:
        return weights
    own = total(w for w, c in zip(weights, claims, strict=True) if c.own_data)
    others = total(w for w, c in zip(weights, claims, strict=True) if not c.own_data)
    if own_data_alone and others == 0.0:
        return weights
    most = own_data_share / (1.0 - own_data_share) * others
    if own <= most:
        return weights
    return [w * (most / own) if c.own_data else w for w, c in zip(weights, claims, strict=True)]


def bounded(norms: Sequence[float], claims: Sequence[Claim], bound: float) -> tuple[float, ...]:
    """What each payload is to be scaled by so that no norm is beyond `bound` lower medians; at most 1."""
    limit = bound * lower_median(norms, claims)
    return tuple(1.0 if norm <= limit else limit / norm for norm in norms)


def relative(norms: Sequence[float], claims: Sequence[Claim]) -> tuple[float, ...]:
    """Norms against their lower median."""
    middle = lower_median(norms, claims)
    return tuple(norm / middle if norm != 0.0 else 0.0 for norm in norms)


def weigh(
    norms: Sequence[float],
    claims: Sequence[Claim],
    by_samples: bool,
    bound: float,
    own_data_share: float,
    own_data_alone: bool = False,
    newcomers: float = 1.0,
) -> Weighing:
    """Of a round whose mean is bounded; see `Weighing`.

    A payload that is scaled down keeps its weight in what the sum is divided by: else the others would grow
    with it.
    """
    work = [float(min(max(c.n_samples, 0), MAX_WEIGHT)) if by_samples else 1.0 for c in claims]
    whole = [_weight(w) for w in work_weights(work, claims, own_data_share, own_data_alone, newcomers)]
    kept = bounded(norms, claims, bound)
    weights = [_weight(w * k) for w, k in zip(whole, kept, strict=True)]
    n = total(whole)
    dilution = to_float32(total(weights) / n) if n > 0.0 else 0.0
    return Weighing(weights, whole, dilution, kept, relative(norms, claims))


def _weight(w: float) -> float:
    return to_float32(w) if w >= SMALLEST_WEIGHT else 0.0
