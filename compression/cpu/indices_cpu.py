"""The numba kernels of `indices`: Rice codes, the same numbers.

Ones are found 64 bits at a time: `word & -word` leaves the lowest of them, whose place a multiplication by a
de Bruijn sequence tells (Leiserson, Prokop & Randall 1998): the product's top 6 bits are different for every
place. Gaps, indices and codes follow from the places in one loop over the entries.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..compiled import compiled

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

_0, _1, _58 = np.uint64(0), np.uint64(1), np.uint64(58)

# The top 6 bits of this number, shifted left by i, are different for every i.
DE_BRUIJN: Final = np.uint64(0x03F79D71B4CB0A89)
PLACE: Final = np.empty(64, dtype=np.int64)
for _i in range(64):
    PLACE[(0x03F79D71B4CB0A89 << _i & 0xFFFFFFFFFFFFFFFF) >> 58] = _i


def ones(octets: Array, n: int) -> tuple[Array, int]:
    """Where the first n ones stand, and how many there are. Low bits first."""
    ends_E = np.empty(n, dtype=np.int64)
    return ends_E, int(_ones(octets, ends_E))


@compiled
def _ones(octets: Array, ends_E: Array) -> Any:
    n = 0
    for first in range(0, octets.size, 8):
        word = np.uint64(0)
        for i in range(min(8, octets.size - first)):
            word |= np.uint64(octets[first + i]) << np.uint64(8 * i)
        while word > _0:
            lowest = word & (~word + _1)
            if n < ends_E.size:
                ends_E[n] = 8 * first + PLACE[(lowest * DE_BRUIJN) >> _58]
            n += 1
            word ^= lowest
    return n


def from_gaps(ends_E: Array, code_E: Array, n_sent_G: Array, r: int) -> tuple[Array, Array]:
    """Indices and values: from where the ones stand that end the gaps, and the codes below them."""
    index_E, value_E = np.empty_like(ends_E), np.empty_like(code_E)
    _from_gaps(ends_E, code_E, n_sent_G, r, index_E, value_E)
    return index_E, value_E


@compiled
def _from_gaps(ends_E: Array, code_E: Array, n_sent_G: Array, r: int, index_E: Array, value_E: Array) -> None:
    e, before, mask = 0, -1, (1 << r) - 1
    for g in range(n_sent_G.size):
        index = -1
        for _ in range(n_sent_G[g]):
            index += (ends_E[e] - before - 1 << r | code_E[e] & mask) + 1
            before = ends_E[e]
            index_E[e], value_E[e] = index, code_E[e] >> r
            e += 1


def to_gaps(index_E: Array, value_E: Array, n_sent_G: Array, r: int) -> tuple[Array, Array]:
    """The codes, and where the ones stand."""
    code_E, ends_E = np.empty_like(index_E), np.empty_like(index_E)
    _to_gaps(index_E, value_E, n_sent_G, r, code_E, ends_E)
    return code_E, ends_E


@compiled
def _to_gaps(index_E: Array, value_E: Array, n_sent_G: Array, r: int, code_E: Array, ends_E: Array) -> None:
    e, end, mask = 0, -1, (1 << r) - 1
    for g in range(n_sent_G.size):
        index = -1
        for _ in range(n_sent_G[g]):
            gap = index_E[e] - index - 1
            index = index_E[e]
            end += (gap >> r) + 1
            code_E[e], ends_E[e] = value_E[e] << r | gap & mask, end
            e += 1


def set_bits(ends_E: Array, n: int) -> Array:
    """uint8, n of them: ones there, zeros elsewhere."""
    octets = np.zeros(n, dtype=np.uint8)
    _set_bits(ends_E, octets)
    return octets


@compiled
def _set_bits(ends_E: Array, octets: Array) -> None:
    for e in range(ends_E.size):
        octets[ends_E[e] >> 3] |= np.uint8(1 << (ends_E[e] & 7))
