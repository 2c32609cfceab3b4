"""The k largest of a row inside numba kernels: by bisection for the least magnitude that is still chosen.

Magnitudes are the bits of float32 values without their sign: as integers they are in the order of the values.
Each step counts how many reach the middle of the range that is left, which takes a vector at a time, and
halves the range, until k reach it exactly or one number is left. The first guess lies four octaves below the
largest, which few elements of a momentum exceed.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""


_FOUR_OCTAVES: Final = 4 << 23


@numba.njit(inline="always")
def choose(candidates: Array, where: Array, n: int, k: int, out: Array) -> None:
    """Where the k largest are; of equal ones the first."""
    least = threshold(candidates, n, k)
    n_equal = k - _count(candidates, n, np.int32(least + 1))
    e = 0
    for i in range(n):
        if candidates[i] > least:
            out[e] = where[i]
            e += 1
        elif candidates[i] == least and n_equal > 0:
            out[e] = where[i]
            e += 1
            n_equal -= 1


@numba.njit(nogil=True)
def threshold(magnitudes: Array, n: int, k: int) -> Any:
    """A value that k of them, or equal ones more, reach. By bisection: counting takes a vector at a time."""
    top = 0
    for i in range(n):
        top = max(top, magnitudes[i])
    low, high = 0, top + 1  # k at least reach `low`, fewer `high`
    middle = max(1, top - _FOUR_OCTAVES)
    while high - low > 1:
        count = _count(magnitudes, n, np.int32(middle))
        if count >= k:
            low = middle
            if count == k:
                break
        else:
            high = middle
        middle = low + (high - low) // 2
    return np.int32(low)


@numba.njit(inline="always")
def _count(magnitudes: Array, n: int, least: Word) -> Word:
    count = np.int32(0)
    for i in range(n):
        count = np.int32(count + np.int32(magnitudes[i] >= least))
    return count
