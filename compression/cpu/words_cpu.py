"""Random words inside numba kernels: Philox4x32-10, and which elements of a tensor lie in a block.

The layout of words, calls and lanes is that of numerics/noise_layout.py. Calls of a block are made in a row,
independent of each other: the compiler makes vectors of them.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_32: Final = np.uint64(32)

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))


@numba.njit(inline="always")
def overlap(size: int, start: int, block: int) -> tuple[int, int, int]:
    """The slice [a, b) of the tensor, which begins at the global element `start`, that lies in the block; and
    how many elements of the block come before it."""
    a = max(block * 4096 - start, 0)
    b = min((block + 1) * 4096 - start, size)
    return a, b, a + start - block * 4096


@numba.njit(inline="always")
def fill_words(
    words: Array, at: int, n_calls: int, block: int, third: Word, fourth: Word, seed: Word
) -> None:  # fmt: skip
    """words[at + l * n_calls + c] = lane l of call c; n_calls is a power of two, so low + c never carries."""
    fill_some_words(words, at, n_calls, 0, n_calls, block, third, fourth, seed)


@numba.njit(inline="always")
def fill_some_words(
    words: Array, at: int, n_calls: int, first: int, n: int, block: int, third: Word, fourth: Word, seed: Word
) -> None:  # fmt: skip
    """The same of `n` calls, from `first` on."""
    number = np.uint64(block) * np.uint64(n_calls)
    low, high = np.uint32(number), np.uint32(number >> _32)
    k0, k1 = np.uint32(seed), np.uint32(seed >> _32)
    for c in range(n):
        a, b, d, e = _philox(np.uint32(low + np.uint32(first + c)), high, third, fourth, k0, k1)
        i = np.uint64(at + first) + np.uint64(c)  # a signed one might count from the end: no vectors
        words[i] = a
        words[i + np.uint64(n_calls)] = b
        words[i + np.uint64(2 * n_calls)] = d
        words[i + np.uint64(3 * n_calls)] = e


@numba.njit(inline="always")
def _philox(x0: Word, x1: Word, x2: Word, x3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    for _ in range(10):
        p0, p1 = np.uint64(x0) * _MULTIPLIERS[0], np.uint64(x2) * _MULTIPLIERS[1]
        x0, x1 = np.uint32(p1 >> _32) ^ x1 ^ k0, np.uint32(p1)
        x2, x3 = np.uint32(p0 >> _32) ^ x3 ^ k1, np.uint32(p0)
        k0, k1 = np.uint32(k0 + _WEYL[0]), np.uint32(k1 + _WEYL[1])
    return x0, x1, x2, x3
