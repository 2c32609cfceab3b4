"""Codes of selected coefficients: which ones of a group, rising, and the value bits that each carries.

    packed   per coefficient one code of index bits + value bits: the index, and above it the value
    rice     per coefficient one code of r + value bits: the low r bits of the gap, and above them the value.
             From the next byte on, per coefficient gap >> r zeros and a one, low bits first.

A gap is how many coefficients are left out since the previous one of the same group. r is chosen for gaps of
positions without an order (Rice 1979): about 8.5 bits per index at 32 of 4096, where packed ones have 12. The
zeros and ones have a length of their own, which costs a few bytes in the header of a payload: where 32 bytes
always suffice, they are filled up with zeros to the most that there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BadPayload
from ..kernels import use_numba
from .bit_layout import n_bytes
from .bits import pack_bits, unpack_bits

Array = npt.NDArray[Any]

IndexFormat = Literal["packed", "rice"]

_FILLED_UP: Final = 32  # bytes


@dataclass(frozen=True, slots=True)
class Most:
    """The most that G groups can send: k_G of n_G coefficients each; int64."""

    k_G: Array
    n_G: Array


class IndexCoder(Protocol):
    """E entries in all, n_sent_G of them per group. Indices rise within a group; values are integers."""

    @property
    def width(self) -> int:
        """Bits of the code that each entry has."""
        ...

    def max_bytes(self, most: Most) -> int: ...

    def pack(self, index_E: Tensor, value_E: Tensor, n_sent_G: Array, most: Most) -> Tensor:
        """uint8. Both int64 on the CPU."""
        ...

    def unpack(self, codes: Tensor, n_sent_G: Array, most: Most) -> tuple[Array, Array]:
        """Indices and values, int64. Raises BadPayload for what `pack` never makes, but for indices that do
        not rise or are past the end."""
        ...


def coder_of(indices: str, n: int, k: int, value_bits: int) -> IndexCoder:
    """For k of n coefficients of a full group. Raises ValueError, in words for the user."""
    if indices == "packed":
        return PackedIndices((n - 1).bit_length(), value_bits)
    if indices == "rice":
        return RiceIndices(remainder_bits(n, k), value_bits)
    raise ValueError(f"indices {indices!r}: packed or rice")


def remainder_bits(n: int, k: int) -> int:
    """r for gaps that are n / k on average: the power of two below ln 2 times that."""
    return max(0, (7 * n // (10 * k)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class PackedIndices:
    """ceil(E (index_bits + value_bits) / 8) bytes."""

    index_bits: int
    value_bits: int

    @property
    def width(self) -> int:
        return self.index_bits + self.value_bits

    def max_bytes(self, most: Most) -> int:
        return n_bytes(int(most.k_G.sum()), self.width)

    def pack(self, index_E: Tensor, value_E: Tensor, n_sent_G: Array, most: Most) -> Tensor:
        return pack_bits(value_E << self.index_bits | index_E, self.width)

    def unpack(self, codes: Tensor, n_sent_G: Array, most: Most) -> tuple[Array, Array]:
        n = int(n_sent_G.sum())
        if codes.numel() != n_bytes(n, self.width):
            raise BadPayload("shape", f"{codes.numel()} bytes for {n} coefficients")
        return _split(unpack_exactly(codes, self.width, n), self.index_bits)


@dataclass(frozen=True, slots=True)
class RiceIndices:
    """ceil(E (r + value_bits) / 8) + ceil((E + sum of gap >> r) / 8) bytes.

    The sum of a group's gaps is at most n - k: no index costs more than r + 1 + (n - k) / (k 2^r) bits.
    """

    remainder_bits: int
    value_bits: int

    @property
    def width(self) -> int:
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
        return n_most if n_bits and n_most <= _FILLED_UP else n_bytes(n_bits, 1)

    def pack(self, index_E: Tensor, value_E: Tensor, n_sent_G: Array, most: Most) -> Tensor:
        if index_E.numel() == 0:
            return torch.empty(0, dtype=torch.uint8)
        if use_numba(index_E):
            from ..cpu import indices_cpu

            code_E, ends_E = indices_cpu.to_gaps(
                index_E.numpy(), value_E.numpy(), n_sent_G, self.remainder_bits
            )
            unary = indices_cpu.set_bits(ends_E, self.unary_bytes(int(ends_E[-1]) + 1, most))
            return torch.cat([pack_bits(torch.from_numpy(code_E), self.width), torch.from_numpy(unary)])
        gap_E = _gaps(index_E.numpy(), n_sent_G)
        low_E = torch.from_numpy(gap_E & ((1 << self.remainder_bits) - 1))
        ends_E = np.cumsum((gap_E >> self.remainder_bits) + 1) - 1
        bits = np.zeros(int(ends_E[-1]) + 1, dtype=np.uint8)
        bits[ends_E] = 1
        unary = np.packbits(bits, bitorder="little")
        unary = np.pad(unary, (0, self.unary_bytes(bits.size, most) - unary.size))
        fixed = pack_bits(value_E << self.remainder_bits | low_E, self.width)
        return torch.cat([fixed, torch.from_numpy(unary)])

    def unpack(self, codes: Tensor, n_sent_G: Array, most: Most) -> tuple[Array, Array]:
        n = int(n_sent_G.sum())
        n_fixed = n_bytes(n, self.width)
        ends_E = self._ends(codes[n_fixed:], n, self.max_unary(most))
        if use_numba(codes):
            from ..cpu import indices_cpu

            code_E = unpack_exactly(codes[:n_fixed], self.width, n)
            return indices_cpu.from_gaps(ends_E, code_E, n_sent_G, self.remainder_bits)
        low_E, value_E = _split(unpack_exactly(codes[:n_fixed], self.width, n), self.remainder_bits)
        step_E = ((np.diff(ends_E, prepend=-1) - 1) << self.remainder_bits | low_E) + 1
        return _indices(step_E, n_sent_G), value_E

    def _ends(self, octets: Tensor, n: int, n_most: int) -> Array:
        """int64: where the n ones stand."""
        unary = octets.numpy()
        filled_up = n > 0 and n_most <= _FILLED_UP
        if unary.size != n_most if filled_up else unary.size > n_most:
            raise BadPayload("shape", f"{unary.size} bytes for the gaps of {n} coefficients")
        if use_numba(octets):
            from ..cpu import indices_cpu

            ends_E: Array
            ends_E, n_ones = indices_cpu.ones(unary, n)
        else:
            ends_E = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
            n_ones = ends_E.size
        if n_ones != n:
            raise BadPayload("index", f"{n_ones} gaps for {n} coefficients")
        if not filled_up and unary.size != (int(ends_E[-1]) // 8 + 1 if n else 0):
            raise BadPayload("shape", "bytes after the last gap")
        return ends_E


def unpack_exactly(codes: Tensor, width: int, n: int) -> Array:
    """n integers of `width` bits, int64. Raises BadPayload for bytes that `pack_bits` never makes."""
    if codes.numel() != n_bytes(n, width):
        raise BadPayload("shape", f"{codes.numel()} bytes for {n} codes of {width} bits")
    if n * width % 8 and int(codes[-1]) >> n * width % 8:
        raise BadPayload("range", "padding bits are set")
    return unpack_bits(codes, width, n).numpy()


def _split(code_E: Array, low_bits: int) -> tuple[Array, Array]:
    return code_E & ((1 << low_bits) - 1), code_E >> low_bits


def _gaps(index_E: Array, n_sent_G: Array) -> Array:
    previous_E = np.empty_like(index_E)
    previous_E[1:] = index_E[:-1]
    previous_E[_firsts(n_sent_G)] = -1
    gaps: Array = index_E - previous_E - 1
    return gaps


def _indices(step_E: Array, n_sent_G: Array) -> Array:
    """From the steps between the indices of a group; the first step is from -1."""
    if step_E.size == 0:
        return step_E
    running_E = np.cumsum(step_E)
    firsts = _firsts(n_sent_G)
    before = running_E[firsts] - step_E[firsts]
    indices: Array = running_E - before.repeat(n_sent_G[n_sent_G > 0]) - 1
    return indices


def _firsts(n_sent_G: Array) -> Array:
    """Where the entries of each group begin, for groups that have any."""
    starts: Array = (n_sent_G.cumsum() - n_sent_G)[n_sent_G > 0]
    return starts
