"""The numba kernels of `bits`: the same bytes, the same numbers.

A 64-bit word holds the bits that have been taken in and not yet given out, lowest first: values of up to 32
bits go in or out whole, bytes on the other side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import compiled


def pack(values: Any, width: int, out: Any) -> bool:
    """int64 to uint8, as many as they need; False if one does not fit."""
    return bool(_pack(values, width, out))


def unpack(octets: Any, width: int, out: Any) -> None:
    """uint8, as many as needed, to int64."""
    _unpack(octets, width, out)


@compiled
def _pack(values: Any, width: int, out: Any) -> bool:
    held, n_held, at, every = np.uint64(0), 0, 0, np.int64(0)
    for i in range(values.size):
        every |= values[i]
        held |= np.uint64(values[i]) << np.uint64(n_held)
        n_held += width
        while n_held >= 8:
            out[at] = np.uint8(held & np.uint64(255))
            held >>= np.uint64(8)
            n_held -= 8
            at += 1
    if n_held:
        out[at] = np.uint8(held & np.uint64(255))
    return bool(0 <= every < 1 << width)  # a negative one would set the sign


@compiled
def _unpack(octets: Any, width: int, out: Any) -> None:
    mask = np.uint64((1 << width) - 1)
    held, n_held, at = np.uint64(0), 0, 0
    for i in range(out.size):
        while n_held < width:
            held |= np.uint64(octets[at]) << np.uint64(n_held)
            n_held += 8
            at += 1
        out[i] = np.int64(held & mask)
        held >>= np.uint64(width)
        n_held -= width
