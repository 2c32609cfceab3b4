"""The numba kernels of codecs/dense_codec.py: groups of values to scales and codes and back, in one pass.

Bytes and values are those of the reference. A group is quantised into a buffer of codes and packed from
there, each step in a loop of its own without branches per format, of which the compiler makes vectors.
Threads take ranges of groups. Groups that are zero have no codes, so that nobody knows beforehand where a
range's bytes end: each begins where it would if all groups before it sent something, and the gaps are closed
at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
import torch
from torch import Tensor

from ..compiled import compiled
from ..numerics.bit_layout import n_bytes
from ..numerics.value_formats import FORMATS, VALUE_LIMIT, Format
from .addresses_cpu import bytes_at
from .reduce_cpu import add_up, add_up_codes, largest_bits
from .threads import share

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

SIGN, TWO_BITS, _FOUR, _EIGHT, _HALF, _E3M0 = range(6)
KINDS: Final = {1: SIGN, 2: TWO_BITS, 4: _FOUR, 8: _EIGHT, 16: _HALF, "e3m0": _E3M0}
_WIDTHS: Final = (1, 2, 4, 8, 16, 4)
_REFUSED: Final = {_FOUR: 8, _EIGHT: 128, _E3M0: 8}
"""The code that stands for no value."""

_PER_THREAD: Final = 1 << 17  # elements, at least

_SENDABLE: Final = np.float32(VALUE_LIMIT / 2).view(np.int32)
_SIGN_BIT: Final = np.int32(-0x80000000)
_ZERO: Final = np.float32(0.0)
_HALF_ONE: Final = np.float32(0.5)
_HALF_STEP: Final = np.int32(0x3F000000)  # the bits of 0.5
_ROUNDER: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to even
_2_112: Final = np.float32(2.0**112)


def kind_of(format_: Format) -> int:
    """How kernels name a format."""
    return KINDS[next(bits for bits, known in FORMATS.items() if known is format_)]


# ------------------------------------------------------------------------------------------- pack: local


def pack(values: Tensor, size: int, format_: Format) -> tuple[Tensor, Tensor, float]:
    """Scales, codes, and the largest magnitude, which is not finite if anything is not: then the rest is of
    no use. `values`: contiguous flat float32 on the CPU, groups of `size`, the last may be shorter."""
    x, kind, width = values.detach().numpy(), kind_of(format_), format_.width
    n_groups = -(-x.size // size)
    scale_bits_G = np.empty(n_groups, dtype=np.uint16)
    if kind in (SIGN, TWO_BITS):  # by sums, whose order is torch's
        full, rest = values.detach()[: x.size // size * size], values.detach()[x.size // size * size :]
        scales = [format_.scales(t.abs()) for t in (full.view(-1, size), rest.view(1, -1)) if t.numel()]
        scale_bits_G[:] = torch.cat(scales).view(torch.int16).numpy().view(np.uint16)

    def run(first: int, last: int, scale_bits_G: Array, out: Array) -> Any:
        return _pack(x, size, kind, width, first, last, scale_bits_G, out)

    return _packed(run, x.size, size, width, scale_bits_G)


def _packed(
    run: Callable[[int, int, Array, Array], Any], m: int, size: int, width: int, scale_bits_G: Array
) -> tuple[Tensor, Tensor, float]:
    """`run` packs a range of groups: the largest magnitude's bits, and how many bytes it has written."""
    n_groups, n_each = scale_bits_G.size, size * width // 8
    octets = np.empty(n_bytes(m, width), dtype=np.uint8)

    def work(first: int, last: int) -> Any:
        return run(first, last, scale_bits_G, octets[first * n_each :])

    done = share(work, 0, n_groups, smallest=max(1, _PER_THREAD // size)) if n_groups else []
    top = float(np.array(max((t for t, _ in done), default=0), dtype=np.int32).view(np.float32))
    n_written = sum(n for _, n in done)
    if n_written < octets.size:  # ranges leave gaps where groups are zero
        octets = _gathered(octets, n_groups, n_each, [n for _, n in done])
    return torch.from_numpy(scale_bits_G.view(np.int16)).view(torch.bfloat16), torch.from_numpy(octets), top


def _gathered(octets: Array, n_groups: int, n_each: int, written: list[int]) -> Array:
    """What was written for each range of groups, one after another: a range begins where it would if all
    groups before it sent something, `n_each` bytes each."""
    starts = [n_groups * i // len(written) * n_each for i in range(len(written))]
    return np.concatenate([octets[a : a + m] for a, m in zip(starts, written, strict=True)])


@compiled
def _pack(
    x: Array, size: int, kind: int, width: int, first: int, last: int, scale_bits_G: Array, out: Array
) -> Any:  # fmt: skip
    """The bits of the largest magnitude, and how many bytes were written."""
    top, at = np.int32(0), 0
    code = np.zeros(size + 8, np.int32)
    scales = np.empty(1, np.float32)
    for g in range(first, last):
        here = x[g * size : (g + 1) * size]
        largest = largest_bits(here.view(np.int32))
        top = max(top, largest)
        if kind not in (SIGN, TWO_BITS):
            scale_bits_G[g] = scale_bits(largest, kind)
        scales.view(np.uint32)[0] = np.uint32(scale_bits_G[g]) << np.uint32(16)
        if scales[0] > _ZERO:
            to_codes(here, scales[0], kind, code)
            n_written = (here.size * width + 7) // 8
            code[here.size : (here.size + 7) // 8 * 8] = 0
            _to_bytes(code, width, out[at : at + n_written])
            at += n_written
    return top, at


def send(
    leftover: Tensor, start: Tensor, end: Tensor, decay: float, size: int, format_: Format
) -> tuple[Tensor, Tensor, float]:
    """As `pack` of leftover = decay leftover + (start - end), and what was packed leaves it, in one pass;
    end = start. All flat, contiguous, float32 on the CPU; the format is one that `has_send` takes. A group
    with values that cannot be sent keeps all that it has."""
    e, x, y, kind, width = leftover.numpy(), start.numpy(), end.numpy(), kind_of(format_), format_.width

    def run(first: int, last: int, scale_bits_G: Array, out: Array) -> Any:
        return _send(e, x, y, np.float32(decay), size, kind, width, first, last, scale_bits_G, out)

    return _packed(run, e.size, size, width, np.empty(-(-e.size // size), dtype=np.uint16))


def has_send(format_: Format) -> bool:
    """Those whose scale follows from the largest value: sums have torch's order."""
    return kind_of(format_) not in (SIGN, TWO_BITS)


@compiled
def _send(
    e: Array, x: Array, y: Array, decay: Word, size: int, kind: int, width: int, first: int, last: int,
    scale_bits_G: Array, out: Array,
) -> Any:  # fmt: skip
    """As `_pack`."""
    top, at = np.int32(0), 0
    code, value = np.zeros(size + 8, np.int32), np.empty(size, np.float32)
    scales = np.empty(1, np.float32)
    for g in range(first, last):
        a, b = g * size, min((g + 1) * size, e.size)
        here = e[a:b]
        _take_in(here, x[a:b], y[a:b], decay)
        largest = largest_bits(here.view(np.int32))
        top = max(top, largest)
        scale_bits_G[g] = scale_bits(largest, kind)
        scales.view(np.uint32)[0] = np.uint32(scale_bits_G[g]) << np.uint32(16)
        if scales[0] > _ZERO:
            to_codes(here, scales[0], kind, code)
            n_written = (here.size * width + 7) // 8
            code[here.size : (here.size + 7) // 8 * 8] = 0
            _to_bytes(code, width, out[at : at + n_written])
            at += n_written
            if largest < _SENDABLE:
                _values_of(code, here.size, scales[0], kind, value)
                _take_out(here, value)
    return top, at


@numba.njit(nogil=True)
def _take_in(e: Array, x: Array, y: Array, decay: Word) -> None:
    for i in range(e.size):
        e[i] = e[i] * decay + (x[i] - y[i])
        y[i] = x[i]


@numba.njit(nogil=True)
def _take_out(e: Array, value: Array) -> None:
    for i in range(e.size):
        e[i] = e[i] - (value[i] + _ZERO)


@numba.njit(inline="always")
def scale_bits(largest: Word, kind: int) -> Word:
    """bfloat16, as `Format.scales` has it, from the bits of the largest magnitude."""
    x = np.int32(largest).view(np.float32)
    if kind == _HALF:
        return np.uint16((largest & np.int32(0x7F800000)) >> 16)
    if kind == _FOUR:
        x = x / np.float32(7.0)
    elif kind == _EIGHT:
        x = x / np.float32(127.0)
    else:
        x = x * np.float32(0.75)
    return np.uint16((np.float32(x).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16))


@numba.njit(nogil=True)
def to_codes(x: Array, scale: Word, kind: int, code: Array) -> None:
    """As `Format.codes`. A loop per format, without branches: the compiler makes vectors of them."""
    if kind == SIGN:
        for i in range(x.size):
            code[i] = x[i] < _ZERO
    elif kind == TWO_BITS:
        limit = np.float32(1.5) * scale
        for i in range(x.size):
            code[i] = np.int32(abs(x[i]) > limit) | np.int32(x[i] < _ZERO) << 1
    elif kind in (_FOUR, _EIGHT):
        most = np.float32(7.0) if kind == _FOUR else np.float32(127.0)
        mask = np.int32(15) if kind == _FOUR else np.int32(255)
        for i in range(x.size):
            q = (x[i] / scale + _ROUNDER) - _ROUNDER
            code[i] = np.int32(min(max(q, -most), most)) & mask
    elif kind == _HALF:
        for i in range(x.size):
            y = x[i] / scale
            bits = np.float32(abs(y)).view(np.int32)
            odd = (bits >> 13) & 1
            normal = (bits - np.int32(112 << 23) + np.int32(0xFFF) + odd) >> 13
            tiny = np.float32(abs(y) + _HALF_ONE).view(np.int32) - _HALF_STEP  # of half an octave's steps
            h = np.int32(normal if bits >= np.int32(113 << 23) else tiny)
            code[i] = h | (np.int32(0x8000) if y < _ZERO and h > 0 else np.int32(0))
    else:
        for i in range(x.size):
            bits = np.float32(abs(x[i] / scale)).view(np.int32)
            # Above 3/2 of a power of two counts as the next one; the lowest limit is 2^-7 itself.
            e = ((bits + np.int32(0x3FFFFF)) >> 23) - np.int32(120)
            e = min(max(e, np.int32(bits > np.int32(120 << 23))), np.int32(7))
            code[i] = e | (np.int32(8) if x[i] < _ZERO and e > 0 else np.int32(0))


@numba.njit(nogil=True)
def _to_bytes(code: Array, width: int, out: Array) -> None:
    """As `bits.pack_bits`; `code` goes on with zeros to the end of the last byte."""
    if width == 1:
        for i in range(out.size):
            c, octet = code[8 * i : 8 * i + 8], np.int32(0)
            for j in range(8):
                octet |= c[j] << j
            out[i] = octet
    elif width == 2:
        for i in range(out.size):
            c = code[4 * i : 4 * i + 4]
            out[i] = c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6
    elif width == 4:
        for i in range(out.size):
            out[i] = code[2 * i] | code[2 * i + 1] << 4
    elif width == 8:
        for i in range(out.size):
            out[i] = code[i]
    else:
        for i in range(out.size // 2):
            out[2 * i] = code[i] & 255
            out[2 * i + 1] = code[i] >> 8


# ------------------------------------------------------------------------------------------- read: exact


@dataclass(frozen=True, slots=True)
class Grouped:
    """A pack of m values that was checked: group g, unless its scale is 0, has its codes from byte at_G[g]
    on."""

    octets: Array  # uint8
    scale_G: Array  # float32
    at_G: Array  # int64
    m: int
    size: int
    kind: int


def has_refused(octets: Tensor, format_: Format) -> bool:
    """Whether a code is there that stands for no value. Bits after the last code are zero."""
    refused = _REFUSED.get(kind_of(format_))
    return refused is not None and bool(_has_code(octets.numpy(), format_.width, refused))


@compiled
def _has_code(octets: Array, width: int, refused: int) -> Any:
    found = np.uint8(0)
    if width == 8:
        for i in range(octets.size):
            found |= np.uint8(octets[i] == refused)
    else:
        for i in range(octets.size):
            found |= np.uint8((octets[i] & 15) == refused) | np.uint8((octets[i] >> 4) == refused)
    return found > 0


def mean(out: Tensor, packs: Sequence[Grouped], weights: Sequence[float], inverse: float, first: int) -> None:
    """out = the weighted mean of the values [first, first + out.numel()); `first` begins a group, and what
    ends in `out` ends a group or the row. Contiguous flat float32 on the CPU."""
    y, p = out.numpy(), packs[0]
    weight_W = np.array(weights, dtype=np.float32)
    address_W = np.array([each.octets.ctypes.data for each in packs], dtype=np.uint64)
    n_octets_W = np.array([each.octets.size for each in packs], dtype=np.int64)
    g0 = first // p.size
    last = g0 + -(-y.size // p.size)
    scale_WG = np.stack([each.scale_G[g0:last] for each in packs])
    at_WG = np.stack([each.at_G[g0:last] for each in packs])
    rest = address_W, n_octets_W, scale_WG, at_WG, weight_W, np.float32(inverse)
    form = p.m - first, p.size, p.kind, _WIDTHS[p.kind]
    share(lambda a, b: _mean(y, a, b, *rest, *form), 0, last - g0, smallest=max(1, _PER_THREAD // p.size))


@compiled
def _mean(
    y: Array, first: int, last: int, address_W: Array, n_octets_W: Array, scale_WG: Array, at_WG: Array,
    weight_W: Array, inverse: Word, m: int, size: int, kind: int, width: int,
) -> None:  # fmt: skip
    code = np.zeros(size + 8, np.int32)
    value = np.empty(size, np.float32)
    for g in range(first, last):
        length = min(size, m - g * size)
        here = y[g * size : g * size + length]
        here[:] = _ZERO
        for w in range(weight_W.size):
            if scale_WG[w, g] > _ZERO:
                octets = bytes_at(address_W[w], n_octets_W[w])
                _to_values(octets, at_WG[w, g], length, scale_WG[w, g], kind, width, code, value)
                _add(here, value, weight_W[w])
        _finish(here, inverse)


def l1_norms(pack: Grouped, chunks: Sequence[tuple[int, int]]) -> list[float]:
    """`reduce.l1_norm` of each chunk of values. Chunks begin and end with groups."""
    p = pack
    rest = p.octets, p.scale_G, p.at_G, p.m, p.size, p.kind, _WIDTHS[p.kind]
    bounds = np.array(chunks, dtype=np.int64).reshape(-1, 2)
    sums = np.empty((len(chunks), 2), dtype=np.float64)
    if chunks:
        share(lambda a, b: _l1_norms(bounds[a:b], sums[a:b], *rest), 0, len(chunks), smallest=1)
    return [float(total) * float(unit) for total, unit in sums]


@compiled
def _l1_norms(
    bounds: Array, sums: Array, octets: Array, scale_G: Array, at_G: Array,
    m: int, size: int, kind: int, width: int,
) -> None:  # fmt: skip
    code = np.zeros(size + 8, np.int32)
    n_most = 0
    for c in range(bounds.shape[0]):
        n_most = max(n_most, bounds[c, 1] - bounds[c, 0])
    values = np.empty(n_most, np.float32)
    for c in range(bounds.shape[0]):
        first, last = bounds[c, 0], bounds[c, 1]
        if kind in (_FOUR, _E3M0):
            g0, g1 = first // size, (last + size - 1) // size
            total, unit, is_done = add_up_codes(
                octets, at_G[g0:g1], scale_G[g0:g1], size, last - first, kind == _E3M0
            )
            sums[c, 0], sums[c, 1] = total, unit
            if is_done:
                continue
        here = values[: last - first]
        for g in range(first // size, (last + size - 1) // size):
            length = min(size, m - g * size)
            into = here[g * size - first : g * size - first + length]
            if scale_G[g] > _ZERO:
                _to_values(octets, at_G[g], length, scale_G[g], kind, width, code, into)
            else:
                into[:] = _ZERO
        total, unit = add_up(here)
        sums[c, 0], sums[c, 1] = total, unit


@numba.njit(nogil=True)
def _to_values(
    octets: Array, at: int, length: int, scale: Word, kind: int, width: int, code: Array, out: Array
) -> None:  # fmt: skip
    """As `Format.read` of good codes."""
    _from_bytes(octets[at : at + (length * width + 7) // 8], width, code)
    _values_of(code, length, scale, kind, out)


@numba.njit(nogil=True)
def _values_of(code: Array, length: int, scale: Word, kind: int, out: Array) -> None:
    bits = out.view(np.int32)
    if kind == SIGN:
        plain = np.float32(scale).view(np.int32)
        for i in range(length):
            bits[i] = plain | code[i] << 31
    elif kind == TWO_BITS:
        for i in range(length):
            out[i] = np.float32((1 + (code[i] & 1)) * (1 - (code[i] & 2))) * scale
    elif kind in (_FOUR, _EIGHT):
        top = np.int32(8) if kind == _FOUR else np.int32(128)
        for i in range(length):
            out[i] = np.float32((code[i] ^ top) - top) * scale
    elif kind == _HALF:
        for i in range(length):
            bits[i] = (code[i] & np.int32(0x7FFF)) << 13
        for i in range(length):
            sign = np.float32(1 - ((code[i] >> 15) << 1))
            out[i] = out[i] * _2_112 * sign * scale
    else:
        for i in range(length):
            e = code[i] & 7
            bits[i] = ((e + 120) << 23 | code[i] >> 3 << 31) if e > 0 else 0
        for i in range(length):
            out[i] *= scale


@numba.njit(nogil=True)
def _from_bytes(octets: Array, width: int, code: Array) -> None:
    """As `bits.unpack_bits`, to the end of the last byte."""
    if width == 1:
        for i in range(octets.size):
            c, octet = code[8 * i : 8 * i + 8], np.int32(octets[i])
            for j in range(8):
                c[j] = (octet >> j) & 1
    elif width == 2:
        for i in range(octets.size):
            c, octet = code[4 * i : 4 * i + 4], np.int32(octets[i])
            c[0], c[1], c[2], c[3] = octet & 3, (octet >> 2) & 3, (octet >> 4) & 3, octet >> 6
    elif width == 4:
        for i in range(octets.size):
            octet = np.int32(octets[i])
            code[2 * i], code[2 * i + 1] = octet & 15, octet >> 4
    elif width == 8:
        for i in range(octets.size):
            code[i] = octets[i]
    else:
        for i in range(octets.size // 2):
            code[i] = np.int32(octets[2 * i]) | np.int32(octets[2 * i + 1]) << 8


@numba.njit(nogil=True)
def _add(y: Array, value: Array, weight: Word) -> None:
    for i in range(y.size):
        y[i] += value[i] * weight


@numba.njit(nogil=True)
def _finish(y: Array, inverse: Word) -> None:
    """Adding 0 makes 0 of -0."""
    for i in range(y.size):
        y[i] = y[i] * inverse + _ZERO
