"""The numba kernels of `reduce`: the same sums. Those of codes of 4 bits need no values: in every group they
are whole numbers of a unit, at most 64, two of them in a byte; the compiler makes vectors of these loops.
"""

from __future__ import annotations

from math import frexp, ldexp
from typing import Any, Final

import numba
import numpy as np
from torch import Tensor

from ..compiled import compiled
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
_SMALLEST: Final = np.float32(2.0**-100)  # multiples of such units are exact float32
_1, _2, _4, _7, _8, _15 = (np.uint8(n) for n in (1, 2, 4, 7, 8, 15))


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


@compiled
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


@compiled
def _sum(x: Array, scale: Word) -> Any:
    """Of magnitudes as whole numbers of 1 / scale."""
    total = np.int64(0)
    for i in range(x.size):
        total += np.float64(np.float64(abs(x[i])) * scale + _2_52).view(np.int64) - _2_52_BITS
    return total


@numba.njit(nogil=True)
def add_up_codes(octets: Array, at_G: Array, scale_G: Array, size: int, n: int, is_e3m0: bool) -> Any:
    """As `reduce_cpu.add_up` of the values of these groups, n together, and whether that could be told: only
    where rounding changes nothing. `at_G`: the byte that a group's codes begin with."""
    n_units_G = np.empty((scale_G.size, 2), np.int32)
    largest = 0.0
    for g in range(scale_G.size):
        if scale_G[g] > 0:
            if scale_G[g] < _SMALLEST:
                return 0.0, 0.0, False
            here = octets[at_G[g] : at_G[g] + (min(size, n - g * size) + 1) // 2]
            n_units_G[g, 0], n_units_G[g, 1] = _count_e3m0(here) if is_e3m0 else _count(here)
            largest = max(largest, n_units_G[g, 1] * _unit(scale_G[g], is_e3m0))
    if largest == 0.0:
        return 0.0, 0.0, True
    _, exponent = frexp(largest)
    scale, total = ldexp(1.0, _BITS - exponent), np.int64(0)
    for g in range(scale_G.size):
        if scale_G[g] > 0:
            unit = _unit(scale_G[g], is_e3m0) * scale
            if unit != np.floor(unit):
                return 0.0, 0.0, False
            total += np.int64(unit) * np.int64(n_units_G[g, 0])
    return np.float64(total), 1.0 / scale, True


@numba.njit(inline="always")
def _unit(scale: Word, is_e3m0: bool) -> Any:
    return np.float64(scale) * (0.015625 if is_e3m0 else 1.0)


@numba.njit(nogil=True)
def _count(octets: Array) -> Any:
    """Of 4-bit whole numbers: the sum of their magnitudes, and the largest."""
    total, top = np.int32(0), np.uint8(0)
    for i in range(octets.size):
        low, high = _whole(np.uint8(octets[i] & _15)), _whole(np.uint8(octets[i] >> _4))
        total = np.int32(total + np.int32(np.uint8(low + high)))
        top = max(top, low, high)
    return total, np.int32(top)


@numba.njit(nogil=True)
def _count_e3m0(octets: Array) -> Any:
    """In units of 1/64."""
    total, top = np.int32(0), np.uint8(0)
    for i in range(octets.size):
        low, high = _power(np.uint8(octets[i] & _15)), _power(np.uint8(octets[i] >> _4))
        total = np.int32(total + np.int32(np.uint8(low + high)))
        top = max(top, low, high)
    return total, np.int32(top)


@numba.njit(inline="always")
def _whole(code: Word) -> Any:
    low = np.uint8(code & _7)
    return np.uint8(_8 - low) if code & _8 else low


@numba.njit(inline="always")
def _power(code: Word) -> Any:
    """0, or 2^(e - 1), by the bits of e: bytes have no shifts by several amounts."""
    x = np.uint8(_1 + np.uint8(code & _1))
    x = np.uint8(x << _2) if code & _2 else x
    x = np.uint8(x << _4) if code & _4 else x
    return np.uint8(x >> _1)
