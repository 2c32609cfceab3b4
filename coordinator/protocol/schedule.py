"""The learning-rate factor of each round: host arithmetic with + - * / only, rounded once to float32.

The cosine is computed in integers: a libm's differs from another's in the last bit, and with it the record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Final

from .messages import OfferEntry
from .settings import Course, ScheduleSection

_BITS: Final = 160
"""Behind the point of the fixed-point numbers that the cosine's series is summed in."""

_KEPT_BITS: Final = 100
"""Behind the point of the cosine: the series is wrong by less than 2^-150, which the rounding takes away."""

_RECENT: Final = 8
"""Rounds whose samples a learning rate goes by: an offer that comes too late for once hardly moves it."""

_PI: Final = 0x3243F6A8885A308D313198A2E03707344A4093822
"""pi 2^160, rounded down."""


def float32_bits(x: float) -> int:
    """The bits of `x` rounded to the nearest float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", x))[0]
    return bits


def float32_of_bits(bits: int) -> float:
    """The inverse of `float32_bits`."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


@dataclass(frozen=True, slots=True)
class Samples:
    """What the ledger's last rounds counted. `recent`: the newest at the end; rounds without any are left
    out."""

    recent: tuple[int, ...] = ()

    def after(self, offers: tuple[OfferEntry, ...]) -> Samples:
        """After a record with these."""
        counted = sum(offer.n_samples for offer in offers)
        return Samples((*self.recent, counted)[-_RECENT:]) if counted else self

    def share(self, whole: int) -> Fraction:
        """Their mean as a share of `whole`, at most 1; 1 before there is any."""
        if not self.recent:
            return Fraction(1)
        return min(Fraction(1), Fraction(sum(self.recent), len(self.recent) * whole))


def lr_factor(schedule: ScheduleSection, round_: int, n_rounds: int, samples: Samples = Samples()) -> float:
    """Factor of round `round_` (from 1), at most 1.

    With `batch_samples` it goes by the root of what the rounds before have counted (`samples`), as adaptive
    and sign steps do (arXiv 2205.10287). A peer that lies about its samples gets the rate that the run's
    file names, and no more.
    """
    factor = _by_round(schedule, round_, n_rounds)
    whole = schedule.batch_samples
    return factor if whole is None else factor * _root(samples.share(whole))


def _by_round(schedule: ScheduleSection, round_: int, n_rounds: int) -> float:
    """r/warmup in the warm-up, then 1 or the line down to `final_factor`.

    `linear` and `cosine` are 1 in the last round of the warm-up and `final_factor` in the last round of the
    run; between them the cosine falls as (1 + cos(pi share)) / 2. `power` is
    sqrt(warmup / r), whatever the run's length.
    """
    warmup = schedule.warmup_rounds
    if round_ < warmup:
        return round_ / warmup
    if schedule.name == "power":
        return _root(Fraction(max(1, warmup), round_))
    if schedule.name in ("constant", "batch") or n_rounds <= warmup:
        return 1.0
    done, whole = min(round_, n_rounds) - warmup, n_rounds - warmup
    if schedule.name == "cosine":
        final = Fraction(schedule.final_factor)
        return float(final + (1 - final) * (1 + cos_pi(Fraction(done, whole))) / 2)
    return 1.0 - (1.0 - schedule.final_factor) * (done / whole)


def _root(x: Fraction) -> float:
    """By an integer's root, the same on every machine. `x`: in [0, 1]."""
    return isqrt((x.numerator << 2 * _KEPT_BITS) // x.denominator) / (1 << _KEPT_BITS)


def cos_pi(share: Fraction) -> Fraction:
    """cos(pi share) to 100 bits behind the point, the same on every machine. `share`: in [0, 1].

    Taylor's series in integers: 1 - x^2 / 2! + x^4 / 4! - ..., with x = pi share up to pi / 2; beyond that
    cos(pi share) = -cos(pi (1 - share)).
    """
    if share > Fraction(1, 2):
        return -cos_pi(1 - share)
    x = _PI * share.numerator // share.denominator
    squared = x * x >> _BITS
    term = total = 1 << _BITS
    n = 0
    while term:
        n += 2
        term = (term * squared >> _BITS) // (n * (n - 1))
        total += term if n % 4 == 0 else -term
    rounded = (total + (1 << (_BITS - _KEPT_BITS - 1))) >> (_BITS - _KEPT_BITS)
    return Fraction(rounded, 1 << _KEPT_BITS)


def lr_factor_bits(course: Course, round_: int, samples: Samples = Samples()) -> int:
    """float32 bits of `lr_factor`: what records of the ledger carry."""
    return float32_bits(lr_factor(course.settings.schedule, round_, course.n_rounds, samples))
