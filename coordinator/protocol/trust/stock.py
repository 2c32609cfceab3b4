"""What audits of newcomers may take of the auditors' work: any number of identities can come at once.

Counted in millionths of a round's work of each auditor, in integers, so that any language counts the same.
"""

from __future__ import annotations

from typing import Final

ROUND: Final = 1_000_000
"""A round's work of every auditor."""

MOST: Final = 16 * ROUND
"""What is saved up in quiet times, and there from the start, when everybody is new."""

MOST_AT_ONCE: Final = 3 * ROUND
"""In one round: what is done too late says nothing."""


class Stock:
    """Of one run; `rate_millionths`: what comes back in a round. Pure."""

    def __init__(self, rate_millionths: int) -> None:
        self._rate = rate_millionths
        self._left, self._spent = MOST, 0

    def next_round(self) -> None:
        self._left, self._spent = min(MOST, self._left + self._rate), 0

    def take(self, n_auditors: int, n_able: int) -> bool:
        """For an audit by so many of those who can; False: there is not enough left, and nothing is taken."""
        cost = -(-n_auditors * ROUND // n_able)
        if cost > self._left or cost > MOST_AT_ONCE - self._spent:
            return False
        self._left, self._spent = self._left - cost, self._spent + cost
        return True
