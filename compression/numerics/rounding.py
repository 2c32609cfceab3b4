"""Stochastic rounding to bfloat16: unbiased, and the same bits on any device.

A float32 lies between two bfloat16 values, at a fraction u / 2^16 of the way: it goes to the one farther from
zero with that probability. What is a bfloat16 value already stays as it is. The random bits are 16 per
element, a half of a Philox word (numerics/noise_layout.py).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..kernels import kernels_for
from .noise_layout import BFLOAT16_NAN, BLOCK, ROUND_CALLS, Purpose
from .philox import philox4x32

_CHUNK: Final = 16 * BLOCK
_MASK: Final = 0xFFFFFFFF
_EXPONENT: Final = 0x7F800000
_FRACTION: Final = 0x007FFFFF


def round_to_bfloat16(x: Tensor, out: Tensor, seed: int, param_index: int, start: int = 0) -> None:
    """`out` = x rounded. `x`: contiguous flat float32, elements from `start` on of the flattened parameter;
    `out`: contiguous flat bfloat16 of the same length. `seed`: unsigned 64-bit, of the round.

    Infinite stays infinite, NaN stays NaN. Raises ValueError for other tensors.
    """
    for t, dtype in ((x, torch.float32), (out, torch.bfloat16)):
        if t.dtype != dtype or t.dim() != 1 or not t.is_contiguous() or t.numel() != x.numel():
            raise ValueError(f"needs flat contiguous rows of one length, float32 and bfloat16, not {t.dtype}")
    rows = x.detach(), out.detach()
    match kernels_for(*rows):
        case "numba":
            from ..cpu import rounding_cpu

            rounding_cpu.round_to_bfloat16(*rows, seed, param_index, start)
        case "triton":
            from ..gpu import rounding_triton

            rounding_triton.round_to_bfloat16(*rows, seed, param_index, start)
        case "torch":
            round_torch(*rows, seed, param_index, start)


@torch.no_grad()
def round_torch(x: Tensor, out: Tensor, seed: int, param_index: int, start: int) -> None:
    """The reference."""
    stop = start + x.numel()
    for first in range(start - start % BLOCK, stop, _CHUNK):
        a, b = max(first, start), min(first + _CHUNK, stop)
        bits = x[a - start : b - start].view(torch.int32).to(torch.int64)
        random = _halves(seed, param_index, first // BLOCK, -(-b // BLOCK), x.device)[a - first : b - first]
        # The signs of int64 do no harm: the low 16 bits are added to, and what they carry moves up.
        rounded = ((bits + random) >> 16).to(torch.int16)
        infinite = (bits >> 16).to(torch.int16)
        special = torch.where((bits & _FRACTION) != 0, torch.full_like(infinite, BFLOAT16_NAN), infinite)
        rounded = torch.where((bits & _EXPONENT) == _EXPONENT, special, rounded)
        out[a - start : b - start] = rounded.view(torch.bfloat16)


def _halves(seed: int, param_index: int, b0: int, b1: int, device: torch.device) -> Tensor:
    """int64 below 2^16 for the elements of the blocks [b0, b1)."""
    first, last = b0 * ROUND_CALLS, b1 * ROUND_CALLS
    calls = torch.arange(first, last, dtype=torch.int64, device=device).view(-1, ROUND_CALLS)
    counter = (calls & _MASK, calls >> 32, param_index, int(Purpose.ROUND) << 20)
    words = torch.stack(philox4x32(counter, seed), dim=1).view(b1 - b0, 1, 4 * ROUND_CALLS)
    return torch.cat([words & 0xFFFF, words >> 16], dim=1).view(-1)
