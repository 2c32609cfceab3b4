"""The Triton kernel of `fingerprint`: the same sums on a GPU, in one read of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..numerics.splitmix64 import GOLDEN, LAST_SHIFT, MIX
from .tables_triton import EXACT, on_device, owners, pointer, table

_TILE: Final = tl.constexpr(2048)
_TILES: Final = tl.constexpr(8)
"""Of a program: each adds up 2^14 elements."""

_GOLDEN: Final = tl.constexpr(GOLDEN)
_SHIFT_0, _FACTOR_0 = map(tl.constexpr, MIX[0])
_SHIFT_1, _FACTOR_1 = map(tl.constexpr, MIX[1])
_LAST_SHIFT: Final = tl.constexpr(LAST_SHIFT)


def parameter_sums(bits: Sequence[Tensor], starts: Sequence[int]) -> list[int]:
    """As `fingerprint.parameter_sum_torch` of each: flat contiguous int32 or int16 rows of one device. One
    launch per type; the host waits once."""
    found = [0] * len(bits)
    waiting = []
    for dtype in (torch.int32, torch.int16):
        some = [i for i, row in enumerate(bits) if row.dtype == dtype and row.numel()]
        if some:
            waiting.append((some, _sums([bits[i] for i in some], [starts[i] for i in some])))
    for some, sums in waiting:
        for i, total in zip(some, sums.tolist(), strict=True):
            # int64 sums wrap around: their bits are those of the unsigned sum, in any order.
            found[i] = total & ((1 << 64) - 1)
    return found


def _sums(bits: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    device = bits[0].device
    n_programs = np.array([-(-row.numel() // (_TILE.value * _TILES.value)) for row in bits])
    begins = n_programs.cumsum() - n_programs
    rows = [[row.data_ptr(), row.numel(), *place] for row, *place in zip(bits, starts, begins, strict=True)]
    sums = torch.empty(int(n_programs.sum()), dtype=torch.int64, device=device)
    with on_device(sums):
        _sum[(sums.numel(),)](
            table(np.array(rows, dtype=np.int64), device),
            owners(n_programs, device),
            sums,
            IS_INT32=bits[0].dtype == torch.int32,
            ALIGNED=all(row.data_ptr() % 16 == 0 for row in bits),
            **EXACT,
        )
        return pad(sums.cumsum(0), (1, 0))[table(np.append(begins, sums.numel()), device)].diff()


@triton.jit
def _sum(
    rows: tl.tensor, owner: tl.tensor, sums: tl.tensor, IS_INT32: tl.constexpr, ALIGNED: tl.constexpr
) -> None:
    """Columns of `rows`: address, elements, index of the first one, first program."""
    program = tl.program_id(0)
    row = rows + 4 * tl.load(owner + program).to(tl.int64)
    n, start = tl.load(row + 1), tl.load(row + 2)
    bits = pointer(tl.load(row), tl.int32 if IS_INT32 else tl.int16, ALIGNED)
    begin = (program - tl.load(row + 3)) * (_TILE * _TILES)
    total = tl.zeros((_TILE,), tl.uint64)
    if begin + _TILE * _TILES <= n:  # without a mask it reads four at a time
        for t in range(_TILES):
            i = begin + t * _TILE + tl.arange(0, _TILE)
            total += _mixed(tl.load(bits + i), i + start)
    else:
        for t in range(_TILES):
            i = begin + t * _TILE + tl.arange(0, _TILE)
            total += tl.where(i < n, _mixed(tl.load(bits + i, mask=i < n, other=0), i + start), 0)
    tl.store(sums + program, tl.sum(total).to(tl.int64, bitcast=True))


@triton.jit
def _mixed(pattern: tl.tensor, index: tl.tensor) -> tl.tensor:
    unsigned = pattern.to(tl.uint32 if pattern.dtype == tl.int32 else tl.uint16, bitcast=True)
    h = index.to(tl.uint64) * _GOLDEN ^ unsigned.to(tl.uint64)
    h = (h ^ (h >> _SHIFT_0)) * _FACTOR_0
    h = (h ^ (h >> _SHIFT_1)) * _FACTOR_1
    return h ^ (h >> _LAST_SHIFT)
