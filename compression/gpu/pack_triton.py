"""The Triton kernels of packing: local work, with the choice and the codes of the reference but
for rounding in sums.

A program takes one group: it reads the momentum and the gradient once, transforms, finds the k largest and
writes them down, and writes back once what is left of the momentum. A second kernel moves the entries of
groups that send any together and makes codes of them; of these come the bytes (bits_triton.py). All
parameters have their groups in the same launches, and the host waits for none of them: only for the packs,
when they have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..base import Change, Packed, Source
from ..codecs.groups import Flat
from ..codecs.sparse_layout import SparseLayout
from ..codecs.tiles import Tiles
from ..exact import to_float32
from ..numerics import dct
from ..numerics.bit_layout import n_bytes
from ..numerics.index_layout import RiceIndices
from ..numerics.value_formats import check_sendable
from .bits_triton import pack_rows
from .indices_triton import DeviceRanges, ranges_on
from .sparse_triton import halves, inverse_halves, powers, tile_basis, tile_of
from .tables_triton import (
    EXACT,
    Arrival,
    floats,
    low_float,
    on_device,
    owners,
    pointer,
    refuse_other_rows,
    table,
)
from .values_triton import MAX_GROUP, code_of, number_of, scale_of, value_of

_LEAST_SIDE: Final = 16
_N: Final = tl.constexpr(dct.N)
_HALF: Final = tl.constexpr(dct.N // 2)
_ROUNDER: Final = tl.constexpr(dct.ROUNDER)
_INVERSE_SCALE: Final = tl.constexpr(dct.INVERSE_SCALE)
_INFINITE: Final = tl.constexpr(0x7F800000)
_SENDABLE: Final = tl.constexpr((127 + 59) << 23)
"""Bits of 2^59: values below it can be sent."""


def takes(layout: SparseLayout, shape: tuple[int, ...]) -> bool:
    """Whether there is a kernel: a group has to fit into the registers of a program, and a tile has to be
    large enough for products."""
    groups = layout.groups(shape)
    return layout.group_size <= MAX_GROUP and (isinstance(groups, Flat) or groups.side >= _LEAST_SIDE)


class Sent:
    """Packs of some parameters of one device, on their way to the host.

    Nothing waits before `packs`. A group with values that cannot be sent stays as it was.
    """

    def __init__(self, layout: SparseLayout, sources: Sequence[Source], change: Change | None = None) -> None:
        self._indices = layout.indices
        refuse_other_rows((x, s.part.n_global) for s in sources for x in (s.x, s.gradient) if x is not None)
        device = sources[0].x.device
        ranges = ranges_on(layout, tuple(s.part.shape for s in sources), device)
        self._groups = ranges.host.layouts
        scale_G = torch.zeros(ranges.n_groups, dtype=torch.int16, device=device)
        top_G = torch.zeros(scale_G.numel() + 1, dtype=torch.int32, device=device)
        entry_GK = torch.empty(scale_G.numel() * layout.k, dtype=torch.int32, device=device)
        if scale_G.numel():
            with on_device(scale_G):
                _select_all(layout, sources, change, ranges, scale_G, top_G, entry_GK)
        codes = _codes(layout, ranges, entry_GK, ranges.k_G * (scale_G != 0))
        self._byte_P, self._unary_P = codes.byte_P, codes.unary_P
        self._arrival = Arrival(scale_G, top_G.amax(), codes.n_unary_P, codes.octets)

    def packs(self) -> list[Packed]:
        """Waits for them. Raises ValueError for values that are not finite or too large."""
        scale_G, top, n_unary_P, octets = self._arrival.wait()
        check_sendable(top.view(torch.float32))
        found: list[Packed] = []
        indices, first = self._indices, 0
        for p, groups in enumerate(self._groups):
            scales = scale_G[first : first + groups.n_groups].view(torch.bfloat16).clone()
            first += groups.n_groups
            n = n_bytes(int(groups.n_sent(scales).sum()), indices.width)
            codes = octets[self._byte_P[p] :][:n].clone()
            if isinstance(indices, RiceIndices):
                n = indices.unary_bytes(int(n_unary_P[p]), groups.most)
                codes = torch.cat([codes, octets[self._unary_P[p] :][:n]])
            found.append((scales, codes))
        return found


# ------------------------------------------------------------------------------------------- groups


def _select_all(
    layout: SparseLayout, sources: Sequence[Source], change: Change | None, ranges: DeviceRanges,
    scale_G: Tensor, top_G: Tensor, entry_GK: Tensor,
) -> None:  # fmt: skip
    """A launch for flat groups, and one for tiles."""
    by_side: dict[int, list[int]] = {}
    for p, source in enumerate(sources):
        groups = layout.groups(source.part.shape)
        if groups.n_groups:
            by_side.setdefault(groups.side if isinstance(groups, Tiles) else 0, []).append(p)
    device, size = scale_G.device, layout.group_size
    for side, some in by_side.items():
        n_groups = np.diff(ranges.host.first_P)[some]
        rows = [_row_of(layout, sources[p], int(ranges.host.first_P[p])) for p in some]
        begins = n_groups.cumsum() - n_groups
        _select[(int(n_groups.sum()),)](
            table(np.column_stack([np.array(rows, dtype=np.int64), begins]), device),
            owners(n_groups, device),
            scale_G,
            top_G,
            entry_GK,
            ranges.k_G,
            dct.real_basis(device, side) if side else forward_halves(device),
            tile_basis(device, side) if side else inverse_halves(device),
            change.scale if change is not None else top_G,
            *((change.decay, change.alpha) if change is not None else (0.0, 0.0)),
            size,
            layout.k,
            to_float32(2.0 / (max(1, side) * 127.0 * 127.0)),
            FORMAT=number_of(layout.format),
            TRANSFORMS=layout.transforms,
            CHANGES=change is not None,
            SIDE=side,
            CHUNKS=side * side // dct.N if side else max(16, triton.next_power_of_2(-(-size // dct.N))),
            num_warps=16 if side else 8,
            maxnreg=128,  # two groups at a time on a multiprocessor: one computes while the other waits
            **EXACT,
        )


def _row_of(layout: SparseLayout, source: Source, first_group: int) -> list[int]:
    groups = layout.groups(source.part.shape)
    rows, columns = (groups.rows, groups.columns) if isinstance(groups, Tiles) else (source.x.numel(), 1)
    gradient = source.gradient.data_ptr() if source.gradient is not None else 0
    factor = int(floats(np.array(source.factor), np.array(0.0)))
    return [source.x.data_ptr(), gradient, rows, columns, factor, first_group]


@cache
def forward_halves(device: torch.device) -> Tensor:
    """float32 (2, 32, 32): [h, j, m] is element j of the real basis vector 2 m + h; see `inverse_halves`."""
    half = dct.real_basis(device)[:, : dct.N // 2]
    return torch.stack([half[0::2].T, half[1::2].T]).contiguous()


@triton.jit
def _select(  # noqa: PLR0915 - from the momentum to what is left of it, in one pass
    rows: tl.tensor, owner: tl.tensor, scale_G: tl.tensor, top_G: tl.tensor, entry_GK: tl.tensor,
    k_G: tl.tensor, forward: tl.tensor, inverse: tl.tensor, gradient_scale: tl.tensor, decay: tl.tensor,
    alpha: tl.tensor, size: tl.tensor, k_most: tl.tensor, tile_scale: tl.tensor, FORMAT: tl.constexpr,
    TRANSFORMS: tl.constexpr, CHANGES: tl.constexpr, SIDE: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """A group. Columns of `rows`: address, address of the gradient or 0, shape (elements and 1 for flat
    groups), factor, first group of all, first program."""
    row = rows + 7 * tl.load(owner + tl.program_id(0)).to(tl.int64)
    group = tl.program_id(0) - tl.load(row + 6)
    g = group + tl.load(row + 5)
    gradient = tl.load(row + 1)
    factor = 0.0 * decay
    if CHANGES:
        factor = low_float(tl.load(row + 4)) * tl.load(gradient_scale)
    takes_in = (gradient != 0) & (factor != 0)
    x, toward = pointer(tl.load(row), tl.float32), pointer(gradient, tl.float32)
    if SIDE > 0:
        r, c = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
        columns = tl.load(row + 3)
        n_wide = tl.cdiv(columns, SIDE)
        v, h = group // n_wide * SIDE + r, group % n_wide * SIDE + c
        i, there = v * columns + h, (v < tl.load(row + 2)) & (h < columns)
        low = _gathered(x, toward, i, there, takes_in, decay, factor, CHANGES)
        half = tl.dot(tl.load(forward + (r * SIDE + c)), low, input_precision="ieee")
        both = tl.dot(half, tl.load(forward + (c * SIDE + r)), input_precision="ieee")
        values = tl.reshape(both, (SIDE * SIDE,))
    else:
        begin = group * size
        length = tl.minimum(size, tl.load(row + 2) - begin).to(tl.int32)
        x, toward = x + begin, toward + begin
        if TRANSFORMS:
            # In these orders, both (chunks, 32), products with half of the basis give all coefficients.
            i = tl.arange(0, CHUNKS)[:, None] * _N + tl.arange(0, _HALF)[None, :]
            j = tl.arange(0, CHUNKS)[:, None] * _N + (_N - 1) - tl.arange(0, _HALF)[None, :]
            low = _gathered(x, toward, i, i < length, takes_in, decay, factor, CHANGES)
            high = _gathered(x, toward, j, j < length, takes_in, decay, factor, CHANGES)
            square = tl.arange(0, _HALF)[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
            even = tl.dot(low + high, tl.load(forward + square), input_precision="ieee")
            odd = tl.dot(low - high, tl.load(forward + _HALF * _HALF + square), input_precision="ieee")
            values = tl.reshape(tl.join(even, odd), (CHUNKS * _N,))
        else:
            i = tl.arange(0, CHUNKS * _N)
            low = _gathered(x, toward, i, i < length, takes_in, decay, factor, CHANGES)
            values = low

    k = tl.load(k_G + g).to(tl.int32)
    # As integers, infinity is above all numbers, and so is what is none.
    bits = tl.minimum(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _INFINITE)
    top = tl.max(bits)
    tl.store(top_G + g, top)
    chosen, rank = _largest(bits, _threshold(bits, top, k), k)
    scale = scale_of(tl.where(chosen, tl.abs(values), 0.0), chosen, k, FORMAT)
    code = code_of(values, scale, FORMAT)
    tl.store(scale_G + g, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16))
    entry = code << 16 | tl.arange(0, CHUNKS * _N)
    tl.store(entry_GK + g * k_most + rank, entry, mask=chosen & (rank < k_most))

    if CHANGES:
        good = top < _SENDABLE
        q = tl.where(chosen, value_of(code, scale, FORMAT), 0.0)
        if TRANSFORMS:
            up, down = powers(tl.max(tl.abs(q)))
            integers = (q * up + _ROUNDER) - _ROUNDER
            if SIDE > 0:
                sent = tile_of(tl.reshape(integers, (SIDE, SIDE)), inverse, tile_scale, down, SIDE)
                tl.store(x + i, low - (sent + 0.0) * alpha, mask=there & good)
            else:
                even, odd = tl.split(tl.reshape(integers, (CHUNKS, _HALF, 2)))
                same, other = halves(even, odd, inverse)
                same, other = same * down * _INVERSE_SCALE + 0.0, other * down * _INVERSE_SCALE + 0.0
                tl.store(x + i, low - same * alpha, mask=(i < length) & good)
                tl.store(x + j, high - other * alpha, mask=(j < length) & good)
        else:
            tl.store(x + i, low - (q + 0.0) * alpha, mask=(i < length) & good)


@triton.jit
def _gathered(
    x: tl.tensor, gradient: tl.tensor, i: tl.tensor, there: tl.tensor, takes_in: tl.tensor, decay: tl.tensor,
    factor: tl.tensor, CHANGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The momentum, with what has come to it."""
    value = tl.load(x + i, mask=there, other=0.0)
    if CHANGES:
        value = value * decay + tl.load(gradient + i, mask=there & takes_in, other=0.0) * factor
    return value


@triton.jit
def _largest(bits: tl.tensor, least: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Which the k largest are, of equal ones the first; and how many of them come before each."""
    above, equal = (bits > least).to(tl.int32), (bits == least).to(tl.int32)
    n_equal = k - tl.sum(above)
    pair = above | equal << 16  # both are counted at once
    before = tl.cumsum(pair) - pair
    above_before, equal_before = before & 0xFFFF, before >> 16
    chosen = (above == 1) | ((equal == 1) & (equal_before < n_equal))
    return chosen, above_before + tl.minimum(equal_before, n_equal)


@triton.jit
def _threshold(bits: tl.tensor, top: tl.tensor, k: tl.tensor) -> tl.tensor:
    """A value that k of them, or equal ones more, reach: of four parts of the range always the right one."""
    low, high = top * 0, top + 1  # k at least reach `low`, fewer `high`
    while high - low > 1:
        step = (high - low + 3) // 4
        a = low + step
        b = tl.minimum(a + step, high)
        c = tl.minimum(b + step, high)
        reach_a, reach_b, reach_c = (
            (bits >= a).to(tl.int64),
            (bits >= b).to(tl.int64),
            (bits >= c).to(tl.int64),
        )
        counts = tl.sum(reach_a | reach_b << 20 | reach_c << 40)  # all three at once
        n_a, n_b = (counts & 0xFFFFF).to(tl.int32), ((counts >> 20) & 0xFFFFF).to(tl.int32)
        n_c = (counts >> 40).to(tl.int32)
        high = tl.where(n_a < k, a, tl.where(n_b < k, b, tl.where(n_c < k, c, high)))
        low = tl.where(n_c >= k, c, tl.where(n_b >= k, b, tl.where(n_a >= k, a, low)))
        is_exact = (n_a == k) | (n_b == k) | (n_c == k)  # then `low` is what they reach
        high = tl.where(is_exact, low + 1, high)
    return low


# ------------------------------------------------------------------------------------------- codes


@dataclass(frozen=True, slots=True)
class _Codes:
    """Parameter p has its codes in `octets` from byte_P[p] on, and with Rice codes n_unary_P[p] bits of the
    second part from unary_P[p] on."""

    octets: Tensor
    byte_P: Any
    unary_P: Any
    n_unary_P: Tensor


def _codes(layout: SparseLayout, ranges: DeviceRanges, entry_GK: Tensor, n_sent_G: Tensor) -> _Codes:
    indices, device, entry_P = layout.indices, entry_GK.device, ranges.entry_P
    rice = indices if isinstance(indices, RiceIndices) else None
    n_fixed_P = np.array([n_bytes(int(k), indices.width) for k in np.diff(entry_P)], dtype=np.int64)
    n_unary_P = np.array(
        [rice.max_unary(each.most) if rice else 0 for each in ranges.host.layouts], dtype=np.int64
    )
    byte_P = n_fixed_P.cumsum() - n_fixed_P
    unary_P = n_fixed_P.sum() + n_unary_P.cumsum() - n_unary_P
    octets = torch.empty(int(n_fixed_P.sum() + n_unary_P.sum()), dtype=torch.uint8, device=device)
    end_G1 = pad(n_sent_G.cumsum(0), (1, 0))
    count_P = end_G1[ranges.first].diff()
    code_E = torch.empty(int(entry_P[-1]), dtype=torch.int32, device=device)
    run_E = torch.zeros(code_E.numel() if rice else 0, dtype=torch.int32, device=device)
    mark_B = torch.zeros(8 * int(n_unary_P.sum()), dtype=torch.uint8, device=device)
    columns = ranges.host.first_P[:-1], entry_P[:-1], 8 * (n_unary_P.cumsum() - n_unary_P)
    given = table(np.stack(columns, axis=1), device), owners(np.diff(ranges.host.first_P), device), end_G1
    how = {"ENTRIES": max(16, triton.next_power_of_2(layout.k))}
    n_groups = ranges.n_groups
    with on_device(octets):
        if n_groups:
            bits = {"INDEX_BITS": layout.index_bits, "REMAINDER": rice.remainder_bits if rice else -1}
            _gather[(n_groups,)](*given, entry_GK, code_E, run_E, layout.k, **bits, **how, **EXACT)
        pack_rows(code_E, count_P, entry_P[:-1], byte_P, n_fixed_P, indices.width, octets)
        bits_P = torch.zeros_like(count_P)
        if rice and n_groups:
            after = pad(run_E.cumsum(0), (1, 0))
            begin_P = ranges.entry[:-1]
            bits_P = after[begin_P + count_P] - after[begin_P]
            _mark[(n_groups,)](*given, after, mark_B, **how, **EXACT)
            pack_rows(mark_B, bits_P, 8 * (unary_P - n_fixed_P.sum()), unary_P, n_unary_P, 1, octets)
    return _Codes(octets, byte_P, unary_P, bits_P)


@triton.jit
def _place(rows: tl.tensor, owner: tl.tensor, end_G1: tl.tensor, g: tl.tensor) -> tl.tensor:
    """Of a group: where its entries go, how many they are, the row of its parameter. Columns: first group,
    first entry, first bit of the second part."""
    row = rows + 3 * tl.load(owner + g).to(tl.int64)
    begin = tl.load(end_G1 + g)
    to = tl.load(row + 1) + begin - tl.load(end_G1 + tl.load(row))
    return to, tl.load(end_G1 + g + 1) - begin, row


@triton.jit
def _gather(
    rows: tl.tensor, owner: tl.tensor, end_G1: tl.tensor, entry_GK: tl.tensor, code_E: tl.tensor,
    run_E: tl.tensor, k: tl.tensor, INDEX_BITS: tl.constexpr, REMAINDER: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """The codes of a group's entries, next to those of the group before. `REMAINDER`: -1 for packed ones."""
    g = tl.program_id(0).to(tl.int64)
    to, n, _ = _place(rows, owner, end_G1, g)
    e = tl.arange(0, ENTRIES)
    entry = tl.load(entry_GK + g * k + e, mask=e < n, other=0)
    index, value = entry & 0xFFFF, (entry >> 16) & 0xFFFF
    if REMAINDER < 0:
        tl.store(code_E + to + e, value << INDEX_BITS | index, mask=e < n)
    else:
        previous = tl.load(entry_GK + g * k + e - 1, mask=(e > 0) & (e < n), other=0) & 0xFFFF
        gap = index - tl.where(e > 0, previous + 1, 0)
        tl.store(code_E + to + e, value << REMAINDER | gap & ((1 << REMAINDER) - 1), mask=e < n)
        tl.store(run_E + to + e, (gap >> REMAINDER) + 1, mask=e < n)


@triton.jit
def _mark(
    rows: tl.tensor, owner: tl.tensor, end_G1: tl.tensor, after: tl.tensor, mark_B: tl.tensor,
    ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """A one after the zeros of each entry. `after`: where the runs of all entries up to one end."""
    g = tl.program_id(0).to(tl.int64)
    to, n, row = _place(rows, owner, end_G1, g)
    e = tl.arange(0, ENTRIES)
    bit = tl.load(after + to + e + 1, mask=e < n, other=0) - tl.load(after + tl.load(row + 1)) - 1
    tl.store(mark_B + tl.load(row + 2) + bit, tl.full((ENTRIES,), 1, tl.uint8), mask=e < n)
