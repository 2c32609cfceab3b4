"""The Triton kernel of `noise`: the same bits on a GPU, one pass over the parameters.

A program takes a block of 4096 elements through all updates. Its words are computed once, four lanes of
Philox calls, and each lane is spread over its elements: rows of a tile are the bits (bytes) of a word.

`enable_fp_fusion=False` goes with every launch: a fused multiply-add rounds once where the reference rounds
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from thinwire.compression.noise import BLOCK, CALLS
from thinwire.compression.quantiles import NORMAL_256

if TYPE_CHECKING:
    from thinwire.compression.noise import Update, Where

EXACT: Final = {"enable_fp_fusion": False}
"""What every launch of an exact kernel says."""

_WARPS: Final = 2  # a program's accumulators fit into the registers, and few words are computed twice
_BLOCK: Final = tl.constexpr(BLOCK)
_ROUNDS: Final = tl.constexpr(10)


def combine(out: Tensor, theta: Tensor, updates: Sequence[Update], where: Where) -> None:
    """out = theta after the updates, as `noise.combine_torch`. Flat contiguous float32, on one device."""
    n = theta.numel()
    if not n:
        return
    n_probes = sum(u.seeds.size for u in updates)
    first, shift = divmod(where.start, BLOCK)
    n_blocks = -(-(shift + n) // BLOCK)
    with on_device(theta):
        plan = _plan(_encoded(updates, where), theta.device)
        _combine[(n_blocks,)](
            *(out, theta, n, shift, plan, _table(theta.device), n_probes, len(updates), first),
            third=where.param_index,
            GAUSS=where.kind == "gauss",
            N_CALLS=CALLS[where.kind],
            num_warps=_WARPS,
            **EXACT,
        )


def on_device(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whichever its tensors are on. On the CPU nothing is set."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _encoded(updates: Sequence[Update], where: Where) -> bytes:
    """int64: the seeds, then per probe the fourth word of the counter below the bits of the coefficient, then
    per update the number of its last probe and one below the bits of its decay."""
    seeds = np.concatenate([u.seeds for u in updates])
    tails = np.concatenate([u.numbers for u in updates]) + where.last_word(0)
    ends = np.cumsum([u.seeds.size for u in updates])
    decays = np.array([u.decay for u in updates], dtype=np.float32)
    factors = np.concatenate([*(u.coefficients for u in updates), decays])
    low = np.concatenate([tails, ends]).astype(np.uint64)
    return bytes(np.concatenate([seeds, low | factors.view(np.uint32).astype(np.uint64) << np.uint64(32)]))


@lru_cache(maxsize=8)
def _plan(encoded: bytes, device: torch.device) -> Tensor:
    """Kept, because all parameters of a step have the same one."""
    return torch.from_numpy(np.frombuffer(encoded, dtype=np.int64).copy()).to(device)


@lru_cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(NORMAL_256, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["n_probes", "n_updates", "first", "third"])
def _combine(
    y: tl.tensor, x: tl.tensor, n: tl.tensor, shift: tl.tensor, plan: tl.tensor, table: tl.tensor,
    n_probes: tl.tensor, n_updates: tl.tensor, first: tl.tensor, third: tl.tensor,
    GAUSS: tl.constexpr, N_CALLS: tl.constexpr,
) -> None:  # fmt: skip
    """`first`: the block in which the tensors begin, `shift` elements after its first one."""
    block = tl.program_id(0).to(tl.int64)
    at = block * _BLOCK - shift
    row = tl.arange(0, _BLOCK // (4 * N_CALLS))[:, None]
    e = row * (4 * N_CALLS) + tl.arange(0, N_CALLS)[None, :]  # of lane 0
    i0, i1, i2, i3 = at + e, at + e + N_CALLS, at + e + 2 * N_CALLS, at + e + 3 * N_CALLS
    x0 = tl.load(x + i0, mask=(i0 >= 0) & (i0 < n))
    x1 = tl.load(x + i1, mask=(i1 >= 0) & (i1 < n))
    x2 = tl.load(x + i2, mask=(i2 >= 0) & (i2 < n))
    x3 = tl.load(x + i3, mask=(i3 >= 0) & (i3 < n))
    begin = 0
    for u in range(n_updates):
        update = tl.load(plan + 2 * n_probes + u)
        end, decay = update.to(tl.int32), _upper_float(update)
        a0 = _minus_zeros(e)  # -0 + term is the term, whatever its sign
        a1, a2, a3 = a0, a0, a0
        for p in range(begin, end):
            probe = tl.load(plan + n_probes + p)
            fourth, coefficient = probe.to(tl.uint32), _upper_float(probe)
            w0, w1, w2, w3 = random_words(first + block, N_CALLS, third, fourth, tl.load(plan + p))
            a0 += _term(w0, row, coefficient, table, GAUSS)
            a1 += _term(w1, row, coefficient, table, GAUSS)
            a2 += _term(w2, row, coefficient, table, GAUSS)
            a3 += _term(w3, row, coefficient, table, GAUSS)
        x0, x1, x2, x3 = x0 * decay, x1 * decay, x2 * decay, x3 * decay
        if end > begin:  # without a probe, subtracting would make 0 of -0
            x0, x1, x2, x3 = x0 - a0, x1 - a1, x2 - a2, x3 - a3
        begin = end
    tl.store(y + i0, x0, mask=(i0 >= 0) & (i0 < n))
    tl.store(y + i1, x1, mask=(i1 >= 0) & (i1 < n))
    tl.store(y + i2, x2, mask=(i2 >= 0) & (i2 < n))
    tl.store(y + i3, x3, mask=(i3 >= 0) & (i3 < n))


@triton.jit
def random_words(
    block: tl.tensor, N_CALLS: tl.constexpr, third: tl.tensor, fourth: tl.tensor, seed: tl.tensor
) -> tl.tensor:
    """The four lanes of the block's calls, uint32 (N_CALLS,) each."""
    number = block.to(tl.int64) * N_CALLS
    # A power of two of calls: the low word never carries.
    low = number.to(tl.uint32) + tl.arange(0, N_CALLS).to(tl.uint32)
    high = (number >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, third.to(tl.uint32), fourth, _ROUNDS)


@triton.jit
def _term(
    words: tl.tensor, row: tl.tensor, coefficient: tl.tensor, table: tl.tensor, GAUSS: tl.constexpr
) -> tl.tensor:
    """coefficient * z of the elements of a lane."""
    if GAUSS:
        z = tl.load(table + ((words[None, :] >> (8 * row).to(tl.uint32)) & 255).to(tl.int32))
        term = z * coefficient
    else:
        up = (31 - row).to(tl.uint32)
        signs = (words[None, :] << up) & 0x80000000
        term = (signs ^ coefficient.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return term


@triton.jit
def _upper_float(x: tl.tensor) -> tl.tensor:
    """The float32 in the upper half of an int64."""
    return (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _minus_zeros(like: tl.tensor) -> tl.tensor:
    """-0 in that shape; written as a float, the sign would be lost."""
    return tl.full(like.shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
