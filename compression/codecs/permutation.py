"""Seeded permutations of any size whose values are computed one by one, without a table.

A Feistel network permutes the numbers of b bits, 2^b being the first power of two that is not below n. Those
that end beyond n go through it again until they do not (cycle walking, Black and Rogaway 2002): 2 passes at
most on average. Integers only: the same on any device.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

Array = npt.NDArray[Any]

_ROUNDS: Final = 8


def permuted(index: Array, n: int, seed: bytes) -> Array:
    """int64: where the permutation of [0, n) that `seed` names sends these numbers of [0, n); n <= 2^62."""
    n_bits = (n - 1).bit_length() if n else 0
    key = np.frombuffer(blake3(seed).digest(4 * _ROUNDS), dtype="<u4")
    out = _network(index.astype(np.uint64), n_bits, key)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = again = _network(out[outside], n_bits, key)
        outside = outside[again >= n]
    return out.astype(np.int64)


def _network(x: Array, n_bits: int, key: Array) -> Array:
    """A permutation of the numbers of `n_bits` bits: the two halves change each other in turn."""
    low_bits = (n_bits + 1) // 2
    low_mask, high_mask = (np.uint32((1 << bits) - 1) for bits in (low_bits, n_bits - low_bits))
    low = (x & np.uint64(low_mask)).astype(np.uint32)
    high = (x >> np.uint64(low_bits)).astype(np.uint32)
    for i in range(0, _ROUNDS, 2):
        low ^= _mixed(high, key[i]) & low_mask
        high ^= _mixed(low, key[i + 1]) & high_mask
    result: Array = high.astype(np.uint64) << np.uint64(low_bits) | low
    return result


def _mixed(half: Array, key: Any) -> Array:
    """uint32 words in which every bit depends on all of `half` and of the key (MurmurHash3's finaliser)."""
    word: Array = half ^ key
    word *= np.uint32(0x85EBCA6B)
    word ^= word >> np.uint32(13)
    word *= np.uint32(0xC2B2AE35)
    word ^= word >> np.uint32(16)
    return word
