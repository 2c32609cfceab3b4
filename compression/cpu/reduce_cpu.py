"""The numba kernels of `reduce`: the same sums."""

from __future__ import annotations

from math import frexp, ldexp
from typing import Any, Final

import numba
import numpy as np
from torch import Tensor

from .threads import share

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_BITS: Final = 40  # as in `reduce`
_BLOCK: Final = 1 << 20  # elements whose sum fits into 64 bits
_PER_THREAD: Final = 1 << 17
_MAGNITUDE: Final = np.int32(0x7FFFFFFF)
_2_52: Final = 2.0**52  # from here on float64 are whole numbers: adding it rounds to even
_2_52_BITS: Final = np.float64(_2_52).view(np.int64)


def l1_norm(values: Tensor) -> float:
    """As `reduce.l1_norm`. `values`: contiguous flat float32 on the CPU."""
    x = values.numpy()
    bits = x.view(np.int32)
    tops = share(lambda a, b: largest_bits(bits[a:b]), 0, x.size, smallest=_PER_THREAD)
    largest = float(np.array(max(tops), dtype=np.int32).view(np.float32))
    if largest == 0.0:
        return 0.0
    shift = _BITS - frexp(largest)[1]
    starts = range(0, x.size, _BLOCK)
    scale = ldexp(1.0, shift)
    sums = [
        n
        for first in starts
        for n in share(
            lambda a, b: _sum(x[a:b], scale), first, min(first + _BLOCK, x.size), smallest=_PER_THREAD
        )
    ]
    return float(sum(map(int, sums))) * ldexp(1.0, -shift)


@numba.njit(cache=True, nogil=True)
def largest_bits(bits: Array) -> Any:
    """The largest magnitude of float32 values, from and as bits: NaN is above infinity."""
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest


@numba.njit(nogil=True)
def add_up(x: Array) -> Any:
    """A sum of rounded magnitudes, and what to multiply it with: together `reduce.l1_norm`. At most `_BLOCK`
    finite values."""
    largest = largest_bits(x.view(np.int32))
    if largest == 0:
        return 0.0, 0.0
    _, exponent = frexp(np.float64(np.int32(largest).view(np.float32)))
    shift = _BITS - exponent
    return np.float64(_sum(x, ldexp(1.0, shift))), ldexp(1.0, -shift)


@numba.njit(cache=True, nogil=True)
def _sum(x: Array, scale: Word) -> Any:
    """Of magnitudes as whole numbers of 1 / scale."""
    total = np.int64(0)
    for i in range(x.size):
        total += np.float64(np.float64(abs(x[i])) * scale + _2_52).view(np.int64) - _2_52_BITS
    return total
