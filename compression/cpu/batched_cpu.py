"""The numba kernels of many small parameters at once: a call for each takes longer than their work.

For flat groups and values from a table, the default. The kernels get the addresses of the tensors and where
each parameter's groups begin among all (`GroupRanges`). For packing, threads share the groups of all
parameters; values are quantised together, and one pass writes every parameter's codes. For updating they
share the parameters: each is read out of the packed bytes and decoded as `sparse_cpu` does. The packs, and
the bits of what is decoded, are those that parameters have one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..base import Packed, Payload, Senders, Target
from ..codecs.sparse_layout import GroupRanges, SparseLayout, group_ranges
from ..compiled import compiled
from ..errors import BadPayload
from ..numerics.index_layout import FILLED_UP
from ..numerics.value_formats import check_sendable
from ..rows import places
from . import entries_cpu
from .addresses_cpu import bytes_at, floats_at
from .dct_cpu import INTEGER_BASIS, ORDER
from .entries_cpu import form_of, n_in, read_entries, read_scales
from .senders_cpu import merge
from .sparse_cpu import decode_groups, select_groups
from .threads import share
from .update_cpu import POWERS, how_of

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

SMALL: Final = 1 << 18
"""Elements of a parameter, at most, and 16 times that of those that are taken together: what their groups
say is scratch."""

_PER_THREAD: Final = 1 << 17  # elements, at least
_FILLED_UP: Final = FILLED_UP


def takes(layout: SparseLayout, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape is of the kind."""
    return prod(shape) <= SMALL and entries_cpu.takes(layout) and layout.is_flat(shape)


# ------------------------------------------------------------------------------------------- pack: local


def pack(layout: SparseLayout, xs: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Packed]:
    """`Compressor.pack` of each: whole parameters, flat contiguous float32 on the CPU."""
    ranges, k = group_ranges(layout, tuple(shapes)), layout.k
    n_groups = int(ranges.first_P[-1])
    index_GK = np.zeros((n_groups, k), dtype=np.int64)
    value_GK = np.zeros((n_groups, k), dtype=np.float32)
    address_P = np.array([x.data_ptr() for x in xs], dtype=np.uint64)
    order = ORDER if layout.transforms else np.arange(ORDER.size)

    def run(first: int, last: int) -> Any:
        return _select(
            address_P,
            ranges.n_P,
            ranges.first_P,
            ranges.k_G,
            layout.group_size,
            layout.transforms,
            order,
            first,
            last,
            index_GK,
            value_GK,
        )

    tops = share(run, 0, n_groups, smallest=max(1, _PER_THREAD // layout.group_size))
    check_sendable(torch.from_numpy(np.array(max(tops), dtype=np.int32)).view(torch.float32))
    scale_G, code_GK = _quantized(layout, torch.from_numpy(value_GK), ranges.k_G)
    bits_G = scale_G.view(torch.int16).numpy().view(np.uint16)
    return written(layout, ranges, index_GK, code_GK.numpy(), bits_G)


def written(
    layout: SparseLayout, ranges: GroupRanges, index_GK: Array, code_GK: Array, scale_bits_G: Array
) -> list[Packed]:
    """A pack for each parameter, of the entries of all groups; those whose scale is 0 send none."""
    octets = np.zeros(int(ranges.byte_P[-1]), dtype=np.uint8)
    n_P = np.empty(ranges.n_P.size, dtype=np.int64)
    rice, low_bits, width, *_ = form_of(layout)
    of_all = index_GK, code_GK, scale_bits_G, ranges.k_G, ranges.first_P, ranges.byte_P, ranges.unary_P
    _write(*of_all, rice, low_bits, width, octets, n_P)
    scales, codes = (
        torch.from_numpy(scale_bits_G.view(np.int16)).view(torch.bfloat16),
        torch.from_numpy(octets),
    )
    firsts, starts = ranges.first_P.tolist(), ranges.byte_P.tolist()
    return [
        (scales[a:b], codes[at : at + n])
        for a, b, at, n in zip(firsts[:-1], firsts[1:], starts, n_P.tolist(), strict=False)
    ]


def _quantized(layout: SparseLayout, value_GK: Tensor, k_G: Array) -> tuple[Tensor, Tensor]:
    """Scales, and codes of all: groups that send as many together, as many as that."""
    scale_G = torch.zeros(len(value_GK), dtype=torch.bfloat16)
    code_GK = torch.zeros(value_GK.shape, dtype=torch.int64)
    for k in np.unique(k_G).tolist():
        rows = torch.from_numpy(np.flatnonzero(k_G == k))
        values = value_GK[rows, :k]
        scales = layout.format.scales(values.abs())
        scale_G[rows] = scales
        code_GK[rows, :k] = layout.format.codes(values, scales.float()[:, None])
    return scale_G, code_GK


@compiled
def _select(
    address_P: Array, n_P: Array, first_P: Array, k_G: Array, size: int, transform: bool, order: Array,
    first: int, last: int, index_GK: Array, value_GK: Array,
) -> Any:  # fmt: skip
    top = np.int32(0)
    for p in range(address_P.size):
        g0, n = first_P[p], n_P[p]
        a, b = max(first, g0), min(last, first_P[p + 1])
        if a >= b:
            continue
        x = floats_at(address_P[p], n)
        n_full = n // size
        full = min(b, g0 + n_full)
        if a < full:
            k = k_G[a]
            index, value = index_GK[g0 : g0 + n_full], value_GK[g0 : g0 + n_full]
            top = max(top, select_groups(x, size, k, transform, order, a - g0, full - g0, index, value))
        if b > g0 + n_full:
            t = g0 + n_full
            rest = x[n_full * size :]
            index, value = index_GK[t : t + 1], value_GK[t : t + 1]
            top = max(top, select_groups(rest, rest.size, k_G[t], transform, order, 0, 1, index, value))
    return top


@compiled
def _write(
    index_GK: Array, code_GK: Array, scale_bits_G: Array, k_G: Array, first_P: Array, at_P: Array,
    unary_P: Array, rice: bool, low_bits: int, width: int, octets: Array, n_P: Array,
) -> None:  # fmt: skip
    """As `pack_indices` for each parameter, over zeros; `n_P`: bytes."""
    low_mask = (1 << low_bits) - 1
    for p in range(n_P.size):
        n, start = 0, at_P[p]
        for g in range(first_P[p], first_P[p + 1]):
            n += k_G[g] if scale_bits_G[g] != 0 else 0
        unary, end = start + ((n * width + 7) >> 3), -1  # where the zeros and ones begin; the last one
        held, n_held, at = np.uint64(0), 0, start
        for g in range(first_P[p], first_P[p + 1]):
            index = -1
            for e in range(k_G[g] if scale_bits_G[g] != 0 else 0):
                low = index_GK[g, e]
                if rice:
                    gap = low - index - 1
                    index = low
                    low = gap & low_mask
                    end += (gap >> low_bits) + 1
                    octets[unary + (end >> 3)] |= np.uint8(1 << (end & 7))
                held |= np.uint64(code_GK[g, e] << low_bits | low) << np.uint64(n_held)
                n_held += width
                while n_held >= 8:
                    octets[at] = np.uint8(held & np.uint64(255))
                    held >>= np.uint64(8)
                    n_held -= 8
                    at += 1
        if n_held:
            octets[at] = np.uint8(held & np.uint64(255))
        n_unary = unary_P[p] if n > 0 and unary_P[p] <= _FILLED_UP else (end >> 3) + 1
        n_P[p] = unary - start + (n_unary if rice else 0)


# ------------------------------------------------------------------------------------------- decode: exact


def fused_update(
    layout: SparseLayout,
    targets: Sequence[Target],
    payloads: Sequence[Payload],
    weights: Sequence[float],
    inverse: float,
    senders: Senders | None = None,
) -> None:
    """As `Compressor.fused_update`. `weights` and `inverse`: of `mean_weights`."""
    ranges = group_ranges(layout, tuple(t.part.shape for t in targets))
    names = [t.name for t in targets]
    found = [at for payload in payloads if (at := places(payload, names, entries_cpu.PACK)) is not None]
    n_groups_P = np.diff(ranges.first_P)
    if len(found) < len(payloads) or any((at.count_PK[:, 0] != n_groups_P).any() for at in found):
        raise BadPayload("shape", "no scales for all groups, or no codes")
    address_WPK = np.stack([at.address_PK for at in found])
    count_WPK = np.stack([at.count_PK for at in found])
    steps = [t.step for t in targets]
    where = (
        np.array([t.x.data_ptr() for t in targets], dtype=np.uint64),
        np.array([t.part.start for t in targets], dtype=np.int64),
        np.array([t.part.stop for t in targets], dtype=np.int64),
    )
    how_P = np.array([how_of(step) for step in steps], dtype=np.int64)
    decay_P = np.array([step.decay for step in steps], dtype=np.float32)
    scale_P = np.array([step.scale for step in steps], dtype=np.float32)
    weight_W = np.array(weights, dtype=np.float32)
    whole_W = weight_W if senders is None else np.array(senders.weights, dtype=np.float32)

    arguments: list[Any] = [
        *where,
        ranges.n_P,
        ranges.first_P,
        ranges.k_G,
        address_WPK,
        count_WPK,
        weight_W,
        np.float32(inverse),
        whole_W,
        np.float32(0.0 if senders is None else senders.least),
        INTEGER_BASIS,
        POWERS,
        *form_of(layout),
        layout.group_size,
        layout.transforms,
        how_P,
        decay_P,
        scale_P,
    ]

    def run(first: int, last: int) -> Any:
        return _update(*[*arguments, first, last])

    per_target = max(1, int(ranges.n_P.sum()) // len(targets))
    outcome = min(share(run, 0, len(targets), smallest=max(1, _PER_THREAD // per_target)))
    if outcome == _SHORT:
        raise BadPayload("shape", "too few bytes of codes")
    if outcome == _PAST:
        raise IndexError("a coefficient past the end of its group: the packs were not checked")


_SHORT, _PAST, _GOOD = range(3)


@compiled
def _update(
    address_P: Array, start_P: Array, stop_P: Array, n_P: Array, first_P: Array, k_G: Array,
    address_WPK: Array, count_WPK: Array, weights: Array, inverse: Any, wholes: Array, least: Any,
    basis: Array, powers: Array, rice: bool, low_bits: int, width: int, levels: Array, n_coefficients: int,
    size: int, transform: bool, how_P: Array, decay_P: Array, scale_P: Array, first: int, last: int,
) -> Any:  # fmt: skip
    """`least`: of means over senders, above 0; 0: means over all."""
    n_packs, n_most, g_most = weights.size, 0, 0
    for p in range(first, last):
        n_most = max(n_most, n_in(k_G[first_P[p] : first_P[p + 1]]))
        g_most = max(g_most, first_P[p + 1] - first_P[p])
    position_E, value_E = np.empty(n_packs * n_most, np.int64), np.empty(n_packs * n_most, np.float32)
    of_senders = least > np.float32(0.0)
    n_merged = position_E.size if of_senders else 0
    position_M, value_M = np.empty(n_merged, np.int64), np.empty(n_merged, np.float32)
    one, offset_1G = np.ones(1, np.float32), np.empty((1, g_most + 1), np.int64)
    bits_G = np.empty(g_most, np.uint16)
    for p in range(first, last):
        a, b = first_P[p], first_P[p + 1]
        offset_WG = np.empty((n_packs, b - a + 1), np.int64)
        e = 0
        for w in range(n_packs):
            e = read_entries(
                bytes_at(address_WPK[w, p, 1], count_WPK[w, p, 1]),
                read_scales(address_WPK[w, p, 0], bits_G[: b - a]), k_G[a:b],
                rice, low_bits, width, levels, n_coefficients, e, position_E, value_E, offset_WG[w],
            )  # fmt: skip
            if e < 0:
                return _SHORT
        n_local = stop_P[p] - start_P[p]
        if n_local <= 0:
            continue
        y, begin, end = floats_at(address_P[p], n_local), start_P[p] // size, -(-stop_P[p] // size)
        if of_senders:
            offset_G = offset_1G[:, : b - a + 1]
            if merge(
                position_E, value_E, offset_WG, weights, wholes, least, n_coefficients,
                position_M, value_M, offset_G[0],
            ) < 0:  # fmt: skip
                return _PAST
            good = decode_groups(
                y, start_P[p], position_M, value_M, offset_G, one, one[0], basis, powers,
                n_P[p], size, n_coefficients, transform, how_P[p], decay_P[p], scale_P[p], begin, end,
            )  # fmt: skip
        else:
            good = decode_groups(
                y, start_P[p], position_E, value_E, offset_WG, weights, inverse, basis, powers,
                n_P[p], size, n_coefficients, transform, how_P[p], decay_P[p], scale_P[p], begin, end,
            )  # fmt: skip
        if not good:
            return _PAST
    return _GOOD
