"""The cosine transform inside numba kernels; see `dct` for the definition.

Forward, for local work: 64 chunks at a time, as the columns of a panel, so that every operation is one on
rows of 64 floats. Sums and differences of opposite elements split a DCT-II of n into one of n / 2 and a
DCT-IV; rotations and signs split that into two DCT-II of n / 2 (Plonka & Tasche 2005, "Fast and numerically
stable algorithms for discrete cosine transforms"). Transforms of 16 and 8 stay in registers.

Inverse, exact: from the coefficients that are not zero alone. They and the basis are integers whose sums stay
below 2^24, so the order does not matter.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numba
import numpy as np
import torch

from ..numerics.dct import N, integer_basis

PANEL: Final = N * N
"""Floats of a panel: element or coefficient i of column c stands at i * 64 + c."""

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

Words = Any
"""A tuple of them."""

INTEGER_BASIS: Final = integer_basis(torch.device("cpu")).numpy().copy()


ORDER: Final = np.empty(N, dtype=np.int64)
"""In which row `forward` expects element i: those that meet stand 8 rows from each other."""
for _i in range(8):
    _o = 15 - _i
    ORDER[[_i, 63 - _i, 31 - _i, 32 + _i, _o, 63 - _o, 31 - _o, 32 + _o]] = _i + 8 * np.arange(8)


def _angles(n: int) -> np.ndarray[Any, Any]:
    """Cosines, then sines, of the rotations of a DCT-IV of n."""
    angles = [math.pi * (2 * i + 1) / (4 * n) for i in range(n // 2)]
    return np.array([*map(math.cos, angles), *map(math.sin, angles)], dtype=np.float32)


_SCALE: Final = np.float32(math.sqrt(2 / N))
_ROOT_HALF: Final = np.float32(math.sqrt(0.5))
_COS_1, _COS_3 = np.float32(math.cos(math.pi / 8)), np.float32(math.cos(3 * math.pi / 8))
_TURN_4, _TURN_8, _TURN_16, _TURN_32 = map(_angles, (4, 8, 16, 32))


@numba.njit(nogil=True)
def forward(x: Array, y: Array) -> None:
    """The coefficients of panel x, whose rows stand in `ORDER`, to panel y; x is overwritten. Local."""
    _split(x, y)
    _sixteen(y, x, 0)
    _sixteen(y, x, 16)
    _sixteen(y, x, 32)
    _eight(y, x, 48)
    _eight(y, x, 56)
    for j in range(N):
        y[j] = x[j] * _ROOT_HALF
    for k in range(1, 16):
        for j in range(N):
            y[4 * k * N + j] = x[k * N + j]
    _merge(x, 16, 16, y, 1, 4)
    _merge(x, 48, 8, y, 2, 8)


@numba.njit(nogil=True)
def _split(x: Array, y: Array) -> None:
    """Of 64: a DCT-II of 16 remains to be taken of rows [0, 16), two of [16, 48) and of 8 of [48, 64)."""
    for i in range(8):
        o = 15 - i
        c, s, c_o, s_o = _TURN_32[i], _TURN_32[16 + i], _TURN_32[o], _TURN_32[16 + o]
        c_q, s_q = _TURN_16[i], _TURN_16[8 + i]
        sign = np.float32(1 - 2 * (i & 1))
        r = i * N
        for j in range(N):
            a, a_ = x[r + j] * _SCALE, x[r + 8 * N + j] * _SCALE
            b, b_ = x[r + 16 * N + j] * _SCALE, x[r + 24 * N + j] * _SCALE
            e, e_ = x[r + 32 * N + j] * _SCALE, x[r + 40 * N + j] * _SCALE
            f, f_ = x[r + 48 * N + j] * _SCALE, x[r + 56 * N + j] * _SCALE
            sum_a, sum_b, sum_e, sum_f = a + a_, b + b_, e + e_, f + f_
            q, q_o = sum_a - sum_b, sum_e - sum_f
            y[r + j], y[r + 8 * N + j] = sum_a + sum_b, sum_e + sum_f
            d, d_ = a - a_, b - b_
            y[r + 16 * N + j], y[r + 32 * N + j] = d * c + d_ * s, (d_ * c - d * s) * sign
            d, d_ = e - e_, f - f_
            y[r + 24 * N + j], y[r + 40 * N + j] = d * c_o + d_ * s_o, (d * s_o - d_ * c_o) * sign
            y[r + 48 * N + j], y[r + 56 * N + j] = q * c_q + q_o * s_q, (q_o * c_q - q * s_q) * sign


@numba.njit(nogil=True)
def _merge(x: Array, rows: int, h: int, y: Array, first: int, step: int) -> None:
    """The DCT-IV of 2 h from the DCT-II in h rows and in the h rows after them: coefficients first, first +
    step / 2, ..."""
    for j in range(N):
        y[first * N + j] = x[rows * N + j]
        y[(N - first) * N + j] = -x[(rows + h) * N + j]
    for m in range(1, h):
        up, down = (first + m * step) * N, (m * step - first) * N
        for j in range(N):
            a, b = x[(rows + m) * N + j], x[(rows + 2 * h - m) * N + j]
            y[up + j] = a + b
            y[down + j] = a - b


# Of values in registers.


@numba.njit(nogil=True)
def _sixteen(x: Array, y: Array, row: int) -> None:
    """DCT-II along 16 rows, of which the last 8 stand in reverse."""
    r = row * N
    for j in range(N):
        a, a_ = x[r + j], x[r + 8 * N + j]
        b, b_ = x[r + N + j], x[r + 9 * N + j]
        c, c_ = x[r + 2 * N + j], x[r + 10 * N + j]
        d, d_ = x[r + 3 * N + j], x[r + 11 * N + j]
        e, e_ = x[r + 4 * N + j], x[r + 12 * N + j]
        f, f_ = x[r + 5 * N + j], x[r + 13 * N + j]
        g, g_ = x[r + 6 * N + j], x[r + 14 * N + j]
        h, h_ = x[r + 7 * N + j], x[r + 15 * N + j]
        even = _two_8(a + a_, b + b_, c + c_, d + d_, e + e_, f + f_, g + g_, h + h_)
        odd = _four_8(a - a_, b - b_, c - c_, d - d_, e - e_, f - f_, g - g_, h - h_)
        y[r + j], y[r + N + j] = even[0], odd[0]
        y[r + 2 * N + j], y[r + 3 * N + j] = even[1], odd[1]
        y[r + 4 * N + j], y[r + 5 * N + j] = even[2], odd[2]
        y[r + 6 * N + j], y[r + 7 * N + j] = even[3], odd[3]
        y[r + 8 * N + j], y[r + 9 * N + j] = even[4], odd[4]
        y[r + 10 * N + j], y[r + 11 * N + j] = even[5], odd[5]
        y[r + 12 * N + j], y[r + 13 * N + j] = even[6], odd[6]
        y[r + 14 * N + j], y[r + 15 * N + j] = even[7], odd[7]


@numba.njit(nogil=True)
def _eight(x: Array, y: Array, row: int) -> None:
    """DCT-II along 8 rows."""
    r = row * N
    for j in range(N):
        a, b, c, d = x[r + j], x[r + N + j], x[r + 2 * N + j], x[r + 3 * N + j]
        e, f, g, h = x[r + 4 * N + j], x[r + 5 * N + j], x[r + 6 * N + j], x[r + 7 * N + j]
        even, odd = _two_4(a + h, b + g, c + f, d + e), _four_4(a - h, b - g, c - f, d - e)
        y[r + j], y[r + N + j] = even[0], odd[0]
        y[r + 2 * N + j], y[r + 3 * N + j] = even[1], odd[1]
        y[r + 4 * N + j], y[r + 5 * N + j] = even[2], odd[2]
        y[r + 6 * N + j], y[r + 7 * N + j] = even[3], odd[3]


@numba.njit(nogil=True)
def _two_8(a: Word, b: Word, c: Word, d: Word, e: Word, f: Word, g: Word, h: Word) -> Words:
    """DCT-II."""
    even, odd = _two_4(a + h, b + g, c + f, d + e), _four_4(a - h, b - g, c - f, d - e)
    return even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]


@numba.njit(nogil=True)
def _two_4(a: Word, b: Word, c: Word, d: Word) -> Words:
    p, q, u, v = a + d, b + c, a - d, b - c
    return p + q, u * _COS_1 + v * _COS_3, (p - q) * _ROOT_HALF, u * _COS_3 - v * _COS_1


@numba.njit(nogil=True)
def _four_8(a: Word, b: Word, c: Word, d: Word, e: Word, f: Word, g: Word, h: Word) -> Words:
    """DCT-IV."""
    t = _TURN_8
    u = _two_4(a * t[0] + h * t[4], b * t[1] + g * t[5], c * t[2] + f * t[6], d * t[3] + e * t[7])
    v = _two_4(h * t[0] - a * t[4], b * t[5] - g * t[1], f * t[2] - c * t[6], d * t[7] - e * t[3])
    return u[0], u[1] - v[3], u[1] + v[3], u[2] - v[2], u[2] + v[2], u[3] - v[1], u[3] + v[1], -v[0]


@numba.njit(nogil=True)
def _four_4(a: Word, b: Word, c: Word, d: Word) -> Words:
    t = _TURN_4
    p, q = a * t[0] + d * t[2], b * t[1] + c * t[3]
    u, v = d * t[0] - a * t[2], b * t[3] - c * t[1]
    odd, up = (p - q) * _ROOT_HALF, (u - v) * _ROOT_HALF
    return p + q, odd - up, odd + up, -(u + v)


# ------------------------------------------------------------------------------------------- inverse: exact


@numba.njit(inline="always")
def add_basis(x: Array, index: int, q: Word, basis: Array) -> None:
    """Adds the integer q at coefficient `index` of a group to the group's elements, not scaled yet: chunks
    of 64."""
    c, k = index // N, index % N
    for i in range(N):
        x[c, i] += q * basis[k, i]
