"""Codes of many packs on their way into kernels, and Rice codes as plain ones, by Triton kernels.

Rice codes have no fixed places: where the ones of their second part stand is found by counting those of every
byte and adding up the counts. From there on each group reads its own entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..base import Packed
from ..codecs.sparse_layout import GroupRanges, SparseLayout, group_ranges
from ..numerics.index_layout import RiceIndices
from .bits_triton import bits_at
from .tables_triton import EXACT, on_device, owners, table, upload

_BLOCK: Final = tl.constexpr(1024)
_MOST_AT_ONCE: Final = 1024  # entries


@dataclass(frozen=True, slots=True)
class DeviceRanges:
    """`GroupRanges` of P parameters, and some of it on the device too."""

    host: GroupRanges
    first: Tensor  # int64 (P + 1,): groups before each parameter
    k_G: Tensor  # int64: how many each group sends at most
    entry_P: Any  # int64 (P + 1,), on the host: where a parameter's entries begin, if all groups send k_G
    entry: Tensor  # the same, on the device

    @property
    def n_groups(self) -> int:
        return len(self.host.k_G)


@lru_cache(maxsize=64)
def ranges_on(
    layout: SparseLayout, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> DeviceRanges:
    """What launches over parameters of these shapes need, kept from step to step."""
    host = group_ranges(layout, shapes)
    entry_P = np.concatenate([[0], host.k_G.cumsum()])[host.first_P]
    first, every_k, entry = (upload(torch.from_numpy(a), device) for a in (host.first_P, host.k_G, entry_P))
    return DeviceRanges(host, first, every_k, entry_P, entry)


@dataclass(frozen=True, slots=True)
class Codes:
    """Of W packs of P parameters each, on the device: the codes of pack w for parameter p begin with this bit
    and have `width` bits each. Group g of pack w has those from end_WG1[w, g] to end_WG1[w, g + 1], counted
    over all parameters."""

    octets: Tensor  # uint8
    bit_WP: Tensor  # int64
    scale_WG: Tensor  # int16: bits of bfloat16
    end_WG1: Tensor  # int64
    width: int


def uploaded(
    layout: SparseLayout, packs_P: Sequence[Sequence[Packed]], ranges: DeviceRanges, device: torch.device
) -> Codes:
    """`packs_P[p]`: those of parameter p, W of them. The bytes travel as they are; the host does not wait."""
    by_pack = [packed for packs_W in zip(*packs_P, strict=True) for packed in packs_W]
    shape = len(packs_P[0]), len(packs_P)
    byte_WP = np.cumsum([0, *(codes.numel() for _, codes in by_pack)])
    octets = upload(torch.cat([codes for _, codes in by_pack]), device)
    scale_WG = upload(torch.cat([scales.view(torch.int16) for scales, _ in by_pack]), device)
    scale_WG = scale_WG.view(shape[0], -1)
    end_WG1 = pad((ranges.k_G * (scale_WG != 0)).cumsum(1), (1, 0))
    bit_WP = table(8 * byte_WP[:-1].reshape(shape), device)
    codes = Codes(octets, bit_WP, scale_WG, end_WG1, layout.indices.width)
    if isinstance(layout.indices, RiceIndices):
        return _plain(codes, layout.indices, layout, byte_WP, ranges)
    return codes


def _plain(
    codes: Codes, rice: RiceIndices, layout: SparseLayout, byte_WP: Any, ranges: DeviceRanges
) -> Codes:
    """Codes of 32 bits with whole indices: value << index bits | index."""
    device, (n_packs, n_params) = codes.octets.device, codes.bit_WP.shape
    n_groups = ranges.n_groups
    count_WP = codes.end_WG1[:, ranges.first].diff(dim=1)
    unary_WP = (codes.bit_WP + count_WP * rice.width + 7) // 8  # the first byte of the second part
    n_blocks = -(-np.diff(byte_WP) // _BLOCK.value)
    # Of every stream its first byte, how many it has, its first program, and where its entries go.
    entry_WP = np.arange(n_packs)[:, None] * ranges.entry_P[-1] + ranges.entry_P[:-1]
    columns = byte_WP[:-1], np.diff(byte_WP), n_blocks.cumsum() - n_blocks, entry_WP.reshape(-1)
    streams = table(np.stack(columns, axis=1), device)
    whose = owners(n_blocks, device)
    ones = torch.empty(codes.octets.numel(), dtype=torch.int32, device=device)
    ends = torch.zeros(n_packs * int(ranges.entry_P[-1]), dtype=torch.int64, device=device)
    plain = torch.zeros(ends.numel(), dtype=torch.int32, device=device)
    with on_device(ones):
        if n_blocks.sum():
            grid = (int(n_blocks.sum()),)
            _count[grid](codes.octets, unary_WP, streams, whose, ones, **EXACT)
            after = pad(ones.cumsum(0), (1, 0))
            _find[grid](codes.octets, unary_WP, streams, whose, after, count_WP, ends, **EXACT)
            _join[(n_groups, n_packs)](
                codes.octets,
                codes.bit_WP,
                codes.end_WG1,
                ranges.first,
                owners(np.diff(ranges.host.first_P), device),
                streams,
                ends,
                plain,
                n_groups,
                n_params,
                size=codes.octets.numel(),
                WIDTH=rice.width,
                REMAINDER=rice.remainder_bits,
                INDEX_BITS=layout.index_bits,
                ENTRIES=min(_MOST_AT_ONCE, max(16, triton.next_power_of_2(layout.k))),
                **EXACT,
            )
    bit_WP = table(32 * entry_WP, device)
    return replace(codes, octets=plain.view(torch.uint8), bit_WP=bit_WP, width=32)


@triton.jit
def _count(
    octets: tl.tensor, unary: tl.tensor, streams: tl.tensor, whose: tl.tensor, ones: tl.tensor
) -> None:
    """How many ones every byte of a second part has; 0 for the others."""
    stream = tl.load(whose + tl.program_id(0)).to(tl.int64)
    byte, inside = _bytes(streams + 4 * stream)
    octet = tl.load(octets + byte, mask=inside, other=0).to(tl.int32)
    octet = (octet & 0x55) + ((octet >> 1) & 0x55)
    octet = (octet & 0x33) + ((octet >> 2) & 0x33)
    count = (octet & 0x0F) + (octet >> 4)
    tl.store(ones + byte, tl.where(byte >= tl.load(unary + stream), count, 0), mask=inside)


@triton.jit
def _bytes(stream: tl.tensor) -> tl.tensor:
    """Those of this program."""
    i = (tl.program_id(0) - tl.load(stream + 2)) * _BLOCK + tl.arange(0, _BLOCK)
    return tl.load(stream) + i, i < tl.load(stream + 1)


@triton.jit
def _find(
    octets: tl.tensor, unary: tl.tensor, streams: tl.tensor, whose: tl.tensor, after: tl.tensor,
    counts: tl.tensor, ends: tl.tensor,
) -> None:  # fmt: skip
    """Where the ones stand: bits of the second part."""
    stream = tl.load(whose + tl.program_id(0)).to(tl.int64)
    byte, inside = _bytes(streams + 4 * stream)
    begin, count = tl.load(unary + stream), tl.load(counts + stream)
    octet = tl.load(octets + byte, mask=inside & (byte >= begin), other=0).to(tl.int32)
    number = tl.load(after + byte, mask=inside, other=0) - tl.load(after + tl.load(streams + 4 * stream))
    to = ends + tl.load(streams + 4 * stream + 3)
    for bit in tl.static_range(8):
        is_one = (octet >> bit) & 1
        tl.store(to + number, 8 * (byte - begin) + bit, mask=(is_one == 1) & (number < count))
        number += is_one


@triton.jit
def _join(
    octets: tl.tensor, bit_WP: tl.tensor, end_WG1: tl.tensor, first: tl.tensor, owner: tl.tensor,
    streams: tl.tensor, ends: tl.tensor, plain: tl.tensor, n_groups: tl.tensor, n_params: tl.tensor,
    size: tl.tensor, WIDTH: tl.constexpr, REMAINDER: tl.constexpr, INDEX_BITS: tl.constexpr,
    ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """The entries of a group: an index is the sum of the gaps before it."""
    g, w = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p = tl.load(owner + g)
    stream = w * n_params + p
    offsets = end_WG1 + w * (n_groups + 1)
    before = tl.load(offsets + g) - tl.load(offsets + tl.load(first + p))  # entries of groups before this one
    n = tl.load(offsets + g + 1) - tl.load(offsets + g)
    at = tl.load(streams + 4 * stream + 3) + before
    previous = tl.load(ends + at - 1, mask=(before > 0) & (n > 0), other=-1)
    lows = at * 0
    for begin in range(0, n, ENTRIES):
        e = begin + tl.arange(0, ENTRIES)
        bit = tl.load(bit_WP + stream) + (before + e) * WIDTH
        code = bits_at(octets, bit, e < n, size, WIDTH)
        low = code & ((1 << REMAINDER) - 1)
        end = tl.load(ends + at + e, mask=e < n, other=0)
        index = ((end - previous - (e + 1)) << REMAINDER) + tl.cumsum(low) + lows + e
        lows += tl.sum(low)
        index = index & ((1 << INDEX_BITS) - 1)  # what was checked has no more
        tl.store(plain + at + e, (((code >> REMAINDER) << INDEX_BITS) | index).to(tl.int32), mask=e < n)
