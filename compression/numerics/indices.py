"""Selected coefficients to bytes and back: E entries in all, n_sent_G of them per group, rising indices.

numerics/index_layout.py says how they travel. Rice codes are read by finding all ones at once: the gap of
entry e begins after the (e - 1)-th one and ends with the e-th, and an index is the running sum of the gaps of
its group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BadPayload
from ..kernels import use_numba
from .bit_layout import n_bytes
from .bits import pack_bits, unpack_bits
from .index_layout import FILLED_UP, IndexLayout, Most, PackedIndices, RiceIndices

Array = npt.NDArray[Any]


def pack_indices(
    layout: IndexLayout, index_E: Tensor, value_E: Tensor, n_sent_G: Array, most: Most
) -> Tensor:
    """uint8. Indices and values int64 on the CPU."""
    if isinstance(layout, PackedIndices):
        return pack_bits(value_E << layout.index_bits | index_E, layout.width)
    return _pack_rice(layout, index_E, value_E, n_sent_G, most)


def unpack_indices(layout: IndexLayout, codes: Tensor, n_sent_G: Array, most: Most) -> tuple[Array, Array]:
    """Indices and values, int64. Raises BadPayload for what `pack_indices` never makes, but for indices that
    do not rise or are past the end."""
    if isinstance(layout, RiceIndices):
        return _unpack_rice(layout, codes, n_sent_G, most)
    n = int(n_sent_G.sum())
    if codes.numel() != n_bytes(n, layout.width):
        raise BadPayload("shape", f"{codes.numel()} bytes for {n} coefficients")
    return _split(unpack_exactly(codes, layout.width, n), layout.index_bits)


def _pack_rice(rice: RiceIndices, index_E: Tensor, value_E: Tensor, n_sent_G: Array, most: Most) -> Tensor:
    r = rice.remainder_bits
    if index_E.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    if use_numba(index_E):
        from ..cpu import indices_cpu

        code_E, ends_E = indices_cpu.to_gaps(index_E.numpy(), value_E.numpy(), n_sent_G, r)
        unary = indices_cpu.set_bits(ends_E, rice.unary_bytes(int(ends_E[-1]) + 1, most))
        return torch.cat([pack_bits(torch.from_numpy(code_E), rice.width), torch.from_numpy(unary)])
    gap_E = _gaps(index_E.numpy(), n_sent_G)
    low_E = torch.from_numpy(gap_E & ((1 << r) - 1))
    ends_E = np.cumsum((gap_E >> r) + 1) - 1
    bits = np.zeros(int(ends_E[-1]) + 1, dtype=np.uint8)
    bits[ends_E] = 1
    unary = np.packbits(bits, bitorder="little")
    unary = np.pad(unary, (0, rice.unary_bytes(bits.size, most) - unary.size))
    return torch.cat([pack_bits(value_E << r | low_E, rice.width), torch.from_numpy(unary)])


def _unpack_rice(rice: RiceIndices, codes: Tensor, n_sent_G: Array, most: Most) -> tuple[Array, Array]:
    n, r = int(n_sent_G.sum()), rice.remainder_bits
    n_fixed = n_bytes(n, rice.width)
    ends_E = _ends(codes[n_fixed:], n, rice.max_unary(most))
    code_E = unpack_exactly(codes[:n_fixed], rice.width, n)
    if use_numba(codes):
        from ..cpu import indices_cpu

        return indices_cpu.from_gaps(ends_E, code_E, n_sent_G, r)
    low_E, value_E = _split(code_E, r)
    step_E = ((np.diff(ends_E, prepend=-1) - 1) << r | low_E) + 1
    return _indices(step_E, n_sent_G), value_E


def _ends(octets: Tensor, n: int, n_most: int) -> Array:
    """int64: where the n ones stand."""
    unary = octets.numpy()
    filled_up = n > 0 and n_most <= FILLED_UP
    if unary.size != n_most if filled_up else unary.size > n_most:
        raise BadPayload("shape", f"{unary.size} bytes for the gaps of {n} coefficients")
    if use_numba(octets):
        from ..cpu import indices_cpu

        ends_E: Array
        ends_E, n_ones = indices_cpu.ones(unary, n)
    else:
        ends_E = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
        n_ones = ends_E.size
    if n_ones != n:
        raise BadPayload("index", f"{n_ones} gaps for {n} coefficients")
    if not filled_up and unary.size != (int(ends_E[-1]) // 8 + 1 if n else 0):
        raise BadPayload("shape", "bytes after the last gap")
    return ends_E


def unpack_exactly(codes: Tensor, width: int, n: int) -> Array:
    """n integers of `width` bits, int64. Raises BadPayload for bytes that `pack_bits` never makes."""
    if codes.numel() != n_bytes(n, width):
        raise BadPayload("shape", f"{codes.numel()} bytes for {n} codes of {width} bits")
    if n * width % 8 and int(codes[-1]) >> n * width % 8:
        raise BadPayload("range", "padding bits are set")
    return unpack_bits(codes, width, n).numpy()


def _split(code_E: Array, low_bits: int) -> tuple[Array, Array]:
    return code_E & ((1 << low_bits) - 1), code_E >> low_bits


def _gaps(index_E: Array, n_sent_G: Array) -> Array:
    previous_E = np.empty_like(index_E)
    previous_E[1:] = index_E[:-1]
    previous_E[_firsts(n_sent_G)] = -1
    gaps: Array = index_E - previous_E - 1
    return gaps


def _indices(step_E: Array, n_sent_G: Array) -> Array:
    """From the steps between the indices of a group; the first step is from -1."""
    if step_E.size == 0:
        return step_E
    running_E = np.cumsum(step_E)
    firsts = _firsts(n_sent_G)
    before = running_E[firsts] - step_E[firsts]
    indices: Array = running_E - before.repeat(n_sent_G[n_sent_G > 0]) - 1
    return indices


def _firsts(n_sent_G: Array) -> Array:
    """Where the entries of each group begin, for groups that have any."""
    starts: Array = (n_sent_G.cumsum() - n_sent_G)[n_sent_G > 0]
    return starts
