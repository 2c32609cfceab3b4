"""Every s-th element, from one further on each round (DeToNATION, arXiv 2502.06728)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np

from ..base import KnownDecoding, Turn
from .selection import Array, Selection


@dataclass(frozen=True, slots=True)
class Striding(Selection):
    """Elements o, o + s, o + 2 s, ... with s = min(ceil(1 / rate), n) and o = (round - 1) mod s.

    There are m = ceil(n / s) of them; one that is past the end is counted from the parameter's beginning, so
    that every round sends as many. codecs/selection.py has the format and its bytes.
    """

    known_decodings: ClassVar[Mapping[str, KnownDecoding]] = {
        "striding decoding": KnownDecoding({"rate": 0.3, "bits": 32}, 0x361F4BA39FDD0664)
    }

    def n_selected(self, n: int) -> int:
        return -(-n // self.stride(n))

    def stride(self, n: int) -> int:
        return max(1, min(ceil(1 / self.share), n))

    def positions(self, n: int, turn: Turn, first: int, last: int) -> Array:
        stride = self.stride(n)
        offset = (turn.round - 1) % stride
        return (offset + stride * np.arange(first, last, dtype=np.int64)) % n
