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

    @property
    def has_failed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """On which some peers weigh less than others: options of `BoundedOptions`, as older runs have them."""

    own_data_share: float = 0.0
    own_data_alone: bool = False
    newcomers: float = 1.0
    newcomers_share: float = 0.0

    def concern(self, claim: Claim) -> bool:
        """Whether it matters how long its peer has been known."""
        return not (claim.own_data and self.own_data_share == 0.0)

    def is_judged_by(self, claim: Claim) -> bool:
        """Whether the round's medians are taken over this offer where `newcomers_share` says whose count."""
        return not (self.concern(claim) and (claim.is_new or claim.has_failed))


PLAIN: Final = Terms()


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


def lower_median(
    sizes: Sequence[float], claims: Sequence[Claim] | None = None, terms: Terms = PLAIN
) -> float:
    """Of the sizes that are not zero; 0.0 without one. Of an even number of them the smaller middle one, so
    that half of the peers cannot raise it. Copies of a payload count as one. With `newcomers_share` it is
    that of the peers who are known, if any of them has sent something: however many are new."""
    if claims is not None and terms.newcomers_share > 0.0:
        known = [(size, c) for size, c in zip(sizes, claims, strict=True) if terms.is_judged_by(c)]
        if any(size != 0.0 for size, _ in known):
            return lower_median([size for size, _ in known], [c for _, c in known])
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


def work_weights(work: Sequence[float], claims: Sequence[Claim], terms: Terms = PLAIN) -> list[float]:
    """What each offer weighs for its samples or probes: `MOST_WORK` lower medians of them at most.

    Copies of a payload share one weight. Peers whose last audit has failed weigh nothing.
    """
    limit = MOST_WORK * lower_median(work, claims, terms)
    weights = [
        0.0 if c.has_failed and terms.concern(c) else min(n, limit) / c.n_copies
        for n, c in zip(work, claims, strict=True)
    ]
    return _of_own_data(_of_newcomers(weights, claims, terms), claims, terms)


def _of_newcomers(weights: list[float], claims: Sequence[Claim], terms: Terms) -> list[float]:
    """New peers have `newcomers` of their weight, and all of them together `newcomers_share` of a round that
    has others, at most. Where that is 0 they have all of theirs unless the others have half of the round: so
    nobody's part of it doubles."""
    every = [(w, c.is_new) for w, c in zip(weights, claims, strict=True) if terms.concern(c)]
    new, known = (total(w for w, is_new in every if is_new == x) for x in (True, False))
    share, factor = terms.newcomers_share, terms.newcomers
    if share > 0.0 and known > 0.0 and new > 0.0:
        factor = min(factor, share / (1.0 - share) * known / new)
    elif share > 0.0 or new > known:
        factor = 1.0
    return [w * factor if terms.concern(c) and c.is_new else w for w, c in zip(weights, claims, strict=True)]


def _of_own_data(weights: list[float], claims: Sequence[Claim], terms: Terms) -> list[float]:
    """Peers with their own data have `own_data_share` of all at most, unless it is 0: then that does not
    concern them. In a round that has nobody else they have nothing, or all if `own_data_alone`."""
    if terms.own_data_share == 0.0:
        return weights
    own = total(w for w, c in zip(weights, claims, strict=True) if c.own_data)
    others = total(w for w, c in zip(weights, claims, strict=True) if not c.own_data)
    if terms.own_data_alone and others == 0.0:
        return weights
    most = terms.own_data_share / (1.0 - terms.own_data_share) * others
    if own <= most:
        return weights
    return [w * (most / own) if c.own_data else w for w, c in zip(weights, claims, strict=True)]


def bounded(
    norms: Sequence[float], claims: Sequence[Claim], bound: float, terms: Terms = PLAIN
) -> tuple[float, ...]:
    """What each payload is to be scaled by so that no norm is beyond `bound` lower medians; at most 1. With
    `newcomers_share` one median is enough for who is new."""
    middle = lower_median(norms, claims, terms)
    limits = [
        (bound if terms.newcomers_share == 0.0 or terms.is_judged_by(c) else min(bound, 1.0)) * middle
        for c in claims
    ]
    return tuple(1.0 if norm <= limit else limit / norm for norm, limit in zip(norms, limits, strict=True))


def relative(norms: Sequence[float], claims: Sequence[Claim], terms: Terms = PLAIN) -> tuple[float, ...]:
    """Norms against their lower median."""
    middle = lower_median(norms, claims, terms)
    return tuple(norm / middle if norm != 0.0 else 0.0 for norm in norms)


def weigh(
    norms: Sequence[float], claims: Sequence[Claim], by_samples: bool, bound: float, terms: Terms = PLAIN
) -> Weighing:
    """Of a round whose mean is bounded; see `Weighing`.

    A payload that is scaled down keeps its weight in what the sum is divided by: else the others would grow
    with it.
    """
    work = [float(min(max(c.n_samples, 0), MAX_WEIGHT)) if by_samples else 1.0 for c in claims]
    whole = [_weight(w) for w in work_weights(work, claims, terms)]
    kept = bounded(norms, claims, bound, terms)
    weights = [_weight(w * k) for w, k in zip(whole, kept, strict=True)]
    n = total(whole)
    dilution = to_float32(total(weights) / n) if n > 0.0 else 0.0
    return Weighing(weights, whole, dilution, kept, relative(norms, claims, terms))


def _weight(w: float) -> float:
    return to_float32(w) if w >= SMALLEST_WEIGHT else 0.0
