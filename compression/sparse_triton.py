"""The Triton kernel of `descent` for flat groups: decoded values meet the target in one pass over it.

A program takes one group after another. It adds up the group's coefficients in a row of scratch memory, peer
by peer, brings them to integers, multiplies them by the integer basis and takes the step; then it clears what
it has written to. The rows of all programs fit into the GPU's cache, and a launch moves the target once and
every peer's entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from thinwire.compression import dct
from thinwire.compression.base import Packed, Part
from thinwire.compression.noise_triton import EXACT, on_device
from thinwire.compression.reduce import mean_weights

if TYPE_CHECKING:
    from thinwire.compression.descent import Step
    from thinwire.compression.sparse import Sparse

_PROGRAMS_PER_PROCESSOR: Final = 4
_N: Final = tl.constexpr(dct.N)
_TOP_BIT: Final = tl.constexpr(dct.TOP_BIT)
_SMALLEST: Final = tl.constexpr(dct.SMALLEST)
_ROUNDER: Final = tl.constexpr(dct.ROUNDER)
_INVERSE_SCALE: Final = tl.constexpr(dct.INVERSE_SCALE)


def descend(
    compressor: Sparse,
    target: Tensor,
    packs: Sequence[Packed],
    weights: Sequence[float],
    part: Part,
    step: Step,
) -> None:
    """As `descent.descend`. `target`: contiguous flat float32; the groups are `Flat`."""
    rounded, inverse = mean_weights(weights)
    if not target.numel():
        return
    size, device = compressor.group_size, target.device
    first, last = part.start // size, -(-part.stop // size)
    position_E, value_E, offset_WG = _entries(compressor, packs, part, first, last)
    n_programs = min(last - first, _PROGRAMS_PER_PROCESSOR * _n_processors(device))
    with on_device(target):
        _descend[(n_programs,)](
            target.detach(),
            torch.zeros(n_programs * compressor.n_coefficients, dtype=torch.float32, device=device),
            *(position_E.to(device), value_E.to(device), offset_WG.to(device)),
            torch.tensor(rounded, dtype=torch.float32).to(device),
            dct.integer_basis(device),
            *(len(packs), inverse, step.decay, step.scale, part.start, part.stop, first, last),
            *(prod(part.shape), size, compressor.n_coefficients),
            TRANSFORMS=compressor.transforms,
            SIGN=step.sign,
            CHUNKS=min(64, max(16, triton.next_power_of_2(-(-size // dct.N)))),
            ENTRIES=min(256, max(16, triton.next_power_of_2(compressor.k))),
            num_warps=8,
            **EXACT,
        )


def _entries(
    compressor: Sparse, packs: Sequence[Packed], part: Part, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the groups [first, last): positions and values of the entries, pack after pack. Group g of pack w
    has the entries [offset[w, g - first], offset[w, g - first + 1])."""
    positions, values, offsets, before = [], [], [], 0
    for packed in packs:
        entries = compressor.entries(packed, Part.whole(part.shape))
        begin, end = int(entries.offsets[first]), int(entries.offsets[last])
        positions.append(entries.position_E[begin:end])
        values.append(entries.value_E[begin:end])
        offsets.append(entries.offsets[first : last + 1] + (before - begin))
        before += end - begin
    rows = np.concatenate(positions), np.concatenate(values), np.stack(offsets)
    position_E, value_E, offset_WG = map(torch.from_numpy, rows)
    return position_E, value_E, offset_WG


@lru_cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["n_peers", "start", "stop", "first", "last"])
def _descend(
    y: tl.tensor, scratch: tl.tensor, position_E: tl.tensor, value_E: tl.tensor, offset_WG: tl.tensor,
    weight_W: tl.tensor, basis: tl.tensor, n_peers: tl.tensor, inverse: tl.tensor, decay: tl.tensor,
    scale: tl.tensor, start: tl.tensor, stop: tl.tensor, first: tl.tensor, last: tl.tensor, n: tl.tensor,
    size: tl.tensor, n_coefficients: tl.tensor, TRANSFORMS: tl.constexpr, SIGN: tl.constexpr,
    CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """`y` holds the elements [start, stop) of n; they lie in the groups [first, last)."""
    program = tl.program_id(0)
    sums = scratch + program.to(tl.int64) * n_coefficients
    row, column = tl.arange(0, CHUNKS)[:, None], tl.arange(0, _N)[None, :]
    square = tl.load(basis + tl.arange(0, _N)[:, None] * _N + column)
    entry = tl.arange(0, ENTRIES)
    n_groups = last - first
    for g in range(first + program, last, tl.num_programs(0)):
        group = tl.zeros((), tl.int64) + g
        here = group * n_coefficients
        offsets = offset_WG + (g - first)
        length = tl.minimum(size, n - group * size)
        for w in range(n_peers):
            weight = tl.load(weight_W + w)
            begin, end = _range(offsets, w, n_groups)
            for e in range(begin, end, ENTRIES):
                i = tl.load(position_E + e + entry, mask=e + entry < end, other=here) - here
                value = tl.load(value_E + e + entry, mask=e + entry < end)
                total = tl.load(sums + i, mask=e + entry < end) + value * weight
                tl.debug_barrier()  # few entries are read by several threads each, and written by one
                tl.store(sums + i, total, mask=e + entry < end)
            tl.debug_barrier()  # the next peer may have the same coefficients
        up = inverse * 0
        down = up
        if TRANSFORMS:
            largest = _largest(
                sums, position_E, offsets, here, inverse, n_peers, last - first, entry, ENTRIES
            )
            exponent = largest.to(tl.int32, bitcast=True) >> 23  # biased, from the bits: log2 is inexact
            up = _power_of_two(254 + _TOP_BIT - exponent, exponent)
            down = _power_of_two(exponent - _TOP_BIT, exponent)
        for chunk in range(0, tl.cdiv(length, _N), CHUNKS):
            i = (chunk + row) * _N + column
            mean = tl.load(sums + i, mask=i < n_coefficients, other=0.0) * inverse
            x = mean
            if TRANSFORMS:
                integers = (mean * up + _ROUNDER) - _ROUNDER
                x = tl.dot(integers, square, input_precision="ieee") * down * _INVERSE_SCALE
            x = x + 0.0  # makes 0 of -0
            if SIGN:
                x = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
            at = group * size + i
            inside = (i < length) & (at >= start) & (at < stop)
            before = tl.load(y + (at - start), mask=inside)
            tl.store(y + (at - start), before * decay - x * scale, mask=inside)
        tl.debug_barrier()
        for w in range(n_peers):
            begin, end = _range(offsets, w, n_groups)
            for e in range(begin, end, ENTRIES):
                i = tl.load(position_E + e + entry, mask=e + entry < end, other=here) - here
                tl.store(sums + i, tl.zeros((ENTRIES,), tl.float32), mask=e + entry < end)
        tl.debug_barrier()


@triton.jit
def _range(offsets: tl.tensor, peer: tl.tensor, n_groups: tl.tensor) -> tl.tensor:
    """Which entries a group has from that peer."""
    at = offsets + peer * (n_groups + 1)
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _largest(
    sums: tl.tensor, position_E: tl.tensor, offsets: tl.tensor, here: tl.tensor, inverse: tl.tensor,
    n_peers: tl.tensor, n_groups: tl.tensor, entry: tl.tensor, ENTRIES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Magnitude of the group's means."""
    largest = tl.zeros((ENTRIES,), tl.float32)
    for w in range(n_peers):
        begin, end = _range(offsets, w, n_groups)
        for e in range(begin, end, ENTRIES):
            i = tl.load(position_E + e + entry, mask=e + entry < end, other=here) - here
            mean = tl.load(sums + i, mask=e + entry < end, other=0.0) * inverse
            largest = tl.maximum(largest, tl.abs(mean))
    return tl.max(largest)


@triton.jit
def _power_of_two(biased: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """0 for groups that count as zero."""
    return tl.where(exponent >= _SMALLEST, biased << 23, 0).to(tl.float32, bitcast=True)
