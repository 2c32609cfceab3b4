"""A random share of the elements, the same for all peers (DeToNATION, arXiv 2502.06728)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..base import KnownDecoding, Turn
from .permutation import permuted
from .selection import Array, Selection


@dataclass(frozen=True, slots=True)
class RandomK(Selection):
    """Walks a permutation of the elements, m = ceil(rate n) per round, a new one after ceil(n / m) rounds.

    The last round of a walk, where fewer are left, goes on at the walk's beginning. Seeded by `seed`, the
    number of the walk and n. codecs/selection.py has the format and its bytes.
    """

    known_decodings: ClassVar[Mapping[str, KnownDecoding]] = {
        "random_k decoding": KnownDecoding({"rate": 0.3, "bits": 32}, 0x229CAF0E37379564)
    }

    seed: int = 0
    """Unsigned 64-bit, of the permutations."""

    def __post_init__(self) -> None:
        Selection.__post_init__(self)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed {self.seed!r}: a whole number from 0 to 2^64 - 1")

    def positions(self, n: int, turn: Turn, first: int, last: int) -> Array:
        m = self.n_selected(n)
        walk, step = divmod(turn.round - 1, max(1, -(-n // max(1, m))))
        slots = np.arange(step * m + first, step * m + last, dtype=np.int64) % max(1, n)
        words = (
            self.seed.to_bytes(8, "little"),
            walk.to_bytes(8, "little", signed=True),
            n.to_bytes(8, "little"),
        )
        return permuted(slots, n, b"thinwire random_k" + b"".join(words))
