"""The numba kernels of `sparse` for flat groups: selecting, which is local work, and decoding, bit for bit.

Selecting works on panels: 64 chunks of 64 elements stand side by side as columns, so that a transform, and
the search after it, is one operation on rows of 64 floats. Of every 16 coefficients in a row of their group
the largest magnitude is noted; the k-th largest of those maxima is a lower bound for the threshold, since k
blocks reach it. Only blocks that reach it are looked into, and among what is found there the k largest are
chosen (topk_cpu.py). A group never leaves the cache.

Decoding adds up a group's coefficients over the peers in order, at the positions that any of them sent,
brings them to integers, and adds the integer basis vectors of those alone: a few of 64 per chunk. All sums
are below 2^24, so that their order does not matter. The step of the target comes last, in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..base import Entries, Step
from ..codecs.groups import Slab
from ..compiled import compiled
from ..numerics.dct import INVERSE_SCALE, ROUNDER, SMALLEST, TOP_BIT, N
from . import tiles_cpu
from .dct_cpu import INTEGER_BASIS, ORDER, PANEL, add_basis, forward
from .threads import share
from .topk_cpu import choose, threshold
from .update_cpu import PLAIN, POWERS, ZERO, Mean, finish, how_of

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_PER_THREAD: Final = 1 << 17  # elements, at least

_MAGNITUDE: Final = np.int32(0x7FFFFFFF)
_SLICES: Final = 4  # of a column of a panel: blocks of 16 coefficients in a row of their group
_BLOCK: Final = N // _SLICES

_ROUNDER: Final = np.float32(ROUNDER)
_INVERSE_SCALE: Final = np.float32(INVERSE_SCALE)
_ONE: Final = np.float32(1.0)


# ------------------------------------------------------------------------------------------- select: local


def largest(x: Tensor, slab: Slab, transform: bool) -> tuple[Tensor, Tensor, float]:
    """Of each group of a slab the k largest elements, or cosine coefficients, by magnitude; ties go to the
    lower index. Rising int64 indices and float32 values (groups, k), and the largest magnitude of all, which
    is not finite if anything is not. x: the slab's elements, flat contiguous float32 on the CPU.
    """
    index_GK = np.empty((slab.n_groups, slab.k), dtype=np.int64)
    value_GK = np.empty((slab.n_groups, slab.k), dtype=np.float32)
    values, order = x.numpy(), ORDER if transform else np.arange(N)

    def run(first: int, last: int) -> Any:
        return select_groups(values, slab.length, slab.k, transform, order, first, last, index_GK, value_GK)

    tops = share(run, 0, slab.n_groups, smallest=max(1, _PER_THREAD // slab.length))
    top = float(np.array(max(tops), dtype=np.int32).view(np.float32))
    return torch.from_numpy(index_GK), torch.from_numpy(value_GK), top


@compiled
def select_groups(
    x: Array, length: int, k: int, transform: bool, order: Array,
    first: int, last: int, index_GK: Array, value_GK: Array,
) -> Any:  # fmt: skip
    """The bits of the largest magnitude: as integers, NaN is above infinity and that above all numbers."""
    scratch, top = select_scratch(length, transform), np.int32(0)
    together = n_together(length)
    for g in range(first, last, together):
        n_here = min(together, last - g)
        top = max(top, select_some(x, length, k, transform, order, g, n_here, index_GK, value_GK, scratch))
    return top


@numba.njit(inline="always")
def n_together(length: int) -> int:
    """Small groups share a panel."""
    return max(1, N // (-(-length // N)))


@numba.njit(nogil=True)
def select_scratch(length: int, transform: bool) -> Any:
    """What `select_some` needs: of groups this long."""
    n_columns = -(-length // N)
    n_panels = -(-n_columns // N)
    panels = np.zeros(n_panels * PANEL, np.float32)
    coefficients = np.zeros(n_panels * PANEL, np.float32) if transform else panels
    maxima = np.empty(n_panels * _SLICES * N, np.int32)
    blocks = np.empty(n_columns * _SLICES, np.int32)
    candidates, where = np.empty(n_columns * N + 1, np.int32), np.empty(n_columns * N + 1, np.int32)
    return panels, coefficients, maxima, blocks, candidates, where


@numba.njit(nogil=True)
def select_some(
    x: Array, length: int, k: int, transform: bool, order: Array, g: int, n_here: int,
    index_GK: Array, value_GK: Array, scratch: Any,
) -> Any:  # fmt: skip
    """`select_groups` of the groups [g, g + n_here), at most `n_together` of them."""
    panels, coefficients, maxima, blocks, candidates, where = scratch
    bits, n_columns, top = coefficients.view(np.int32), -(-length // N), np.int32(0)
    for h in range(n_here):
        _read(x, (g + h) * length, length, panels, h * n_columns, order)
    for p in range(panels.size // PANEL):
        here = slice(p * PANEL, (p + 1) * PANEL)
        if transform:
            forward(panels[here], coefficients[here])
        for s in range(_SLICES):
            at, to = p * PANEL + s * _BLOCK * N, (p * _SLICES + s) * N
            _block_maxima(bits[at : at + _BLOCK * N], maxima[to : to + N])
    for h in range(n_here):
        c0 = h * n_columns
        _order_blocks(maxima, c0, n_columns, blocks)
        for b in range(blocks.size):
            top = max(top, blocks[b])
        # k blocks have a maximum of at least that much, so k coefficients are.
        enough = threshold(blocks, blocks.size, k) if k <= blocks.size else np.int32(0)
        n = _candidates(bits, blocks, c0, enough, candidates, where)
        choose(candidates, where, n, k, index_GK[g + h])
        for e in range(k):
            i = index_GK[g + h, e]
            value_GK[g + h, e] = coefficients[_place(c0 + i // N) + i % N * N]
    return top


@numba.njit(inline="always")
def _place(column: int) -> int:
    """Where a column begins."""
    return column // N * PANEL + column % N


@numba.njit(nogil=True)
def _read(x: Array, at: int, length: int, panels: Array, column: int, order: Array) -> None:
    """A group becomes columns of 64, the last one filled up with zeros; 8 columns at a time, row by row."""
    n_full = length // N if column % 8 == 0 else 0
    for c in range(0, n_full // 8 * 8, 8):
        source, to = x[at + c * N : at + (c + 8) * N], _place(column + c)
        for i in range(N):
            row = panels[to + order[i] * N : to + order[i] * N + 8]
            for j in range(8):
                row[j] = source[j * N + i]
    for c in range(n_full // 8 * 8, -(-length // N)):
        to = _place(column + c)
        source = x[at + c * N : at + min(length, (c + 1) * N)]
        for i in range(source.size):
            panels[to + order[i] * N] = source[i]
        for i in range(source.size, N):
            panels[to + order[i] * N] = 0


@numba.njit(inline="always")
def _block_maxima(bits: Array, maxima: Array) -> None:
    """The largest magnitude in each column of a slice."""
    for j in range(N):
        largest = bits[j] & _MAGNITUDE
        for i in range(1, _BLOCK):
            largest = max(largest, bits[i * N + j] & _MAGNITUDE)
        maxima[j] = largest


@numba.njit(inline="always")
def _order_blocks(maxima: Array, column: int, n_columns: int, blocks: Array) -> None:
    """The maxima of a group's blocks in the order of its coefficients."""
    for c in range(n_columns):
        at = (column + c) // N * _SLICES * N + (column + c) % N
        for s in range(_SLICES):
            blocks[c * _SLICES + s] = maxima[at + s * N]


@numba.njit(inline="always")
def _candidates(
    bits: Array, blocks: Array, column: int, enough: Word, candidates: Array, where: Array
) -> int:
    """The magnitudes of at least `enough`, and where in the group they are, rising. Returns how many."""
    n = 0
    for b in range(blocks.size):
        if blocks[b] >= enough:
            at = _place(column + b // _SLICES) + b % _SLICES * PANEL // _SLICES
            for i in range(_BLOCK):
                magnitude = bits[at + i * N] & _MAGNITUDE
                candidates[n] = magnitude
                where[n] = b * _BLOCK + i
                n += magnitude >= enough
    return n


# ------------------------------------------------------------------------------------------- decode: exact


def spread(
    index_E: Array, code_E: Array, offsets: Array, scale_G: Array, levels: Array, n_coefficients: int
) -> tuple[Array, Array]:
    """Positions and values of the entries of a pack, as `Sparse.entries`."""
    position_E = np.empty(index_E.size, dtype=np.int64)
    value_E = np.empty(index_E.size, dtype=np.float32)
    _spread(index_E, code_E, offsets, scale_G, levels, n_coefficients, position_E, value_E)
    return position_E, value_E


@compiled
def _spread(
    index_E: Array, code_E: Array, offsets: Array, scale_G: Array, levels: Array, n_coefficients: int,
    position_E: Array, value_E: Array,
) -> None:  # fmt: skip
    for g in range(scale_G.size):
        for e in range(offsets[g], offsets[g + 1]):
            position_E[e] = g * n_coefficients + index_E[e]
            value_E[e] = levels[code_E[e]] * scale_G[g]


def joined(shares: Sequence[Entries]) -> tuple[Array, Array, Array]:
    """Positions, values and offsets of several packs."""
    before = np.cumsum([0, *(s.position_E.size for s in shares[:-1])])
    offset_WG = np.stack([s.offsets + b for s, b in zip(shares, before, strict=True)])
    return (
        np.concatenate([s.position_E for s in shares]),
        np.concatenate([s.value_E for s in shares]),
        offset_WG,
    )


def decode(out: Tensor, start: int, mean: Mean) -> None:
    """out = the elements from `start` on of what the mean stands for, as `Sparse.decode`."""
    _run(out, start, mean, PLAIN, 1.0, 1.0)


def fused_update(target: Tensor, start: int, mean: Mean, step: Step) -> None:
    """As `Compressor.fused_update`: one pass over the target."""
    _run(target, start, mean, how_of(step), step.decay, step.scale)


def _run(target: Tensor, start: int, mean: Mean, how: int, decay: float, scale: float) -> None:
    """`target`: contiguous flat float32 on the CPU."""
    y, m = target.detach().numpy(), mean
    if m.tiles is not None:
        tiles_cpu.run(y, start, m, m.tiles, how, decay, scale)
        return
    factors = np.float32(decay), np.float32(scale)

    def run(first: int, last: int) -> Any:
        return decode_groups(
            y,
            start,
            m.position_E,
            m.value_E,
            m.offset_WG,
            m.weight_W,
            m.inverse,
            INTEGER_BASIS,
            POWERS,
            m.n,
            m.size,
            m.n_coefficients,
            m.transforms,
            how,
            *factors,
            first,
            last,
        )

    if y.size:
        last = -(-(start + y.size) // m.size)
        if not all(share(run, start // m.size, last, max(1, _PER_THREAD // m.size))):
            raise IndexError("a coefficient past the end of its group: the packs were not checked")


@compiled
def decode_groups(
    y: Array, start: int, position_E: Array, value_E: Array, offset_WG: Array, weights: Array, inverse: Word,
    basis: Array, powers: Array, n: int, size: int, n_coefficients: int, transform: bool,
    how: int, decay: Word, scale: Word, first: int, last: int,
) -> Any:  # fmt: skip
    """False if there is no such coefficient."""
    sums = np.zeros(n_coefficients, np.float32)
    x = np.empty(n_coefficients, np.float32)
    for g in range(first, last):
        length = min(size, n - g * size)
        for i in range(-(-length // N) * N if transform else length):
            x[i] = 0
        here = g * n_coefficients
        for w in range(weights.size):
            for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
                i = position_E[e] - here
                if i < 0 or i >= n_coefficients:
                    return False
                sums[i] += value_E[e] * weights[w]
        down = _ONE
        if transform:
            down = _add_coefficients(x, sums, here, g, position_E, offset_WG, inverse, basis, powers)
        else:
            for w in range(weights.size):
                for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
                    i = position_E[e] - here
                    if sums[i] != ZERO:  # the first time only, if several have it
                        x[i] = sums[i] * inverse
                        sums[i] = 0
        a, b = max(g * size, start), min(g * size + length, start + y.size)
        here_x = x[a - g * size : b - g * size]
        if transform:
            _scale(here_x, down)
        finish(y[a - start : b - start], here_x, how, decay, scale)
    return True


@numba.njit(inline="always")
def _add_coefficients(
    x: Array, sums: Array, here: int, g: int, position_E: Array, offset_WG: Array, inverse: Word,
    basis: Array, powers: Array,
) -> Any:  # fmt: skip
    """x becomes the group's elements in integers, `sums` zero again. Returns the power of two to come."""
    chunks = x[: x.size // N * N].reshape(-1, N)
    largest = np.zeros(1, np.float32)
    for w in range(offset_WG.shape[0]):
        for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
            largest[0] = max(largest[0], abs(sums[position_E[e] - here] * inverse))
    exponent = largest.view(np.int32)[0] >> 23
    counts = exponent >= SMALLEST
    up = powers[254 + TOP_BIT - exponent] if counts else ZERO
    for w in range(offset_WG.shape[0]):
        for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
            i = position_E[e] - here
            q = (sums[i] * inverse * up + _ROUNDER) - _ROUNDER
            sums[i] = 0  # a coefficient that several have is added once
            if q != ZERO:
                add_basis(chunks, i, q, basis)
    return powers[exponent - TOP_BIT] if counts else ZERO


@numba.njit(inline="always")
def _scale(x: Array, down: Word) -> None:
    for i in range(x.size):
        x[i] = x[i] * down * _INVERSE_SCALE
