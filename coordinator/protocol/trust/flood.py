"""Whether strangers come in numbers and do no work: from newcomers' first audits. Pure, and integers."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final

LAST: Final = 8
"""Newcomers whose first audits are looked at, at most."""

ROUNDS: Final = 200
"""What was found is forgotten after so many."""


class Flood:
    """Of one run: it is on while so many as `failures` of the last newcomers failed their first audit."""

    def __init__(self, failures: int) -> None:
        self._failures = failures
        self._found: deque[tuple[int, bool]] = deque(maxlen=LAST)
        self._turns: list[int] = []
        """The first rounds in which it is on, is not, and so on in turn."""

    def is_on(self, round_: int) -> bool:
        """In any round up to the one after the newest that is known."""
        return bisect_right(self._turns, round_) % 2 == 1

    def committed(self, round_: int, first_audits: list[bool]) -> None:
        """Rounds come in order. `first_audits`: whether they failed, of those that the record has decided."""
        self._found.extend((round_, failed) for failed in first_audits)
        while self._found and self._found[0][0] <= round_ - ROUNDS:
            self._found.popleft()
        if (sum(failed for _, failed in self._found) >= self._failures) != self.is_on(round_ + 1):
            self._turns.append(round_ + 1)
