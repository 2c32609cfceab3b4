"""The numba kernel of `rounding`: the same bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..compiled import compiled
from ..numerics.noise_layout import BFLOAT16_NAN, BLOCK, ROUND_CALLS, Purpose
from .threads import share
from .words_cpu import fill_words, overlap

_EXPONENT = np.uint32(0x7F800000)
_FRACTION = np.uint32(0x007FFFFF)
_16 = np.uint32(16)
_LOW = np.uint32(0xFFFF)
_NAN = np.uint16(BFLOAT16_NAN)


def round_to_bfloat16(x: Tensor, out: Tensor, seed: int, param_index: int, start: int) -> None:
    """As `rounding.round_torch`. Flat contiguous CPU tensors."""
    bits = x.numpy().view(np.uint32)
    rounded = out.view(torch.int16).numpy().view(np.uint16)
    third, fourth = np.uint32(param_index), np.uint32(int(Purpose.ROUND) << 20)
    key = np.uint64(seed)
    share(
        lambda first, last: _blocks(rounded, bits, start, first, last, third, fourth, key),
        start // BLOCK,
        -(-(start + bits.size) // BLOCK),
        smallest=16,
    )


@compiled
def _blocks(y: Any, x: Any, start: int, first: int, last: int, third: Any, fourth: Any, seed: Any) -> None:
    words = np.empty(2048, np.uint32)
    random = np.empty(4096, np.uint32)
    for block in range(first, last):
        a, b, skipped = overlap(x.size, start, block)
        fill_words(words, 0, ROUND_CALLS, block, third, fourth, seed)
        for w in range(2048):
            random[w] = words[w] & _LOW
            random[2048 + w] = words[w] >> _16
        _round(y[a:b], x[a:b], random[skipped : skipped + b - a])


@numba.njit(nogil=True)
def _round(y: Any, x: Any, random: Any) -> None:
    """A function of its own, over slices and without branches: the compiler makes vectors of it."""
    for i in range(y.size):
        bits = x[i]
        special = _NAN if bits & _FRACTION else np.uint16(bits >> _16)
        rounded = np.uint16((bits + random[i]) >> _16)
        y[i] = special if bits & _EXPONENT == _EXPONENT else rounded
