"""The Triton kernel of `rounding`: the same bits on a GPU, in one pass."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics.noise_layout import BFLOAT16_NAN, BLOCK, ROUND_CALLS, Purpose
from .tables_triton import EXACT, on_device
from .words_triton import in_order, random_words

_BLOCK: Final = tl.constexpr(BLOCK)
_N_CALLS: Final = tl.constexpr(ROUND_CALLS)
_FOURTH: Final = tl.constexpr(int(Purpose.ROUND) << 20)
_NAN: Final = tl.constexpr(BFLOAT16_NAN)


def round_to_bfloat16(x: Tensor, out: Tensor, seed: int, param_index: int, start: int) -> None:
    """As `rounding.round_torch`. Flat contiguous tensors of one device."""
    if not x.numel():
        return
    first, shift = divmod(start, BLOCK)
    n_blocks = -(-(shift + x.numel()) // BLOCK)
    with on_device(x):
        _round[(n_blocks,)](
            out.view(torch.int16),
            x.view(torch.int32),
            x.numel(),
            shift,
            first,
            param_index,
            seed & 0xFFFFFFFF,
            seed >> 32,
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
    seed = seed_low.to(tl.uint64) | (seed_high.to(tl.uint64) << 32)
    i = block * _BLOCK - shift + tl.arange(0, _BLOCK)
    inside = (i >= 0) & (i < n)
    bits = tl.load(x + i, mask=inside, other=0)
    tl.store(y + i, rounded_bits(bits, random_halves(first + block, third, seed)), mask=inside)


@triton.jit
def random_halves(block: tl.tensor, third: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """int32 below 2^16 for the elements of a block."""
    fourth = tl.full((), _FOURTH, tl.uint32)
    w0, w1, w2, w3 = random_words(block, _N_CALLS, third, fourth, seed)
    words = in_order(w0[None, :], w1[None, :], w2[None, :], w3[None, :])
    halves = tl.permute(tl.join(words & 0xFFFF, words >> 16), (1, 0))
    return tl.reshape(halves, (_BLOCK,)).to(tl.int32)


@triton.jit
def rounded_bits(bits: tl.tensor, random: tl.tensor) -> tl.tensor:
    """int16 of bfloat16, from int32 of float32."""
    infinite = bits >> 16
    special = tl.where((bits & 0x007FFFFF) != 0, _NAN, infinite)
    # The signs of int32 do no harm: the low 16 bits are added to, and what they carry moves up.
    return tl.where((bits & 0x7F800000) == 0x7F800000, special, (bits + random) >> 16).to(tl.int16)
