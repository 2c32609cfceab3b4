"""How long a silence a seat bears: what is usual here, several times over."""

from __future__ import annotations

from typing import Final

from .events import Timing

_TIMES: Final = 3
"""Patience over the longest usual silence."""

_MOST: Final = 3
"""At most so many times the patience of a quick network: a leader who is dead is missed in the end."""

_KEPT: Final = 0.99
"""Of the longest silence, with every word: halved after 70 of them."""

_LEADERS: Final = 4
"""Whose last word is kept: one who was given up, and speaks again, shows that the patience was too short."""


class Patience:
    """A leader on a busy machine, or behind a slow link, speaks late: that deposes it once, not for ever."""

    def __init__(self, timing: Timing) -> None:
        self._least_s, self._longest_s = timing.patience_s, 0.0
        self._heard_s: dict[int, float] = {}
        """By the leaders' ballots."""

    @property
    def s(self) -> float:
        return max(self._least_s, _TIMES * self._longest_s)

    def heard(self, ballot: int, now_s: float) -> None:
        """A word of the leader, or the former leader, whose ballot it is."""
        last_s = self._heard_s.pop(ballot, now_s)
        self._heard_s[ballot] = now_s
        if len(self._heard_s) > _LEADERS:
            del self._heard_s[next(iter(self._heard_s))]
        silence_s = now_s - last_s
        if silence_s > _MOST * self._least_s:
            return  # of a machine that stood still or was cut off: no patience would have borne that
        silence_s = min(silence_s, _MOST * self._least_s / _TIMES)
        self._longest_s = max(silence_s, _KEPT * self._longest_s)
