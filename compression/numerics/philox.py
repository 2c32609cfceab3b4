"""Philox4x32-10 in plain torch (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A counter-based generator: ten rounds of a bijection of 128-bit counters, chosen by a 64-bit key. A round
multiplies two of the four words by constants, keeps the low halves of the 64-bit products and mixes the high
halves into the other two words; the key moves on by two Weyl constants. There is no state: the same key and
counter give the same four words anywhere, in any order.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MASK: Final = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds. Counter words are below 2^32, the tensors int64 of one shape; so are the results."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    x0, x1 = counter[0], counter[1]
    x2, x3 = torch.full_like(x0, counter[2]), torch.full_like(x0, counter[3])
    for _ in range(10):
        # int64 products wrap around: their 64 bits are those of the unsigned product.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK
        x2, x3 = ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0, x1, x2, x3
