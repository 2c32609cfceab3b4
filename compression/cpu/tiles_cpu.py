"""The numba kernels of square tiles: `dct_topk` with layout "tiles", as `sparse_cpu` for flat groups.

Selecting is local work: a tile of 64 is transformed as a panel, turned and transformed again, a smaller one
by products with the basis. The k largest are found as in flat groups, by way of blocks of 16.

Decoding has the bits of the reference. Along the rows the basis vectors of the coefficients that are not zero
are added up, and only rows that have any go on; the sums become integers of 10 bits again. Along the columns
a basis vector is the same from both ends, or for odd ones with the other sign: even and odd ones add up in
half the rows each, four at a time, and sum and difference give all rows. All sums are those of integers below
2^24, exact in any order.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..codecs.groups import Slab
from ..codecs.tiles import Tiles
from ..compiled import compiled
from ..exact import to_float32
from ..numerics.dct import ROUNDER, SMALLEST, TOP_BIT, N, integer_basis, real_basis
from .dct_cpu import ORDER, forward
from .reduce_cpu import largest_bits
from .threads import share
from .topk_cpu import choose, threshold
from .update_cpu import POWERS, Mean, finish

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_PER_THREAD: Final = 1 << 17  # elements, at least
_BLOCK: Final = 16  # coefficients
_MAGNITUDE: Final = np.int32(0x7FFFFFFF)
_ROUNDER: Final = np.float32(ROUNDER)
_ZERO: Final = np.float32(0.0)
_CPU: Final = torch.device("cpu")


# ------------------------------------------------------------------------------------------- select: local


def largest(x: Tensor, tiles: Tiles, slab: Slab) -> tuple[Tensor, Tensor, float]:
    """As `sparse_cpu.largest`. x: the whole parameter, flat contiguous float32 on the CPU."""
    index_GK = np.empty((slab.n_groups, slab.k), dtype=np.int64)
    value_GK = np.empty((slab.n_groups, slab.k), dtype=np.float32)
    matrix = x.detach().numpy().reshape(tiles.rows, tiles.columns)
    basis = real_basis(_CPU, tiles.side).numpy()

    def run(first: int, last: int) -> Any:
        at = first - slab.first
        return _largest(matrix, tiles.side, slab.k, basis, ORDER, first, last, index_GK[at:], value_GK[at:])

    tops = share(run, slab.first, slab.last, smallest=max(1, _PER_THREAD // tiles.side**2))
    top = float(np.array(max(tops), dtype=np.int32).view(np.float32))
    return torch.from_numpy(index_GK), torch.from_numpy(value_GK), top


@compiled
def _largest(
    matrix: Array, side: int, k: int, basis: Array, order: Array, first: int, last: int,
    index_GK: Array, value_GK: Array,
) -> Any:  # fmt: skip
    """The bits of the largest magnitude: as integers, NaN is above infinity and that above all numbers."""
    n_wide = -(-matrix.shape[1] // side)
    a, b = np.zeros(side * side, np.float32), np.zeros(side * side, np.float32)
    n_blocks = side * side // _BLOCK
    blocks = np.empty(n_blocks, np.int32)
    candidates, where = np.empty(side * side + 1, np.int32), np.empty(side * side + 1, np.int32)
    top = np.int32(0)
    for g in range(first, last):
        r, c = g // n_wide * side, g % n_wide * side
        tile = matrix[r : r + side, c : c + side]
        if side == N:
            _read_turned(tile, order, a)
            forward(a, b)
            _turn(b, order, a)
            forward(a, b)
        else:
            _transform(tile, basis, a, b)
        bits = b.view(np.int32)
        for i in range(n_blocks):
            blocks[i] = largest_bits(bits[i * _BLOCK : (i + 1) * _BLOCK])
        top = max(top, largest_bits(blocks))
        enough = threshold(blocks, n_blocks, k) if k <= n_blocks else np.int32(0)
        n = _candidates(bits, blocks, enough, candidates, where)
        choose(candidates, where, n, k, index_GK[g - first])
        for e in range(k):
            value_GK[g - first, e] = b[index_GK[g - first, e]]
    return top


@numba.njit(nogil=True)
def _read_turned(tile: Array, order: Array, out: Array) -> None:
    """The columns of a tile become rows, in the order of `dct_cpu.forward`; filled up with zeros."""
    if tile.size < N * N:
        out[:] = _ZERO
    for r in range(tile.shape[0]):
        row = tile[r]
        for c in range(row.size):
            out[order[c] * N + r] = row[c]


@numba.njit(nogil=True)
def _turn(x: Array, order: Array, out: Array) -> None:
    for r in range(N):
        for c in range(N):
            out[order[c] * N + r] = x[r * N + c]


@numba.njit(nogil=True)
def _transform(tile: Array, basis: Array, half: Array, out: Array) -> None:
    """Along both axes, for small tiles; those at the edges count as filled up with zeros."""
    n = basis.shape[0]
    half[:] = _ZERO
    out[:] = _ZERO
    for r in range(tile.shape[0]):
        row = half[r * n : (r + 1) * n]
        for c in range(tile.shape[1]):
            value = tile[r, c]
            for k in range(n):
                row[k] += value * basis[k, c]
    for r in range(tile.shape[0]):
        row = half[r * n : (r + 1) * n]
        for k in range(n):
            factor, into = basis[k, r], out[k * n : (k + 1) * n]
            for j in range(n):
                into[j] += factor * row[j]


@numba.njit(inline="always")
def _candidates(bits: Array, blocks: Array, enough: Word, candidates: Array, where: Array) -> int:
    """The magnitudes of at least `enough`, and where in the group they are, rising. Returns how many."""
    n = 0
    for b in range(blocks.size):
        if blocks[b] >= enough:
            for i in range(b * _BLOCK, (b + 1) * _BLOCK):
                magnitude = bits[i] & _MAGNITUDE
                candidates[n] = magnitude
                where[n] = i
                n += magnitude >= enough
    return n


# ------------------------------------------------------------------------------------------- decode: exact


def run(y: Array, start: int, mean: Mean, tiles: Tiles, how: int, decay: float, scale: float) -> None:
    """As `sparse_cpu._run` for flat groups; `y`: the elements from `start` on."""
    if not y.size:
        return
    m, n = mean, tiles.side
    basis = integer_basis(_CPU, n).numpy()
    real = np.float32(to_float32(2.0 / (n * 127.0 * 127.0)))
    factors = real, how, np.float32(decay), np.float32(scale)
    entries = m.position_E, m.value_E, m.offset_WG, m.weight_W, m.inverse, basis, POWERS

    def groups(first: int, last: int) -> Any:
        return _tiles(y, start, *entries, tiles.rows, tiles.columns, *factors, first, last)

    tall = n * tiles.columns
    first, last = start // tall * tiles.n_wide, -(-(start + y.size) // tall) * tiles.n_wide
    if not all(share(groups, first, last, max(1, _PER_THREAD // n**2))):
        raise IndexError("a coefficient past the end of its group: the packs were not checked")


@compiled
def _tiles(
    y: Array, start: int, position_E: Array, value_E: Array, offset_WG: Array, weights: Array, inverse: Word,
    basis: Array, powers: Array, rows: int, columns: int, real: Word,
    how: int, decay: Word, scale: Word, first: int, last: int,
) -> Any:  # fmt: skip
    """False if there is no such coefficient."""
    n = basis.shape[0]
    n_wide = -(-columns // n)
    sums = np.zeros(n * n, np.float32)
    half, x = np.zeros(n * n, np.float32), np.empty(n * n, np.float32)
    used = np.zeros(n, np.int64)
    for g in range(first, last):
        here = g * n * n
        for w in range(weights.size):
            for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
                i = position_E[e] - here
                if i < 0 or i >= n * n:
                    return False
                sums[i] += value_E[e] * weights[w]
        down = _along_rows(half, used, sums, here, g, position_E, offset_WG, inverse, basis, powers)
        half_down = _along_columns(half, used, x, basis, powers)
        r, c = g // n_wide * n, g % n_wide * n
        for i in range(min(n, rows - r)):
            at = (r + i) * columns + c
            a, b = max(at, start), min(at + min(n, columns - c), start + y.size)
            if a < b:
                row = x[i * n + a - at : i * n + b - at]
                _scale(row, half_down, real, down)
                finish(y[a - start : b - start], row, how, decay, scale)
    return True


@numba.njit(inline="always")
def _along_rows(
    half: Array, used: Array, sums: Array, here: int, g: int, position_E: Array, offset_WG: Array,
    inverse: Word, basis: Array, powers: Array,
) -> Any:  # fmt: skip
    """`half`: the sums along the rows that have coefficients, marked in `used`; `sums` zero again. Returns
    the power of two to come."""
    n = basis.shape[0]
    largest = np.zeros(1, np.float32)
    for w in range(offset_WG.shape[0]):
        for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
            largest[0] = max(largest[0], abs(sums[position_E[e] - here] * inverse))
    exponent = largest.view(np.int32)[0] >> 23
    counts = exponent >= SMALLEST
    up = powers[254 + TOP_BIT - exponent] if counts else _ZERO
    for w in range(offset_WG.shape[0]):
        for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
            i = position_E[e] - here
            q = (sums[i] * inverse * up + _ROUNDER) - _ROUNDER
            sums[i] = 0  # a coefficient that several have is added once
            if q != _ZERO:
                row, vector = half[i // n * n : i // n * n + n], basis[i % n]
                used[i // n] = 1
                for j in range(n):
                    row[j] += q * vector[j]
    return powers[exponent - TOP_BIT] if counts else _ZERO


@numba.njit(nogil=True)
def _along_columns(half: Array, used: Array, x: Array, basis: Array, powers: Array) -> Any:
    """x = the sums along the columns of `half` as integers; `half` and `used` zero again. Returns the power
    of two to come.

    Basis vector k is the same from both ends, with its sign turned round if k is odd: half of it will do.
    """
    n = basis.shape[0]
    exponent = largest_bits(half.view(np.int32)) >> 23
    counts = exponent >= SMALLEST
    up = powers[254 + TOP_BIT - exponent] if counts else _ZERO
    _to_integers(half, up)
    x[:] = _ZERO
    rows, sums = half.reshape(n, n), x.reshape(n, n)
    group = np.zeros(4, np.int64)
    for odd in range(2):  # even ones add up in the upper half of x, odd ones in the lower half
        n_held = 0
        for k in range(odd, n, 2):
            if used[k]:
                group[n_held] = k
                n_held += 1
            if n_held == 4 or (n_held > 0 and k + 2 >= n):
                a, b = group[0], group[min(1, n_held - 1)]
                c, d = group[min(2, n_held - 1)], group[n_held - 1]
                into = sums[odd * (n // 2) : (odd + 1) * (n // 2)]
                r0, r1, r2, r3 = rows[a], rows[b], rows[c], rows[d]
                # Those that are not there count zero times.
                _add_four(into, r0, r1, r2, r3, basis[a], basis[b], basis[c], basis[d], n_held)
                n_held = 0
    half[:] = _ZERO
    used[:] = 0
    _unfold(sums)
    return powers[exponent - TOP_BIT] if counts else _ZERO


@numba.njit(nogil=True)
def _to_integers(x: Array, up: Word) -> None:
    for i in range(x.size):
        x[i] = (x[i] * up + _ROUNDER) - _ROUNDER


@numba.njit(nogil=True)
def _add_four(
    x: Array, r0: Array, r1: Array, r2: Array, r3: Array, b0: Array, b1: Array, b2: Array, b3: Array, n: int
) -> None:  # fmt: skip
    for i in range(x.shape[0]):
        f0 = b0[i]
        f1 = b1[i] if n > 1 else _ZERO
        f2 = b2[i] if n > 2 else _ZERO
        f3 = b3[i] if n > 3 else _ZERO
        for j in range(x.shape[1]):
            x[i, j] += (f0 * r0[j] + f1 * r1[j]) + (f2 * r2[j] + f3 * r3[j])


@numba.njit(nogil=True)
def _unfold(x: Array) -> None:
    """Rows i and n - 1 - i are the sum and the difference of the even and the odd part of row i."""
    h = x.shape[0] // 2
    odd = x[h:].copy()
    for i in range(h):
        upper, lower, o = x[i], x[2 * h - 1 - i], odd[i]
        for j in range(o.size):
            even = upper[j]
            upper[j] = even + o[j]
            lower[j] = even - o[j]


@numba.njit(nogil=True)
def _scale(x: Array, half_down: Word, real: Word, down: Word) -> None:
    for i in range(x.size):
        x[i] = x[i] * half_down * real * down
