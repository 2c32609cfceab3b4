"""The Triton kernel of `noise`: the same bits on a GPU, one pass over the parameters.

A program takes a block of 4096 elements through all updates. Its words are computed once, four lanes of
Philox calls, and each lane is spread over its elements: rows of a tile are the bits (bytes) of a word.

`enable_fp_fusion=False` goes with every launch: a fused multiply-add rounds once where the reference rounds
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics.noise_layout import BLOCK, CALLS, NoiseKind, Piece, Update, Where
from ..numerics.quantiles import NORMAL_256
from .rounding_triton import random_halves, rounded_bits
from .tables_triton import EXACT, high_float, on_device, owners, pointer, table, upload
from .words_triton import in_order, random_words

_WARPS: Final = 2  # a program's accumulators fit into the registers, and few words are computed twice
_BLOCK: Final = tl.constexpr(BLOCK)


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
            out,
            theta,
            n,
            shift,
            plan,
            _table(theta.device),
            n_probes,
            len(updates),
            first,
            third=where.param_index,
            GAUSS=where.kind == "gauss",
            N_CALLS=CALLS[where.kind],
            num_warps=_WARPS,
            **EXACT,
        )


def combine_all(pieces: Sequence[Piece], updates: Sequence[Update], kind: NoiseKind, round_seed: int) -> None:
    """As `noise.update_pieces_`, for pieces of one type on one device: a launch for the blocks that are
    whole, and one for those that are not, or lie at odd addresses, and have to be read element by element."""
    whole, rest = _blocks_of([p for p in pieces if p.theta.numel()])
    is_float32 = pieces[0].theta.dtype == torch.float32
    device = pieces[0].theta.device
    plan = _plan(_encoded(updates, Where.of(kind, 0, 0)), device)
    n_probes = sum(u.seeds.size for u in updates)
    for rows, is_whole in ((whole, True), (rest, False)):
        if rows:
            n_programs = np.array([row.pop() for row in rows])
            columns = np.array(rows, dtype=np.int64)
            columns[:, -1] = n_programs.cumsum() - n_programs
            with on_device(plan):
                _combine_all[(int(n_programs.sum()),)](
                    table(columns, device),
                    owners(n_programs, device),
                    plan,
                    _table(device),
                    n_probes,
                    len(updates),
                    round_seed & 0xFFFFFFFF,
                    round_seed >> 32,
                    GAUSS=kind == "gauss",
                    N_CALLS=CALLS[kind],
                    WHOLE=is_whole,
                    FLOAT32=is_float32,
                    num_warps=_WARPS if is_float32 else 2 * _WARPS,
                    **EXACT,
                )


def _blocks_of(pieces: Sequence[Piece]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of whole blocks and of others: address, elements, how many of the first block are missing, its
    number, index of the parameter, the first block of this row, room for the first program; and how many
    blocks it has."""
    whole, rest = [], []
    for p in pieces:
        first, shift = divmod(p.start, BLOCK)
        n = p.theta.numel()
        row = [p.theta.data_ptr(), n, shift, first, p.param_index]
        n_blocks = -(-(shift + n) // BLOCK)
        begin, end = int(shift > 0), (shift + n) // BLOCK
        if begin >= end or p.theta.data_ptr() % 16 or shift % 8:
            rest.append([*row, 0, 0, n_blocks])
            continue
        whole.append([*row, begin, 0, end - begin])
        rest += [[*row, b, 0, 1] for b in {0, n_blocks - 1} if not begin <= b < end]
    return whole, rest


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
    return upload(torch.from_numpy(np.frombuffer(encoded, dtype=np.int64).copy()), device)


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
    i0, i1, i2, i3 = _places(block * _BLOCK - shift, N_CALLS)
    x0, x1, x2, x3 = _updated(
        _read(x, i0, n, False), _read(x, i1, n, False), _read(x, i2, n, False), _read(x, i3, n, False),
        first + block, third, plan, table, n_probes, n_updates, GAUSS, N_CALLS,
    )  # fmt: skip
    _write(y, i0, n, x0, False)
    _write(y, i1, n, x1, False)
    _write(y, i2, n, x2, False)
    _write(y, i3, n, x3, False)


@triton.jit(do_not_specialize=["n_probes", "n_updates", "seed_low", "seed_high"])
def _combine_all(
    rows: tl.tensor, owner: tl.tensor, plan: tl.tensor, table: tl.tensor, n_probes: tl.tensor,
    n_updates: tl.tensor, seed_low: tl.tensor, seed_high: tl.tensor, GAUSS: tl.constexpr,
    N_CALLS: tl.constexpr, WHOLE: tl.constexpr, FLOAT32: tl.constexpr,
) -> None:  # fmt: skip
    """In place. `_blocks_of` has the columns of `rows`."""
    program = tl.program_id(0)
    row = rows + 7 * tl.load(owner + program).to(tl.int64)
    n, shift, third = tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
    block = program - tl.load(row + 6) + tl.load(row + 5)
    number = tl.load(row + 3) + block
    at = block * _BLOCK - shift
    x = pointer(tl.load(row), tl.float32 if FLOAT32 else tl.int16, WHOLE)
    if WHOLE:
        at = tl.multiple_of(at, 8)
    i0, i1, i2, i3 = _places(at, N_CALLS)
    x0, x1, x2, x3 = _updated(
        _read(x, i0, n, WHOLE), _read(x, i1, n, WHOLE), _read(x, i2, n, WHOLE), _read(x, i3, n, WHOLE),
        number, third, plan, table, n_probes, n_updates, GAUSS, N_CALLS,
    )  # fmt: skip
    if FLOAT32:
        _write(x, i0, n, x0, WHOLE)
        _write(x, i1, n, x1, WHOLE)
        _write(x, i2, n, x2, WHOLE)
        _write(x, i3, n, x3, WHOLE)
    else:
        seed = seed_low.to(tl.uint32).to(tl.uint64) | (seed_high.to(tl.uint32).to(tl.uint64) << 32)
        bits = in_order(x0, x1, x2, x3).to(tl.int32, bitcast=True)
        rounded = rounded_bits(bits, random_halves(number, third, seed))
        _write(x, at + tl.arange(0, _BLOCK), n, rounded, WHOLE)


@triton.jit
def _places(at: tl.tensor, N_CALLS: tl.constexpr) -> tl.tensor:
    """Of the elements of the four lanes, in a block that begins at element `at`: (rows, calls)."""
    row = tl.arange(0, _BLOCK // (4 * N_CALLS))[:, None]
    e = row * (4 * N_CALLS) + tl.arange(0, N_CALLS)[None, :]
    return at + e, at + e + N_CALLS, at + e + 2 * N_CALLS, at + e + 3 * N_CALLS


@triton.jit
def _read(x: tl.tensor, i: tl.tensor, n: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """float32, of that or of the bits of bfloat16."""
    if WHOLE:
        value = tl.load(x + i)
    else:
        value = tl.load(x + i, mask=(i >= 0) & (i < n), other=0)
    if x.dtype.element_ty == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _write(y: tl.tensor, i: tl.tensor, n: tl.tensor, value: tl.tensor, WHOLE: tl.constexpr) -> None:
    if WHOLE:
        tl.store(y + i, value)
    else:
        tl.store(y + i, value, mask=(i >= 0) & (i < n))


@triton.jit
def _updated(
    x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, number: tl.tensor, third: tl.tensor,
    plan: tl.tensor, table: tl.tensor, n_probes: tl.tensor, n_updates: tl.tensor,
    GAUSS: tl.constexpr, N_CALLS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The lanes of a block, after the updates."""
    row = tl.arange(0, _BLOCK // (4 * N_CALLS))[:, None]
    begin = 0
    for u in range(n_updates):
        update = tl.load(plan + 2 * n_probes + u)
        end, decay = update.to(tl.int32), high_float(update)
        a0 = _minus_zeros(x0)  # -0 + term is the term, whatever its sign
        a1, a2, a3 = a0, a0, a0
        for p in range(begin, end):
            probe = tl.load(plan + n_probes + p)
            fourth, coefficient = probe.to(tl.uint32), high_float(probe)
            w0, w1, w2, w3 = random_words(number, N_CALLS, third, fourth, tl.load(plan + p))
            a0 += _term(w0, row, coefficient, table, GAUSS)
            a1 += _term(w1, row, coefficient, table, GAUSS)
            a2 += _term(w2, row, coefficient, table, GAUSS)
            a3 += _term(w3, row, coefficient, table, GAUSS)
        x0, x1, x2, x3 = x0 * decay, x1 * decay, x2 * decay, x3 * decay
        if end > begin:  # without a probe, subtracting would make 0 of -0
            x0, x1, x2, x3 = x0 - a0, x1 - a1, x2 - a2, x3 - a3
        begin = end
    return x0, x1, x2, x3


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
def _minus_zeros(like: tl.tensor) -> tl.tensor:
    """-0 in that shape; written as a float, the sign would be lost."""
    return tl.full(like.shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
