"""A window that moves on each round (DeToNATION, arXiv 2502.06728)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..base import KnownDecoding, Turn
from .selection import Array, Selection


@dataclass(frozen=True, slots=True)
class Slicing(Selection):
    """m = ceil(rate n) neighbours, those after the last round's; from the end on to the beginning.

    codecs/selection.py has the format and its bytes.
    """

    known_decodings: ClassVar[Mapping[str, KnownDecoding]] = {
        "slicing decoding": KnownDecoding({"rate": 0.3, "bits": 32}, 0x69275B28880540E6)
    }

    is_contiguous = True

    def positions(self, n: int, turn: Turn, first: int, last: int) -> Array:
        start = (turn.round - 1) * self.n_selected(n) % n
        return np.arange(start + first, start + last, dtype=np.int64) % n

    def neighbours(self, n: int, turn: Turn, first: int, last: int) -> slice | None:
        start = (turn.round - 1) * self.n_selected(n) % n
        a = (start + first) % n
        return slice(a, a + last - first) if a + last - first <= n else None
