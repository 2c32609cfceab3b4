"""What compressors share that send values only: the round says which elements, for all peers alike.

Of a parameter of n elements m = ceil(rate n) are sent each round (`striding` has a formula of its own), one
at least, and every element within ceil(1 / rate) rounds; tiny parameters are no exception. A pack is a row of
m values (compression/rows.py): 2 ceil(m / group_size) + ceil(m bits / 8) bytes, or 4 m with 32 bits.

Which elements depends on `turn.round` alone, which therefore counts the rounds in which this parameter is
sent: a strategy that sends it in every fourth round only has to pass a quarter of the round, rounded down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.compression.base import Field, Packed, Part, Turn
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.reduce import l1_norm, mean_weights
from thinwire.compression.rows import Row, RowBits, row_of
from thinwire.compression.sparse import refuse_part

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Selection(ABC):
    """A share `rate` of all elements; see the module's docstring. Values are below 2^67."""

    rate: float = 1 / 32
    bits: RowBits = 8
    group_size: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        number = isinstance(self.rate, int | float) and not isinstance(self.rate, bool)
        if not number or not 2.0**-20 <= self.rate <= 1:
            raise ValueError(f"rate {self.rate!r}: a number from 2^-20 to 1")
        self.row  # noqa: B018 (refuses unknown formats)

    @abstractmethod
    def positions(self, n: int, turn: Turn, first: int, last: int) -> Array:
        """int64: which of n elements the values [first, last) of this round belong to; none twice."""

    def n_selected(self, n: int) -> int:
        """Elements of n that are sent in a round: always the same number."""
        return ceil(self.share * n)

    @property
    def share(self) -> Fraction:
        """The rate as it was meant: 0.1 is a tenth, which no float is."""
        return Fraction(self.rate).limit_denominator(1 << 20)

    @property
    def row(self) -> Row:
        return row_of(self.bits, self.group_size)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        return self.row.fields(self.n_selected(part.n_global))

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that are not finite or too large."""
        refuse_part(part)
        n = part.n_global
        with torch.no_grad():
            return self.row.pack(
                x.detach()[torch.from_numpy(self.positions(n, turn, *chunk)).to(x.device)].float()
                for chunk in self.row.chunks(self.n_selected(n))
            )

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        with exact_arithmetic():
            self.row.check(packed, self.n_selected(part.n_global))

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the values in order; zero for elements that are not of this round. On the CPU."""
        rounded, inverse = mean_weights(weights)
        n = part.n_global
        m = self.n_selected(n)
        out = torch.zeros(part.n_local, dtype=torch.float32)
        readers = [self.row.reader(p, m) for p in packs]
        with exact_arithmetic():
            for chunk in self.row.chunks(m):
                mean = torch.zeros(chunk[1] - chunk[0], dtype=torch.float32)
                for read, w in zip(readers, rounded, strict=True):
                    mean.add_(read(chunk) * w)
                mean.mul_(inverse).add_(0.0)
                position = torch.from_numpy(self.positions(n, turn, *chunk))
                if part.n_local != n:
                    here = (position >= part.start) & (position < part.stop)
                    position, mean = position[here] - part.start, mean[here]
                out[position] = mean
        return out

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's values, whatever the part."""
        m = self.n_selected(part.n_global)
        read = self.row.reader(packed, m)
        total = 0.0
        with exact_arithmetic():
            for chunk in self.row.chunks(m):
                total += l1_norm(read(chunk))
        return total
