"""What compressors share that send values only: the round says which elements, for all peers alike.

Of a parameter of n elements m = ceil(rate n) are sent each round (`striding` has a formula of its own), one
at least, and every element within ceil(1 / rate) rounds; tiny parameters are no exception. A pack has m
values (codecs/dense_codec.py): 2 ceil(m / group_size) + ceil(m bits / 8) bytes, or 4 m with 32 bits.

Which elements depends on `turn.round` alone, which therefore counts the rounds in which this parameter is
sent: a strategy that sends it in every fourth round only has to pass a quarter of the round, rounded down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import Any, ClassVar

import numpy.typing as npt
import torch
from torch import Tensor

from ..base import Compressor, Field, Packed, Part, Turn, refuse_part
from ..exact import exact_arithmetic
from ..kernels import use_numba
from ..numerics.reduce import mean_weights
from ..scratch import scratch
from .dense_codec import Chunk, DenseBits, DenseCodec, dense_codec, l1_norms, mean_into

Array = npt.NDArray[Any]


@lru_cache(maxsize=64)
def _fraction(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(1 << 20)


@dataclass(frozen=True, slots=True)
class Selection(Compressor):
    """A share `rate` of all elements; see the module's docstring. Values are below 2^67."""

    rate: float = 1 / 32
    """The share that is sent in a round, from 2^-20 to 1."""
    bits: DenseBits = 8
    """Of an element: 32 is float32 as it is."""
    group_size: int = 1024
    """Elements that share a scale."""

    is_contiguous: ClassVar[bool] = False
    """Whether the values of a round are neighbours, but for the end and the beginning of a parameter."""

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        number = isinstance(self.rate, int | float) and not isinstance(self.rate, bool)
        if not number or not 2.0**-20 <= self.rate <= 1:
            raise ValueError(f"rate {self.rate!r}: a number from 2^-20 to 1")
        self.codec  # noqa: B018 (refuses unknown formats)

    @abstractmethod
    def positions(self, n: int, turn: Turn, first: int, last: int) -> Array:
        """int64: which of n elements the values [first, last) of this round belong to; none twice."""

    def neighbours(self, n: int, turn: Turn, first: int, last: int) -> slice | None:
        """The same as a slice, where these are neighbours in rising order."""
        return None

    def n_selected(self, n: int) -> int:
        """Elements of n that are sent in a round: always the same number."""
        return ceil(self.share * n)

    @property
    def share(self) -> Fraction:
        """The rate as it was meant: 0.1 is a tenth, which no float is."""
        return _fraction(self.rate)

    @property
    def codec(self) -> DenseCodec:
        return dense_codec(self.bits, self.group_size)

    def n_sent(self, part: Part) -> int:
        return self.n_selected(part.n_global)

    def moved_share(self, part: Part, n_packs: int) -> float:
        return self.n_selected(part.n_global) / part.n_global if part.n_global else 1.0

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        return self.codec.fields(self.n_selected(part.n_global))

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that are not finite or too large."""
        refuse_part(part)
        m = self.n_selected(part.n_global)
        with torch.no_grad():
            return self.codec.pack(
                self._read(x.detach(), turn, chunk).float() for chunk in self._chunks(m, x)
            )

    def _chunks(self, m: int, x: Tensor) -> Iterator[Chunk]:
        """Long ones, where kernels read or write the values in their place."""
        return self.codec.long_chunks(m) if self.is_contiguous and use_numba(x) else self.codec.chunks(m)

    def _read(self, x: Tensor, turn: Turn, chunk: Chunk) -> Tensor:
        """Contiguous: what a chunk of values is of the whole parameter."""
        here = self.neighbours(x.numel(), turn, *chunk)
        if here is not None:
            return x[here].contiguous()
        return x[torch.from_numpy(self.positions(x.numel(), turn, *chunk)).to(x.device)]

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        with exact_arithmetic():
            self.codec.check(packed, self.n_selected(part.n_global))

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the values in order; zero for elements that are not of this round. On the CPU."""
        rounded, inverse = mean_weights(weights)
        n = part.n_global
        m = self.n_selected(n)
        out = scratch(part.n_local) if self.is_contiguous else torch.empty(part.n_local)
        if m < n or part.n_local < n:
            out.zero_()
        readers = [self.codec.reader(p, m) for p in packs]
        with exact_arithmetic():
            for chunk in self._chunks(m, out):
                here = self.neighbours(n, turn, *chunk)
                if here is not None and part.n_local == n:
                    mean_into(out[here], readers, rounded, inverse, chunk)
                    continue
                mean = torch.empty(chunk[1] - chunk[0], dtype=torch.float32)
                mean_into(mean, readers, rounded, inverse, chunk)
                position = torch.from_numpy(self.positions(n, turn, *chunk))
                if part.n_local != n:
                    held = (position >= part.start) & (position < part.stop)
                    position, mean = position[held] - part.start, mean[held]
                out[position] = mean
        return out

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's values, whatever the part."""
        m = self.n_selected(part.n_global)
        total = 0.0
        with exact_arithmetic():
            for norm in l1_norms(self.codec.reader(packed, m), list(self.codec.chunks(m))):
                total += norm
        return total
