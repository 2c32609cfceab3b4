"""How the indices of selected coefficients travel, and how many bytes they take.

Every coefficient that is sent has an index in its group, rising, and the bits of its value.

    packed   per coefficient one code of index bits + value bits: the index, and above it the value
    rice     per coefficient one code of r + value bits: the low r bits of the gap, and above them the value.
             From the next byte on, per coefficient gap >> r zeros and a one, low bits first.

A gap is how many coefficients are left out since the previous one of the same group.

Rice codes (Rice 1979) suit gaps between positions without an order, which are distributed geometrically:
short ones are frequent, and long ones have no bound. The low r bits, as good as random, travel as they are,
and what is above them as a unary number, which is short. r is the power of two next below ln 2 times the mean
gap n / k: 8.5 bits per index at 32 of 4096, where packed ones have 12.

The zeros and ones have a length of their own, which costs a few bytes in the header of a payload: where 32
bytes always suffice, they are filled up with zeros to the most that there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy.typing as npt

from .bit_layout import n_bytes

Array = npt.NDArray[Any]

IndexFormat = Literal["packed", "rice"]

FILLED_UP: Final = 32
"""Bytes of zeros and ones, at most, that are filled up."""


@dataclass(frozen=True, slots=True)
class Most:
    """The most that G groups can send: k_G of n_G coefficients each; int64."""

    k_G: Array
    n_G: Array


@dataclass(frozen=True, slots=True)
class PackedIndices:
    """ceil(E (index_bits + value_bits) / 8) bytes for E entries."""

    index_bits: int
    value_bits: int

    @property
    def width(self) -> int:
        """Bits of the code that each entry has."""
        return self.index_bits + self.value_bits

    def max_bytes(self, most: Most) -> int:
        return n_bytes(int(most.k_G.sum()), self.width)


@dataclass(frozen=True, slots=True)
class RiceIndices:
    """ceil(E (r + value_bits) / 8) + ceil((E + sum of gap >> r) / 8) bytes for E entries.

    The sum of a group's gaps is at most n - k: no index costs more than r + 1 + (n - k) / (k 2^r) bits.
    """

    remainder_bits: int
    value_bits: int

    @property
    def width(self) -> int:
        """Bits of the code that each entry has, without its zeros and ones."""
        return self.remainder_bits + self.value_bits

    def max_bytes(self, most: Most) -> int:
        return n_bytes(int(most.k_G.sum()), self.width) + self.max_unary(most)

    def max_unary(self, most: Most) -> int:
        """Bytes of zeros and ones, at most."""
        n_bits = most.k_G.sum() + ((most.n_G - most.k_G) >> self.remainder_bits).sum()
        return n_bytes(int(n_bits), 1)

    def unary_bytes(self, n_bits: int, most: Most) -> int:
        """Bytes that so many zeros and ones take."""
        n_most = self.max_unary(most)
        return n_most if n_bits and n_most <= FILLED_UP else n_bytes(n_bits, 1)


IndexLayout = PackedIndices | RiceIndices


def index_layout(indices: str, n: int, k: int, value_bits: int) -> IndexLayout:
    """For k of n coefficients of a full group. Raises ValueError, in words for the user."""
    if indices == "packed":
        return PackedIndices((n - 1).bit_length(), value_bits)
    if indices == "rice":
        return RiceIndices(remainder_bits(n, k), value_bits)
    raise ValueError(f"indices {indices!r}: packed or rice")


def remainder_bits(n: int, k: int) -> int:
    """r for gaps that are n / k on average: the power of two below ln 2 times that."""
    return max(0, (7 * n // (10 * k)).bit_length() - 1)
