"""The numba kernel of a fused send: a residual takes gradients in, the largest coefficients of each group are
selected and quantised, and what was packed leaves the residual, while the group is in the cache.

For flat groups and values from a table, all parameters in one call: local work. What leaves the residual has
the bits of what receivers decode. Only chunks of 64 that have a coefficient are written a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numba
import numpy as np
import torch

from ..base import Change, Packed, Source
from ..codecs.sparse_layout import SparseLayout, group_ranges
from ..compiled import compiled
from ..numerics.dct import INVERSE_SCALE, ROUNDER, SMALLEST, TOP_BIT, N
from ..numerics.value_formats import VALUE_LIMIT, check_sendable
from .addresses_cpu import floats_at
from .batched_cpu import written
from .dct_cpu import INTEGER_BASIS, ORDER
from .dense_cpu import kind_of
from .entries_cpu import form_of
from .quantize_cpu import codes_of, scale_bits_of, takes_format
from .sparse_cpu import n_together, select_scratch, select_some
from .threads import share
from .update_cpu import POWERS, ZERO

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_PER_THREAD: Final = 1 << 17  # elements, at least
_SENDABLE: Final = np.float32(VALUE_LIMIT / 2).view(np.int32)
_ROUNDER: Final = np.float32(ROUNDER)
_INVERSE_SCALE: Final = np.float32(INVERSE_SCALE)


def takes(layout: SparseLayout, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether the kernel sends parameters of these shapes."""
    return takes_format(layout.format) and all(map(layout.is_flat, shapes))


class Sent:
    """Packs that are there. A group with values that cannot be sent keeps all that it has."""

    def __init__(self, layout: SparseLayout, sources: Sequence[Source], change: Change) -> None:
        ranges = group_ranges(layout, tuple(s.part.shape for s in sources))
        n_groups = int(ranges.first_P[-1])
        index_GK = np.zeros((n_groups, layout.k), dtype=np.int64)
        code_GK = np.zeros((n_groups, layout.k), dtype=np.int64)
        scale_bits_G = np.zeros(n_groups, dtype=np.uint16)
        scale = np.float32(float(change.scale))
        gradients = [s.gradient for s in sources]
        address_P = np.array([s.x.data_ptr() for s in sources], dtype=np.uint64)
        gradient_P = np.array([0 if g is None else g.data_ptr() for g in gradients], dtype=np.uint64)
        factor_P = scale * np.array([s.factor for s in sources], dtype=np.float32)
        form = layout.group_size, layout.transforms, ORDER if layout.transforms else np.arange(N)
        format_ = kind_of(layout.format), form_of(layout)[3]

        def run(first: int, last: int) -> Any:
            return _send(
                address_P, gradient_P, factor_P, ranges.n_P, ranges.first_P, ranges.k_G, *form, *format_,
                np.float32(change.decay), np.float32(change.alpha), INTEGER_BASIS, POWERS, first, last,
                index_GK, code_GK, scale_bits_G,
            )  # fmt: skip

        tops = share(run, 0, n_groups, smallest=max(1, _PER_THREAD // layout.group_size))
        self._top = np.array(max(tops, default=0), dtype=np.int32)
        self._packs = written(layout, ranges, index_GK, code_GK, scale_bits_G)

    def packs(self) -> list[Packed]:
        """Raises ValueError for values that are not finite or too large."""
        check_sendable(torch.from_numpy(self._top).view(torch.float32))
        return self._packs


@compiled
def _send(
    address_P: Array, gradient_P: Array, factor_P: Array, n_P: Array, first_P: Array, k_G: Array,
    size: int, transform: bool, order: Array, kind: int, levels: Array, decay: Word, alpha: Word,
    basis: Array, powers: Array, first: int, last: int, index_GK: Array, code_GK: Array, scale_bits_G: Array,
) -> Any:  # fmt: skip
    """The bits of the largest magnitude among all coefficients, as in `select_groups`."""
    top, full = np.int32(0), select_scratch(size, transform)
    value_GK = np.empty((n_together(size), index_GK.shape[1]), np.float32)
    for p in range(address_P.size):
        g0, n = first_P[p], n_P[p]
        a, b = max(first, g0), min(last, first_P[p + 1])
        if a >= b:
            continue
        x = floats_at(address_P[p], n)
        gradient = floats_at(gradient_P[p], n if gradient_P[p] else 0)
        n_full = n // size
        if a < min(b, g0 + n_full):
            top = max(top, _send_some(
                x, gradient, factor_P[p], size, k_G[a], transform, order, kind, levels, decay, alpha, basis,
                powers, a - g0, min(b - g0, n_full), index_GK[g0:], code_GK[g0:], scale_bits_G[g0:], value_GK,
                full,
            ))  # fmt: skip
        if b > g0 + n_full:
            begin, t = n_full * size, g0 + n_full
            top = max(top, _send_some(
                x[begin:], gradient[begin:], factor_P[p], n - begin, k_G[t], transform, order, kind, levels,
                decay, alpha, basis, powers, 0, 1, index_GK[t:], code_GK[t:], scale_bits_G[t:], value_GK,
                select_scratch(n - begin, transform),
            ))  # fmt: skip
    return top


@numba.njit(nogil=True)
def _send_some(
    x: Array, gradient: Array, factor: Word, length: int, k: int, transform: bool, order: Array, kind: int,
    levels: Array, decay: Word, alpha: Word, basis: Array, powers: Array, first: int, last: int,
    index_GK: Array, code_GK: Array, scale_bits_G: Array, value_GK: Array, scratch: Any,
) -> Any:  # fmt: skip
    """The groups [first, last) of `length` elements."""
    top, together = np.int32(0), n_together(length)
    for g in range(first, last, together):
        n_here = min(together, last - g)
        begin, end = g * length, (g + n_here) * length
        _take_in(x[begin:end], gradient[begin:end], decay, factor)
        index = index_GK[g : g + n_here]
        its_top = select_some(x[begin:end], length, k, transform, order, 0, n_here, index, value_GK, scratch)
        top = max(top, its_top)
        if its_top >= _SENDABLE:
            continue
        for h in range(n_here):
            values, codes = value_GK[h, :k], code_GK[g + h, :k]
            scale_bits_G[g + h] = scale_bits_of(values, kind)
            if scale_bits_G[g + h] != 0:
                scale = codes_of(values, scale_bits_G[g + h], kind, codes)
                for e in range(k):
                    values[e] = levels[codes[e]] * scale
                group = x[begin + h * length : begin + (h + 1) * length]
                _take_out(group, index[h], values, transform, alpha, basis, powers)
    return top


@numba.njit(nogil=True)
def _take_in(x: Array, gradient: Array, decay: Word, factor: Word) -> None:
    """Local work: where factors are 0, gradients count nothing, whatever they are."""
    if gradient.size and factor != ZERO:
        for i in range(x.size):
            x[i] = decay * x[i] + factor * gradient[i]
    else:
        for i in range(x.size):
            x[i] = decay * x[i]


@numba.njit(nogil=True)
def _take_out(
    x: Array, index: Array, values: Array, transform: bool, alpha: Word, basis: Array, powers: Array
) -> None:  # fmt: skip
    """x -= alpha times what these coefficients stand for: the bits of decoding one pack of weight 1."""
    if not transform:
        for e in range(values.size):
            x[index[e]] = x[index[e]] - (values[e] + ZERO) * alpha
        return
    largest = np.zeros(1, np.float32)
    for e in range(values.size):
        largest[0] = max(largest[0], abs(values[e]))
    exponent = largest.view(np.int32)[0] >> 23
    if exponent < SMALLEST:
        return
    up, down = powers[254 + TOP_BIT - exponent], powers[exponent - TOP_BIT]
    chunk, e = np.empty(N, np.float32), 0
    while e < values.size:
        c = index[e] // N
        chunk[:] = ZERO
        while e < values.size and index[e] // N == c:
            q = (values[e] * up + _ROUNDER) - _ROUNDER
            _add(chunk, basis[index[e] % N], q)
            e += 1
        _subtract(x[c * N : (c + 1) * N], chunk, down, alpha)


@numba.njit(nogil=True)
def _add(chunk: Array, vector: Array, q: Word) -> None:
    for i in range(N):
        chunk[i] += q * vector[i]


@numba.njit(nogil=True)
def _subtract(x: Array, chunk: Array, down: Word, alpha: Word) -> None:
    for i in range(x.size):
        x[i] = x[i] - (chunk[i] * down * _INVERSE_SCALE + ZERO) * alpha
