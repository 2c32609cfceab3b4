"""The Triton kernel of `rounding`: the same bits on a GPU, in one pass."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinwire.compression import rounding
from thinwire.compression.noise import BLOCK, Purpose
from thinwire.compression.noise_triton import EXACT, on_device, random_words

_BLOCK: Final = tl.constexpr(BLOCK)
_N_CALLS: Final = tl.constexpr(rounding.N_CALLS)
_FOURTH: Final = tl.constexpr(int(Purpose.ROUND) << 20)
_NAN: Final = tl.constexpr(rounding.NAN)


def round_to_bfloat16(x: Tensor, out: Tensor, seed: int, param_index: int, start: int) -> None:
    """As `rounding.round_torch`. Flat contiguous tensors of one device."""
    if not x.numel():
        return
    first, shift = divmod(start, BLOCK)
    n_blocks = -(-(shift + x.numel()) // BLOCK)
    with on_device(x):
        _round[(n_blocks,)](
            *(out.view(torch.int16), x.view(torch.int32), x.numel(), shift, first),
            *(param_index, seed & 0xFFFFFFFF, seed >> 32),
            num_warps=4,
            **EXACT,
        )


@triton.jit(do_not_specialize=["first", "third", "seed_low", "seed_high"])
def _round(
    y: tl.tensor, x: tl.tensor, n: tl.tensor, shift: tl.tensor, first: tl.tensor,
    third: tl.tensor, seed_low: tl.tensor, seed_high: tl.tensor,
) -> None:  # fmt: skip
    """A block; `first` is the one in which the tensors begin, `shift` elements after its first one."""
    block = tl.program_id(0).to(tl.int64)
    at = block * _BLOCK - shift
    seed = seed_low.to(tl.uint64) | (seed_high.to(tl.uint64) << 32)
    fourth = tl.full((), _FOURTH, tl.uint32)
    w0, w1, w2, w3 = random_words(first + block, _N_CALLS, third, fourth, seed)
    half = tl.arange(0, 2)[:, None]
    i = at + half * (4 * _N_CALLS) + tl.arange(0, _N_CALLS)[None, :]  # of lane 0
    _lane(y, x, i, n, half, w0)
    _lane(y, x, i + _N_CALLS, n, half, w1)
    _lane(y, x, i + 2 * _N_CALLS, n, half, w2)
    _lane(y, x, i + 3 * _N_CALLS, n, half, w3)


@triton.jit
def _lane(y: tl.tensor, x: tl.tensor, i: tl.tensor, n: tl.tensor, half: tl.tensor, words: tl.tensor) -> None:
    inside = (i >= 0) & (i < n)
    bits = tl.load(x + i, mask=inside, other=0)
    random = ((words[None, :] >> (16 * half).to(tl.uint32)) & 0xFFFF).to(tl.int32)
    infinite = bits >> 16
    special = tl.where((bits & 0x007FFFFF) != 0, _NAN, infinite)
    # The signs of int32 do no harm: the low 16 bits are added to, and what they carry moves up.
    rounded = tl.where((bits & 0x7F800000) == 0x7F800000, special, (bits + random) >> 16)
    tl.store(y + i, rounded.to(tl.int16), mask=inside)
