"""Values of a group to a scale and codes inside numba kernels, as `value_formats` has them."""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from ..numerics.value_formats import Format
from .dense_cpu import KINDS, SIGN, TWO_BITS, kind_of, scale_bits, to_codes

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_ROUND: Final = np.uint32(0x7FFF)


def takes_format(format_: Format) -> bool:
    """Those whose values are in a table, but for 2 bits: their scale takes iterations."""
    return kind_of(format_) not in (TWO_BITS, KINDS[16])


@numba.njit(nogil=True)
def scale_bits_of(values: Array, kind: int) -> Word:
    """bfloat16, as `Format.scales`; 0: the group sends nothing."""
    if kind == SIGN:
        total = 0.0
        for i in range(values.size):
            total += np.float64(abs(values[i]))
        bits = np.float32(total / values.size).view(np.uint32)
        return np.uint16((bits + _ROUND + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    largest = np.int32(0)
    for i in range(values.size):
        largest = max(largest, np.float32(abs(values[i])).view(np.int32))
    return scale_bits(largest, kind)


@numba.njit(nogil=True)
def codes_of(values: Array, bits: Word, kind: int, codes: Array) -> Word:
    """Writes them as `Format.codes`, and returns the scale as float32."""
    scale = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    to_codes(values, scale, kind, codes)
    return scale
