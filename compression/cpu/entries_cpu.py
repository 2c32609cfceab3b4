"""The numba kernels that read sparse packs: packed indices and Rice codes, with values from a table.

The codes of all entries are one row of bits. With Rice codes a second row follows, of zeros and ones: a one
ends the gap of each entry, and is found as in `indices_cpu`. One pass over both gives positions and values.

Checking is the same pass without writing anything, over all parameters of a payload in one call: true for
exactly those packs that `sparse_codec.check_pack` lets through. What is wrong with others is for that to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numba
import numpy as np
import torch

from ..base import Packed, Part, Payload
from ..codecs.sparse_layout import SparseLayout, group_ranges, shapes_of
from ..compiled import compiled
from ..errors import BadPayload
from ..numerics.index_layout import FILLED_UP, RiceIndices
from ..numerics.value_formats import SCALE_LIMIT_BITS, Table
from ..rows import places
from .addresses_cpu import bytes_at
from .indices_cpu import DE_BRUIJN, PLACE

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_0, _1, _58 = np.uint64(0), np.uint64(1), np.uint64(58)
_16: Final = np.uint32(16)
_LIMIT: Final = np.uint16(SCALE_LIMIT_BITS)
_FILLED_UP: Final = FILLED_UP
_WRONG: Final = -2


def takes(layout: SparseLayout) -> bool:
    """Whether these kernels read what is packed like that."""
    return isinstance(layout.format, Table)


def form_of(layout: SparseLayout) -> tuple[bool, int, int, Array, int]:
    """How kernels are told of the codes: whether there are Rice codes, the bits below a value, all bits of a
    code, what values say, and the coefficients of a full group."""
    assert isinstance(layout.format, Table)
    rice = isinstance(layout.indices, RiceIndices)
    low_bits = layout.indices.remainder_bits if isinstance(layout.indices, RiceIndices) else layout.index_bits
    return rice, low_bits, layout.indices.width, layout.format.levels, layout.n_coefficients


def read(layout: SparseLayout, packs: Sequence[Packed], shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Positions, values and offsets of several packs of a parameter, as `Mean` has them. Raises BadPayload
    for those that are too short: nothing else is checked here."""
    k_G = layout.of(shape).most.k_G
    n_most = int(k_G.sum())
    position_E = np.empty(len(packs) * n_most, dtype=np.int64)
    value_E = np.empty(len(packs) * n_most, dtype=np.float32)
    offset_WG = np.empty((len(packs), k_G.size + 1), dtype=np.int64)
    form, at = form_of(layout), 0
    for (scales, codes), offset_G in zip(packs, offset_WG, strict=True):
        if scales.numel() != k_G.size:
            raise BadPayload("shape", f"{scales.numel()} scales for {k_G.size} groups")
        bits_G = scales.view(torch.int16).numpy().view(np.uint16)
        at = read_entries(codes.numpy(), bits_G, k_G, *form, at, position_E, value_E, offset_G)
        if at < 0:
            raise BadPayload("shape", f"{codes.numel()} bytes are too few")
    return position_E, value_E, offset_WG


@compiled
def read_entries(
    octets: Array, scale_bits_G: Array, k_G: Array, rice: bool, low_bits: int, width: int, levels: Array,
    n_coefficients: int, e: int, position_E: Array, value_E: Array, offset_G: Array,
) -> Any:  # fmt: skip
    """Writes from entry e on; returns which is the next, or -1 if there are too few bytes."""
    low_mask, mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << width) - 1)
    up, down = np.uint64(width), np.uint64(low_bits)
    n_fixed = octets.size
    if rice:
        n_fixed = (_n_sent(scale_bits_G, k_G) * width + 7) >> 3
        if n_fixed > octets.size:
            return -1
    scale = np.empty(1, np.float32)
    held, n_held, at = _0, 0, 0
    ones, first_bit, next_byte, before = _0, 0, n_fixed, -1  # of the zeros and ones: what is left of 64
    for g in range(k_G.size):
        offset_G[g] = e
        if scale_bits_G[g] == 0:
            continue
        scale.view(np.uint32)[0] = np.uint32(scale_bits_G[g]) << _16
        index: Word = -1
        for _ in range(k_G[g]):
            while n_held < width:
                if at == n_fixed:
                    return -1
                held |= np.uint64(octets[at]) << np.uint64(n_held)
                n_held += 8
                at += 1
            low: Word = np.int64(held & low_mask)
            value_E[e] = levels[np.int64((held & mask) >> down)] * scale[0]
            held >>= up
            n_held -= width
            if rice:
                while ones == _0:
                    if next_byte >= octets.size:
                        return -1
                    first_bit = 8 * (next_byte - n_fixed)
                    ones = _word(octets, next_byte)
                    next_byte += 8
                lowest = ones & (~ones + _1)
                end = first_bit + PLACE[(lowest * DE_BRUIJN) >> _58]
                ones ^= lowest
                index += (end - before - 1 << low_bits | low) + 1
                before = end
            else:
                index = low
            position_E[e] = g * n_coefficients + index
            e += 1
    offset_G[k_G.size] = e
    return e


@numba.njit(inline="always")
def _n_sent(scale_bits_G: Array, k_G: Array) -> int:
    n = 0
    for g in range(k_G.size):
        n += k_G[g] if scale_bits_G[g] != 0 else 0
    return n


@numba.njit(inline="always")
def _word(octets: Array, at: int) -> Word:
    """The next 8 bytes, low ones first; zeros after the last one."""
    word = _0
    for i in range(min(8, octets.size - at)):
        word |= np.uint64(octets[at + i]) << np.uint64(8 * i)
    return word


# ------------------------------------------------------------------------------------------- check: exact


PACK: Final = [torch.bfloat16, torch.uint8]
"""Of scales and codes."""


def all_good(layout: SparseLayout, payload: Payload, parts: Mapping[str, Part]) -> bool:
    """Whether `check_pack` lets all of these parameters through."""
    ranges = group_ranges(layout, shapes_of(parts))
    found = places(payload, list(parts), PACK)
    if found is None or (found.count_PK[:, 0] != np.diff(ranges.first_P)).any():
        return False
    return bool(
        _all_good(
            found.address_PK,
            found.count_PK,
            ranges.first_P,
            ranges.k_G,
            ranges.n_G,
            ranges.unary_P,
            *form_of(layout)[:4],
        )
    )


@numba.njit(inline="always")
def read_scales(address: Any, bits_G: Array) -> Array:
    """Their bits, from where they are."""
    octets = bytes_at(address, 2 * bits_G.size)
    for g in range(bits_G.size):
        bits_G[g] = np.uint16(octets[2 * g]) | np.uint16(octets[2 * g + 1]) << np.uint16(8)
    return bits_G


@compiled
def _all_good(
    address_PK: Array, count_PK: Array, first_P: Array, k_G: Array, n_G: Array, unary_P: Array,
    rice: bool, low_bits: int, width: int, levels: Array,
) -> bool:  # fmt: skip
    n_most, g_most = 0, 0
    for p in range(len(count_PK)):
        n_most = max(n_most, n_in(k_G[first_P[p] : first_P[p + 1]]))
        g_most = max(g_most, first_P[p + 1] - first_P[p])
    index_E, value_E = np.empty(n_most, np.int64), np.empty(n_most, np.float32)
    bits_G, offset_G = np.empty(g_most, np.uint16), np.empty(g_most + 1, np.int64)
    for p in range(len(count_PK)):
        a, b = first_P[p], first_P[p + 1]
        scale_bits_G = read_scales(address_PK[p, 0], bits_G[: b - a])
        octets = bytes_at(address_PK[p, 1], count_PK[p, 1])
        n = _n_sent(scale_bits_G, k_G[a:b])
        if not _is_long_enough(octets, n, unary_P[p], rice, width) or not _are_scales(scale_bits_G):
            return False
        # With 0 coefficients of a group, positions are indices.
        here = offset_G[: b - a + 1]
        form = rice, low_bits, width, levels, 0
        if read_entries(octets, scale_bits_G, k_G[a:b], *form, 0, index_E, value_E, here) < 0:
            return False
        end = _last_one(index_E, value_E, here, n_G[a:b], low_bits)
        if end == _WRONG or (rice and not _ends_there(octets, (n * width + 7) >> 3, end, unary_P[p])):
            return False
    return True


@numba.njit(inline="always")
def n_in(k_G: Array) -> int:
    """Their sum: the library's own loads linear algebra, 25 MB of it."""
    n = 0
    for k in k_G:
        n += k
    return n


@numba.njit(inline="always")
def _is_long_enough(octets: Array, n: int, n_most: int, rice: bool, width: int) -> bool:
    """As long as n codes are, or with zeros and ones, of which there may be `n_most` bytes; no bit behind the
    codes is set."""
    n_bits = n * width
    n_fixed = (n_bits + 7) >> 3
    n_unary = octets.size - n_fixed
    if n_unary < 0 or n_unary > (n_most if rice else 0):
        return False
    return n_bits & 7 == 0 or octets[n_fixed - 1] >> (n_bits & 7) == 0


@numba.njit(inline="always")
def _are_scales(bits_G: Array) -> bool:
    good = True
    for g in range(bits_G.size):
        good &= bits_G[g] < _LIMIT  # the sign bit is above all exponents
    return good


@numba.njit(inline="always")
def _last_one(index_E: Array, value_E: Array, offset_G: Array, n_G: Array, low_bits: int) -> int:
    """Where the one stands that ends the last gap; `_WRONG` for indices that do not rise or are past the end,
    and for codes without a value."""
    end = -1
    for g in range(n_G.size):
        before = -1
        for e in range(offset_G[g], offset_G[g + 1]):
            index = index_E[e]
            if index <= before or index >= n_G[g] or np.isnan(value_E[e]):
                return _WRONG
            end += (index - before - 1 >> low_bits) + 1
            before = index
    return end


@numba.njit(inline="always")
def _ends_there(octets: Array, n_fixed: int, end: int, n_most: int) -> bool:
    """No one after the last, and no byte, unless they are filled up."""
    n_unary = n_most if end >= 0 and n_most <= _FILLED_UP else (end >> 3) + 1
    if octets.size - n_fixed != n_unary:
        return False
    left = 0
    for i in range(n_fixed + (end + 1 >> 3), octets.size):
        left |= octets[i] >> (end + 1 & 7 if i == n_fixed + (end + 1 >> 3) else 0)
    return left == 0
