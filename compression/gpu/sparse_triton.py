"""The Triton kernel of `Compressor.fused_update`: decoded values meet their targets in one pass over them,
all parameters in one launch.

A program takes one group after another. It adds up the group's coefficients in a row of scratch memory, peer
by peer, reading them out of the packed bytes; brings them to integers, multiplies them by the integer basis
and takes the step; then it clears what it has written to. The rows of all programs fit into the GPU's cache,
and a launch moves the targets once and every peer's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Payload, Senders, Target
from ..codecs.sparse_layout import SparseLayout
from ..codecs.tiles import Tiles
from ..exact import to_float32
from ..numerics import dct
from .bits_triton import bits_at
from .indices_triton import ranges_on, uploaded
from .tables_triton import (
    EXACT,
    floats,
    high_float,
    low_float,
    on_device,
    owners,
    pointer,
    refuse_other_rows,
    table,
    upload,
)
from .values_triton import number_of, value_of

_N: Final = tl.constexpr(dct.N)
_HALF: Final = tl.constexpr(dct.N // 2)
_TOP_BIT: Final = tl.constexpr(dct.TOP_BIT)
_SMALLEST: Final = tl.constexpr(dct.SMALLEST)
_ROUNDER: Final = tl.constexpr(dct.ROUNDER)
_INVERSE_SCALE: Final = tl.constexpr(dct.INVERSE_SCALE)


def fused_update(
    layout: SparseLayout,
    targets: Sequence[Target],
    payloads: Sequence[Payload],
    weights: list[float],
    inverse: float,
    senders: Senders | None = None,
) -> None:
    """As `Compressor.fused_update`, for targets of one device; the packs were checked.

    `weights` and `inverse`: of `mean_weights`. Raises ValueError for rows that are none, and for another
    number of packs than weights.
    """
    refuse_other_rows((t.x, t.part.n_local) for t in targets)
    if len(payloads) != len(weights):
        raise ValueError(f"{len(weights)} weights for another number of packs")
    alike: dict[tuple[int, bool], list[Target]] = {}
    for t in targets:
        if t.x.numel():
            groups = layout.groups(t.part.shape)
            side = groups.side if isinstance(groups, Tiles) else 0
            alike.setdefault((side, t.step.sign), []).append(t)
    for (side, sign), some in alike.items():
        with on_device(some[0].x):
            _launch(layout, some, payloads, weights, inverse, side, sign, senders)


def _launch(
    layout: SparseLayout,
    targets: Sequence[Target],
    payloads: Sequence[Payload],
    weights: list[float],
    inverse: float,
    side: int,
    sign: bool,
    senders: Senders | None,
) -> None:
    """`side`: of tiles; 0 for flat groups."""
    device, size = targets[0].x.device, layout.group_size
    ranges = ranges_on(layout, tuple(t.part.shape for t in targets), device)
    codes = uploaded(layout, [[payload[t.name] for payload in payloads] for t in targets], ranges, device)
    rows, n_items = _table(layout, targets, ranges.host.first_P)
    # As many as there is room for, which with tiles take twice the registers.
    n_programs = min(int(n_items.sum()), (2 if side else 4) * _n_processors(device))
    n_scratch = n_programs * layout.n_coefficients
    whole_W = weights if senders is None else [*senders.weights]
    _update[(n_programs,)](
        table(rows, device),
        owners(n_items, device),
        torch.zeros(n_scratch, dtype=torch.float32, device=device),
        torch.zeros(n_scratch if senders else 1, dtype=torch.float32, device=device),
        codes.octets,
        codes.bit_WP,
        codes.scale_WG,
        codes.end_WG1,
        ranges.first,
        upload(torch.tensor(weights, dtype=torch.float32), device),
        upload(torch.tensor(whole_W, dtype=torch.float32), device),
        tile_basis(device, side) if side else inverse_halves(device),
        len(weights),
        len(targets),
        ranges.n_groups,
        int(n_items.sum()),
        codes.octets.numel(),
        inverse if senders is None else 1.0,
        1.0 if senders is None else senders.least,
        to_float32(2.0 / (max(1, side) * 127.0 * 127.0)),
        size,
        layout.n_coefficients,
        FORMAT=number_of(layout.format),
        WIDTH=codes.width,
        INDEX_BITS=layout.index_bits,
        TRANSFORMS=layout.transforms,
        SIGN=sign,
        SENDERS=senders is not None,
        SIDE=side,
        CHUNKS=min(64, max(16, triton.next_power_of_2(-(-size // dct.N)))),
        ENTRIES=min(256, max(16, triton.next_power_of_2(layout.k))),
        num_warps=8,
        maxnreg=None if side else 64,
        **EXACT,
    )


def _table(layout: SparseLayout, targets: Sequence[Target], first_P: Any) -> tuple[Any, Any]:
    """Of every target: address, part, shape (as a matrix for tiles), factors, the first item of its work, the
    group that this is, of its own and of all. And how many items it has: the groups that overlap the part."""
    rows, at = [], 0
    for t, first in zip(targets, first_P.tolist(), strict=False):
        groups = layout.groups(t.part.shape)
        shape = (groups.rows, groups.columns) if isinstance(groups, Tiles) else (t.part.n_global, 1)
        tall, wide = layout.group_size, 1
        if isinstance(groups, Tiles):
            tall, wide = groups.side * groups.columns, groups.n_wide
        begin, end = t.part.start // tall * wide, -(-t.part.stop // tall) * wide
        factors = int(floats(np.array(t.step.decay), np.array(t.step.scale)))
        rows.append([t.x.data_ptr(), t.part.start, t.part.stop, *shape, factors, at, begin, first + begin])
        at += end - begin
    n_items = np.diff([*(row[6] for row in rows), at])
    return np.array(rows, dtype=np.int64), n_items


@lru_cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def inverse_halves(device: torch.device) -> Tensor:
    """float32 (2, 32, 32) of integers: [h, m, j] is element j of the basis vector 2 m + h. Its element 63 - j
    is the same, or for odd vectors the same with the other sign: half of the products are enough."""
    half = dct.integer_basis(device)[:, : dct.N // 2]
    return torch.stack([half[0::2], half[1::2]]).contiguous()


@cache
def tile_basis(device: torch.device, side: int) -> Tensor:
    """float32 (n, n): the integer basis; where products need more, filled up with zeros."""
    n = max(16, side)
    basis = torch.zeros(n, n, device=device)
    basis[:side, :side] = dct.integer_basis(device, side)
    return basis


@triton.jit(do_not_specialize=["n_peers", "n_params", "n_groups", "n_items", "n_octets"])
def _update(
    rows: tl.tensor, owner: tl.tensor, scratch: tl.tensor, wholes: tl.tensor, octets: tl.tensor,
    bit_WP: tl.tensor, scale_WG: tl.tensor, end_WG1: tl.tensor, first_P: tl.tensor, weight_W: tl.tensor,
    whole_W: tl.tensor, basis: tl.tensor, n_peers: tl.tensor, n_params: tl.tensor, n_groups: tl.tensor,
    n_items: tl.tensor, n_octets: tl.tensor, inverse: tl.tensor, least: tl.tensor, tile_scale: tl.tensor,
    size: tl.tensor, n_coefficients: tl.tensor, FORMAT: tl.constexpr, WIDTH: tl.constexpr,
    INDEX_BITS: tl.constexpr, TRANSFORMS: tl.constexpr, SIGN: tl.constexpr, SENDERS: tl.constexpr,
    SIDE: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Groups of all targets are items, one after another; `_table` has the columns of `rows`."""
    program = tl.program_id(0)
    sums = scratch + program.to(tl.int64) * n_coefficients
    sent = wholes + program.to(tl.int64) * n_coefficients if SENDERS else wholes
    entry = tl.arange(0, ENTRIES)
    for item in range(program, n_items, tl.num_programs(0)):
        p = tl.load(owner + item).to(tl.int64)
        row = rows + 9 * p
        y = pointer(tl.load(row), tl.float32)
        start, stop, n, columns = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        decay, scale = low_float(tl.load(row + 5)), high_float(tl.load(row + 5))
        group = item - tl.load(row + 6) + tl.load(row + 7)
        model_group = item - tl.load(row + 6) + tl.load(row + 8)
        first_group = tl.load(first_P + p)
        for w in range(n_peers):
            weight = tl.load(weight_W + w)
            bit, count, peer_scale = _stream(
                bit_WP, scale_WG, end_WG1, w, p, n_params, n_groups, model_group, first_group, WIDTH
            )
            for e in range(0, count, ENTRIES):
                here = e + entry < count
                code = bits_at(octets, bit + (e + entry) * WIDTH, here, n_octets, WIDTH)
                i = _index(code, n_coefficients, INDEX_BITS)
                value = value_of((code >> INDEX_BITS).to(tl.int32), peer_scale, FORMAT)
                total = tl.load(sums + i, mask=here) + value * weight
                whole = tl.load(sent + i, mask=here) + tl.load(whole_W + w) if SENDERS else total
                tl.debug_barrier()  # few entries are read by several threads each, and written by one
                tl.store(sums + i, total, mask=here)
                if SENDERS:
                    tl.store(sent + i, whole, mask=here)
            tl.debug_barrier()  # the next peer may have the same coefficients
        if SENDERS:
            _divide(
                sums, sent, least, octets, bit_WP, scale_WG, end_WG1, n_peers, p, n_params, n_groups,
                model_group, first_group, n_octets, n_coefficients, WIDTH, INDEX_BITS, ENTRIES,
            )  # fmt: skip
        if TRANSFORMS:
            largest = tl.zeros((ENTRIES,), tl.float32)
            for w in range(n_peers):
                bit, count, _ = _stream(
                    bit_WP, scale_WG, end_WG1, w, p, n_params, n_groups, model_group, first_group, WIDTH
                )
                for e in range(0, count, ENTRIES):
                    here = e + entry < count
                    code = bits_at(octets, bit + (e + entry) * WIDTH, here, n_octets, WIDTH)
                    i = _index(code, n_coefficients, INDEX_BITS)
                    mean = tl.load(sums + i, mask=here, other=0.0) * inverse
                    largest = tl.maximum(largest, tl.abs(mean))
            up, down = powers(tl.max(largest))
            if SIDE > 0:
                _tile(
                    y, sums, basis, inverse, up, down, tile_scale, group, n, columns, start, stop,
                    decay, scale, SIGN, SIDE,
                )  # fmt: skip
            else:
                _chunks(
                    y, sums, basis, inverse, up, down, group, n, size, start, stop, decay, scale, SIGN, CHUNKS
                )
        else:
            _elements(y, sums, inverse, group, n, size, start, stop, decay, scale, SIGN, CHUNKS)
        tl.debug_barrier()
        _clear(
            sums, octets, bit_WP, scale_WG, end_WG1, n_peers, p, n_params, n_groups, model_group, first_group,
            n_octets, n_coefficients, WIDTH, INDEX_BITS, ENTRIES,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _divide(
    sums: tl.tensor, sent: tl.tensor, least: tl.tensor, octets: tl.tensor, bit_WP: tl.tensor,
    scale_WG: tl.tensor, end_WG1: tl.tensor, n_peers: tl.tensor, p: tl.tensor, n_params: tl.tensor,
    n_groups: tl.tensor, group: tl.tensor, first_group: tl.tensor, n_octets: tl.tensor,
    n_coefficients: tl.tensor, WIDTH: tl.constexpr, INDEX_BITS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Sums become means over senders, and what those weigh zero again."""
    entry = tl.arange(0, ENTRIES)
    for w in range(n_peers):
        bit, count, _ = _stream(
            bit_WP, scale_WG, end_WG1, w, p, n_params, n_groups, group, first_group, WIDTH
        )
        for e in range(0, count, ENTRIES):
            here = e + entry < count
            code = bits_at(octets, bit + (e + entry) * WIDTH, here, n_octets, WIDTH)
            i = _index(code, n_coefficients, INDEX_BITS)
            whole = tl.load(sent + i, mask=here, other=0.0)
            mean = tl.div_rn(tl.load(sums + i, mask=here, other=0.0), tl.maximum(whole, least))
            tl.debug_barrier()  # as above
            tl.store(sums + i, mean, mask=here & (whole > 0))  # what several have is divided once
            tl.store(sent + i, tl.zeros((ENTRIES,), tl.float32), mask=here)
        tl.debug_barrier()


@triton.jit
def _clear(
    sums: tl.tensor, octets: tl.tensor, bit_WP: tl.tensor, scale_WG: tl.tensor, end_WG1: tl.tensor,
    n_peers: tl.tensor, p: tl.tensor, n_params: tl.tensor, n_groups: tl.tensor, group: tl.tensor,
    first_group: tl.tensor, n_octets: tl.tensor, n_coefficients: tl.tensor, WIDTH: tl.constexpr,
    INDEX_BITS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Where any peer has a coefficient."""
    entry = tl.arange(0, ENTRIES)
    for w in range(n_peers):
        bit, count, _ = _stream(
            bit_WP, scale_WG, end_WG1, w, p, n_params, n_groups, group, first_group, WIDTH
        )
        for e in range(0, count, ENTRIES):
            here = e + entry < count
            code = bits_at(octets, bit + (e + entry) * WIDTH, here, n_octets, WIDTH)
            i = _index(code, n_coefficients, INDEX_BITS)
            tl.store(sums + i, tl.zeros((ENTRIES,), tl.float32), mask=here)


@triton.jit
def _stream(
    bit_WP: tl.tensor, scale_WG: tl.tensor, end_WG1: tl.tensor, w: tl.tensor, p: tl.tensor,
    n_params: tl.tensor, n_groups: tl.tensor, group: tl.tensor, first_group: tl.tensor, WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of a group and a peer: the bit that its codes begin with, how many they are, their scale."""
    peer = tl.zeros((), tl.int64) + w
    ends = end_WG1 + peer * (n_groups + 1)
    begin = tl.load(ends + group)
    bit = tl.load(bit_WP + peer * n_params + p) + (begin - tl.load(ends + first_group)) * WIDTH
    bits = tl.load(scale_WG + peer * n_groups + group).to(tl.int32) << 16
    count = (tl.load(ends + group + 1) - begin).to(tl.int32)
    return bit, count, bits.to(tl.float32, bitcast=True)


@triton.jit
def _index(code: tl.tensor, n_coefficients: tl.tensor, INDEX_BITS: tl.constexpr) -> tl.tensor:
    """In its group; a pack that nobody checked shall not reach beyond it."""
    return tl.minimum((code & ((1 << INDEX_BITS) - 1)).to(tl.int32), n_coefficients - 1)


@triton.jit
def powers(largest: tl.tensor) -> tl.tensor:
    """The powers of two that bring coefficients to integers, and back; 0 for groups that count as zero."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23  # biased, from the bits: log2 is inexact
    up = tl.where(exponent >= _SMALLEST, (254 + _TOP_BIT - exponent) << 23, 0).to(tl.float32, bitcast=True)
    down = tl.where(exponent >= _SMALLEST, (exponent - _TOP_BIT) << 23, 0).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def halves(even: tl.tensor, odd: tl.tensor, basis: tl.tensor) -> tl.tensor:
    """From integer coefficients (chunks, 32) of even and odd number to the integer elements 0 to 31 of the
    chunks, and 63 to 32. Every sum is below 2^24: exact in any order."""
    square = tl.arange(0, _HALF)[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
    same = tl.dot(even, tl.load(basis + square), input_precision="ieee")
    other = tl.dot(odd, tl.load(basis + _HALF * _HALF + square), input_precision="ieee")
    return same + other, same - other


@triton.jit
def _chunks(
    y: tl.tensor, sums: tl.tensor, basis: tl.tensor, inverse: tl.tensor, up: tl.tensor, down: tl.tensor,
    group: tl.tensor, n: tl.tensor, size: tl.tensor, start: tl.tensor, stop: tl.tensor, decay: tl.tensor,
    scale: tl.tensor, SIGN: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    begin = group * size
    length = tl.minimum(size, n - begin).to(tl.int32)
    row, column = tl.arange(0, CHUNKS)[:, None], tl.arange(0, _HALF)[None, :]
    for chunk in range(0, tl.cdiv(length, _N), CHUNKS):
        c = (chunk + row) * _N
        even = tl.load(sums + (c + 2 * column), mask=c + 0 * column < length, other=0.0)
        odd = tl.load(sums + (c + 2 * column + 1), mask=c + 0 * column < length, other=0.0)
        even = (even * inverse * up + _ROUNDER) - _ROUNDER
        odd = (odd * inverse * up + _ROUNDER) - _ROUNDER
        low, high = halves(even, odd, basis)
        i = c + column
        inside = (i < length) & (begin + i >= start) & (begin + i < stop)
        _take(y + (begin - start + i), low * down * _INVERSE_SCALE, inside, decay, scale, SIGN)
        i = c + (_N - 1) - column
        inside = (i < length) & (begin + i >= start) & (begin + i < stop)
        _take(y + (begin - start + i), high * down * _INVERSE_SCALE, inside, decay, scale, SIGN)


@triton.jit
def _elements(
    y: tl.tensor, sums: tl.tensor, inverse: tl.tensor, group: tl.tensor, n: tl.tensor, size: tl.tensor,
    start: tl.tensor, stop: tl.tensor, decay: tl.tensor, scale: tl.tensor, SIGN: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    begin = group * size
    length = tl.minimum(size, n - begin).to(tl.int32)
    for first in range(0, length, CHUNKS * _N):
        i = first + tl.arange(0, CHUNKS * _N)
        mean = tl.load(sums + i, mask=i < length, other=0.0) * inverse
        inside = (i < length) & (begin + i >= start) & (begin + i < stop)
        _take(y + (begin - start + i), mean, inside, decay, scale, SIGN)


@triton.jit
def _tile(
    y: tl.tensor, sums: tl.tensor, basis: tl.tensor, inverse: tl.tensor, up: tl.tensor, down: tl.tensor,
    tile_scale: tl.tensor, group: tl.tensor, n_rows: tl.tensor, columns: tl.tensor, start: tl.tensor,
    stop: tl.tensor, decay: tl.tensor, scale: tl.tensor, SIGN: tl.constexpr, SIDE: tl.constexpr,
) -> None:  # fmt: skip
    SQUARE: tl.constexpr = 16 if SIDE < 16 else SIDE  # products need that many
    r, c = tl.arange(0, SQUARE)[:, None], tl.arange(0, SQUARE)[None, :]
    there = (r < SIDE) & (c < SIDE)
    integers = (tl.load(sums + (r * SIDE + c), mask=there, other=0.0) * inverse * up + _ROUNDER) - _ROUNDER
    x = tile_of(integers, basis, tile_scale, down, SQUARE)
    n_wide = tl.cdiv(columns, SIDE)
    i, j = group // n_wide * SIDE + r, group % n_wide * SIDE + c
    at = i * columns + j
    inside = there & (i < n_rows) & (j < columns) & (at >= start) & (at < stop)
    _take(y + (at - start), x, inside, decay, scale, SIGN)


@triton.jit
def tile_of(
    integers: tl.tensor, basis: tl.tensor, tile_scale: tl.tensor, down: tl.tensor, SQUARE: tl.constexpr
) -> tl.tensor:
    """The elements that integer coefficients (SQUARE, SQUARE) stand for. Every sum is below 2^24."""
    r, c = tl.arange(0, SQUARE)[:, None], tl.arange(0, SQUARE)[None, :]
    half = tl.dot(integers, tl.load(basis + (r * SQUARE + c)), input_precision="ieee")
    half_up, half_down = powers(tl.max(tl.abs(half)))
    half = (half * half_up + _ROUNDER) - _ROUNDER
    x = tl.dot(tl.load(basis + (c * SQUARE + r)), half, input_precision="ieee")
    return x * half_down * tile_scale * down  # in this order nothing overflows


@triton.jit
def _take(
    y: tl.tensor, x: tl.tensor, inside: tl.tensor, decay: tl.tensor, scale: tl.tensor, SIGN: tl.constexpr
) -> None:
    """The step: one rounding per operation."""
    x = x + 0.0  # makes 0 of -0
    if SIGN:
        x = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    before = tl.load(y, mask=inside)
    tl.store(y, before * decay - x * scale, mask=inside)
