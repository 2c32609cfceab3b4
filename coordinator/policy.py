"""When a round closes although somebody is still awaited (design: section 5, "Closing policy")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

PolicyName = Literal["deadline", "all"]

KEPT_ROUNDS = 16
MEASURED_ROUNDS = 3
"""No deadline until this many rounds are measured."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds after a round's opening at which what is there is enough.

    `drops`: who is missing then is taken for hung, and not awaited again until it makes an offer.
    """

    after_s: float
    drops: bool


class OfferTimes:
    """Seconds from a round's opening until an offer was eligible, late ones included, by round."""

    def __init__(self) -> None:
        self._by_round: dict[int, list[float]] = {}

    def record(self, round_: int, time_s: float) -> None:
        self._by_round.setdefault(round_, []).append(time_s)
        for old in sorted(self._by_round)[:-KEPT_ROUNDS]:
            del self._by_round[old]

    def values(self, before: int) -> list[float]:
        """All times of rounds before this one."""
        return [t for r, times in self._by_round.items() if r < before for t in times]

    def n_rounds(self, before: int) -> int:
        return sum(r < before for r in self._by_round)


def limit(policy: PolicyName, times: OfferTimes, round_: int) -> Limit:
    """The limit of the open round.

    `deadline` follows the rounds before this one; until enough are measured it is as patient as `all`,
    which gives up a peer whose trainer hangs while its heartbeat lives.
    """
    measured = times.values(before=round_)
    if policy == "deadline" and times.n_rounds(before=round_) >= MEASURED_ROUNDS:
        return Limit(deadline_s(measured), drops=False)
    return Limit(patience_s(times.values(before=round_ + 1)), drops=True)


def deadline_s(times: Sequence[float]) -> float:
    """median + max(4 MAD, 0.5 median, 0.5 s)."""
    middle = median(times)
    mad = median(abs(t - middle) for t in times)
    return middle + max(4 * mad, 0.5 * middle, 0.5)


def patience_s(times: Sequence[float]) -> float:
    """max(10 medians, 60 s); the offers of the open round count too, so that slow models are not cut off."""
    return max(10 * median(times), 60.0) if times else 60.0
