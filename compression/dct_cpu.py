"""The cosine transform inside numba kernels; see `dct` for the definition.

Forward, for local work: 64 chunks at a time, as the columns of a panel, so that every operation is one on
rows of 64 floats. Sums and differences of opposite rows halve the problem; the differences take a small dense
product each: a third of the operations of one dense product of 64 x 64, and as accurate.

Inverse, exact: from the coefficients that are not zero alone. They and the basis are integers whose sums stay
below 2^24, so the order does not matter.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numba
import numpy as np
import torch

from thinwire.compression.dct import N, integer_basis

PANEL: Final = N * N
"""Floats of a panel: element or coefficient i of column c stands at i * 64 + c."""

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_EIGHTH: Final = np.float32(0.125)


def _products() -> np.ndarray[Any, Any]:
    """The dense products one after another: 32 x 32, 16 x 16, ..., 1 x 1. A level has its differences in
    reversed order, and so are the columns here."""
    rows = []
    half = N // 2
    while half:
        for k in range(half):
            angles = [math.pi * (2 * k + 1) * (2 * i + 1) / (4 * half) for i in reversed(range(half))]
            rows += [math.sqrt(2 / N) * math.cos(a) for a in angles]
        half //= 2
    return np.array(rows, dtype=np.float32)


PRODUCTS: Final = _products()
INTEGER_BASIS: Final = integer_basis(torch.device("cpu")).numpy().reshape(-1).copy()


@numba.njit(inline="always")
def forward(x: Array, y: Array, at: int, products: Array) -> None:
    """The coefficients of the panel of x at `at`, which is overwritten, to the same place of y. Local."""
    table = 0
    half = N // 2
    while half:
        for i in range(half):
            up, down = at + i * N, at + (2 * half - 1 - i) * N
            for j in range(N):
                a, b = x[up + j], x[down + j]
                x[up + j] = a + b
                x[down + j] = a - b
        stride = N // (2 * half)
        for k in range(half):
            _product(x, at + half * N, y, at + (2 * k + 1) * stride * N, products, table + k * half, half)
        table += half * half
        half //= 2
    for j in range(N):
        y[at + j] = x[at + j] * _EIGHTH


@numba.njit(inline="always")
def _product(x: Array, rows: int, y: Array, to: int, products: Array, t: int, n: int) -> None:
    """Row `to` of y = the sum over n rows of x, each times its factor."""
    if n < 8:
        for j in range(N):
            y[to + j] = products[t] * x[rows + j]
        for i in range(1, n):
            for j in range(N):
                y[to + j] += products[t + i] * x[rows + i * N + j]
        return
    for j in range(N):
        y[to + j] = 0
    for i in range(0, n, 8):
        f0, f1, f2, f3 = products[t + i], products[t + i + 1], products[t + i + 2], products[t + i + 3]
        f4, f5, f6, f7 = products[t + i + 4], products[t + i + 5], products[t + i + 6], products[t + i + 7]
        r = rows + i * N
        for j in range(N):
            even = f0 * x[r + j] + f2 * x[r + 2 * N + j] + (f4 * x[r + 4 * N + j] + f6 * x[r + 6 * N + j])
            odd = f1 * x[r + N + j] + f3 * x[r + 3 * N + j] + (f5 * x[r + 5 * N + j] + f7 * x[r + 7 * N + j])
            y[to + j] += even + odd


@numba.njit(inline="always")
def add_basis(out: Array, index: int, q: Word, basis: Array) -> None:
    """Adds the integer q at coefficient `index` of a group to the group's elements, not scaled yet."""
    to = (index // N) * N
    row = (index - to) * N
    for i in range(N):
        out[to + i] += q * basis[row + i]
