"""What speaks for an offer after an auditor did its work again.

One number: the cosine between what the payload stands for and what the batches of its peer ask for. It is
blind to scale, which the bound in `apply` takes care of. Honest offers lie well above the limit at any stage
of training, payloads made of noise around zero, turned ones below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """`agreement`: from -1 to 1; an offer that has less than `limit` fails. An auditor that accuses another
    peer has at least `clear` with an offer of its own of the same round: else work says too little then."""

    agreement: float
    limit: float
    clear: float

    @property
    def passed(self) -> bool:
        return self.agreement >= self.limit

    @property
    def is_clear(self) -> bool:
        return self.agreement >= self.clear


class Agreement:
    """The cosine of two vectors that are met piece by piece, in float64: any scale will do."""

    def __init__(self) -> None:
        self._dot = self._squares = self._other_squares = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next piece of each: flat, of the same length."""
        x, y = x.double(), y.double()
        self._dot += float(torch.dot(x, y))
        self._squares += float(torch.dot(x, x))
        self._other_squares += float(torch.dot(y, y))

    @property
    def cosine(self) -> float | None:
        """0 where the first vector is zero or has no finite length; None: the second one says nothing."""
        if not isfinite(self._other_squares) or self._other_squares == 0.0:
            return None
        size = sqrt(self._squares) * sqrt(self._other_squares)
        if size == 0.0 or not isfinite(size):
            return 0.0
        return max(-1.0, min(1.0, self._dot / size))
