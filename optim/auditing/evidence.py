"""What speaks for an offer after an auditor did its work again.

One number: the cosine between what the payload stands for and what the batches of its peer ask for. It is
blind to scale, which the bound in `apply` takes care of. Honest offers lie well above the limit at any stage
of training, payloads made of noise around zero, turned ones below it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, sqrt

import torch
from torch import Tensor

from ..parts.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Evidence:
    """`agreement`: from -1 to 1; an offer that has less than `limit` fails. An auditor that accuses another
    peer has at least `clear` with an offer of its own of the same round: else work says too little then.

    `where_sent`: the same over those values alone that the payload has; `by_chance`: how far from 0 that of
    an honest offer may be on batches that are not its peer's own.
    """

    agreement: float
    limit: float
    clear: float
    where_sent: float
    by_chance: float = 0.0

    @property
    def passed(self) -> bool:
        return self.agreement >= self.limit

    @property
    def is_clear(self) -> bool:
        return self.agreement >= self.clear


def excused(found: Evidence | None, again: Evidence | None) -> Evidence | None:
    """`found`, but that it just passes if only the evidence of another look does. Whose work it is more
    like, the first one says alone."""
    if found is None or found.passed or again is None or not again.passed:
        return found
    return replace(found, agreement=found.limit, where_sent=max(found.where_sent, again.where_sent))


class Agreement:
    """The cosine of two vectors that are met piece by piece, in float64: any scale will do."""

    def __init__(self) -> None:
        self._dot = self._squares = self._other_squares = self._other_where_sent = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next piece of each: flat, of the same length."""
        x, y = x.double(), y.double()
        self._dot += float(torch.dot(x, y))
        self._squares += float(torch.dot(x, x))
        self._other_squares += float(torch.dot(y, y))
        self._other_where_sent += float(torch.dot(y, torch.where(x == 0.0, 0.0, y)))

    def sum_over(self, ranks: Ranks) -> None:
        """Of pieces that several ranks have met: the same on each."""
        sums = ranks.sums([self._dot, self._squares, self._other_squares, self._other_where_sent])
        self._dot, self._squares, self._other_squares, self._other_where_sent = sums

    @property
    def cosine(self) -> float | None:
        """0 where the first vector is zero or has no finite length; None: the second one says nothing."""
        if not isfinite(self._other_squares) or self._other_squares == 0.0:
            return None
        return self._cosine(self._other_squares)

    @property
    def where_sent(self) -> float:
        """The same where the first vector is not zero; 0 where the second one says nothing there."""
        return self._cosine(self._other_where_sent)

    def _cosine(self, other_squares: float) -> float:
        size = sqrt(self._squares) * sqrt(other_squares)
        if size == 0.0 or not isfinite(size):
            return 0.0
        return max(-1.0, min(1.0, self._dot / size))
