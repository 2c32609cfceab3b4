"""The Triton kernel of `fingerprint`: the same sums on a GPU, in one read of the parameters."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinwire.compression import fingerprint
from thinwire.compression.noise_triton import EXACT, on_device

_TILE: Final = tl.constexpr(2048)
_TILES: Final = tl.constexpr(8)
"""Of a program: each adds up 2^14 elements."""

_GOLDEN: Final = tl.constexpr(fingerprint.GOLDEN)
_SHIFT_0, _FACTOR_0 = map(tl.constexpr, fingerprint.MIX[0])
_SHIFT_1, _FACTOR_1 = map(tl.constexpr, fingerprint.MIX[1])
_LAST_SHIFT: Final = tl.constexpr(fingerprint.LAST_SHIFT)


def parameter_sum(bits: Tensor, start: int) -> int:
    """As `fingerprint.parameter_sum_torch`. `bits`: flat contiguous int32 or int16."""
    if not bits.numel():
        return 0
    n_programs = -(-bits.numel() // (_TILE.value * _TILES.value))
    sums = torch.empty(n_programs, dtype=torch.int64, device=bits.device)
    with on_device(bits):
        _sum[(n_programs,)](sums, bits, bits.numel(), start, **EXACT)
    # int64 sums wrap around: their bits are those of the unsigned sum, in any order.
    return int(sums.sum()) & ((1 << 64) - 1)


@triton.jit(do_not_specialize=["start"])
def _sum(sums: tl.tensor, bits: tl.tensor, n: tl.tensor, start: tl.tensor) -> None:
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((_TILE,), tl.uint64)
    for t in range(_TILES):
        i = (program * _TILES + t) * _TILE + tl.arange(0, _TILE)
        pattern = tl.load(bits + i, mask=i < n, other=0)
        unsigned = pattern.to(tl.uint32 if bits.dtype.element_ty == tl.int32 else tl.uint16, bitcast=True)
        h = (i + start).to(tl.uint64) * _GOLDEN ^ unsigned.to(tl.uint64)
        h = (h ^ (h >> _SHIFT_0)) * _FACTOR_0
        h = (h ^ (h >> _SHIFT_1)) * _FACTOR_1
        total += tl.where(i < n, h ^ (h >> _LAST_SHIFT), 0)
    tl.store(sums + program, tl.sum(total).to(tl.int64, bitcast=True))
