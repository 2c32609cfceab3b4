"""The cosine transform: forward in floating point, inverse in integers.

The inverse decides what every replica adds to its parameters, so it must not depend on the device or on the
order of a sum. Coefficients become integers of at most 10 bits per group (a power of two scales them), the
basis has entries of at most 7 bits and a sign, and 64 products of those stay below 2^24: a float32 matrix
product holds every partial sum exactly. The result is 0.3% off the real transform. In two dimensions the sums
along one axis become integers of 10 bits again before the product along the other.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import torch
from torch import Tensor

from ..exact import to_float32

N: Final = 64
"""Points of the transform: elements of a chunk."""

SIDES: Final = (8, 16, 32, 64)
"""Points along each axis of a transform in two dimensions."""

# 127 cos(pi m / 128) for m = 0..64, rounded. A table, because libraries differ in the last bit of cos.
_COS: Final = (
    127,
    127,
    127,
    127,
    126,
    126,
    126,
    125,
    125,
    124,
    123,
    122,
    122,
    121,
    120,
    118,
    117,
    116,
    115,
    113,
    112,
    111,
    109,
    107,
    106,
    104,
    102,
    100,
    98,
    96,
    94,
    92,
    90,
    88,
    85,
    83,
    81,
    78,
    76,
    73,
    71,
    68,
    65,
    63,
    60,
    57,
    54,
    51,
    49,
    46,
    43,
    40,
    37,
    34,
    31,
    28,
    25,
    22,
    19,
    16,
    12,
    9,
    6,
    3,
    0,
)
_COS_QUARTER_PI: Final = 90  # 127 / sqrt(2): the constant row of the orthonormal transform

INVERSE_SCALE: Final = 0.0013919424964115024  # float32 of sqrt(2 / 64) / 127: makes the integer basis real

ROUNDER: Final = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to even
TOP_BIT: Final = 9  # the largest coefficient of a group is brought to [2^9, 2^10]
SMALLEST: Final = 27  # biased exponent of 2^-100: groups below it count as zero


@cache
def integer_basis(device: torch.device, n: int = N) -> Tensor:
    """float32 (n, n) of integers: row k is 127 / sqrt(2 / n) times the k-th orthonormal DCT-II vector."""
    step = N // n
    rows = [[_COS_QUARTER_PI] * n]
    rows += [[_cos(step * k * (2 * i + 1)) for i in range(n)] for k in range(1, n)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _cos(m: int) -> int:
    """127 cos(pi m / 128), rounded."""
    m %= 256
    m = min(m, 256 - m)  # cos is even around pi
    return _COS[m] if m <= 64 else -_COS[128 - m]


@cache
def real_basis(device: torch.device, n: int = N) -> Tensor:
    """float32 (n, n): the orthonormal DCT-II, one vector per row. For local work only."""
    rows = [
        [
            math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * k * (2 * i + 1) / (2 * n))
            for i in range(n)
        ]
        for k in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def forward(x: Tensor) -> Tensor:
    """Coefficients of each chunk of 64 elements of the last axis (a multiple of 64 long). Local, inexact."""
    return (x.reshape(-1, N) @ real_basis(x.device).T).view(x.shape)


def forward_2d(x: Tensor, n: int) -> Tensor:
    """Coefficients of tiles (tiles, n * n), along both axes. Local, inexact."""
    basis = real_basis(x.device, n)
    return (basis @ x.view(-1, n, n) @ basis.T).view(x.shape)


def inverse_exact(coefficients: Tensor) -> Tensor:
    """Exact inverse per group: float32 (groups, multiple of 64), below 2^100, to the same shape.

    Runs inside `exact_arithmetic`. Never returns -0.
    """
    integers, down = _to_integers(coefficients)
    x = (integers.view(-1, N) @ integer_basis(coefficients.device)).view(coefficients.shape)
    return x.mul_(down).mul_(INVERSE_SCALE).add_(0.0)


def inverse_exact_2d(coefficients: Tensor, n: int) -> Tensor:
    """Exact inverse of each tile along both axes: float32 (tiles, n * n), below 2^100, to the same shape.

    Runs inside `exact_arithmetic`. Never returns -0.
    """
    basis = integer_basis(coefficients.device, n)
    integers, down = _to_integers(coefficients)
    half, half_down = _to_integers((integers.view(-1, n) @ basis).view(coefficients.shape))
    columns = half.view(-1, n, n).transpose(1, 2).reshape(-1, n)
    x = (columns @ basis).view(-1, n, n).transpose(1, 2).reshape(coefficients.shape)
    # In this order nothing overflows: sums are below 2^24, `half_down` at most 2^14.
    scale = to_float32(2.0 / (n * 127.0 * 127.0))
    return x.mul_(half_down).mul_(scale).mul_(down).add_(0.0)


def _to_integers(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of at most 2^10, rounded to even, and per group the power of two that takes them back."""
    # biased, from the bits: log2 is inexact
    exponents = coefficients.abs().amax(dim=1).view(torch.int32) >> 23
    up = _power_of_two(254 + TOP_BIT - exponents, exponents)
    down = _power_of_two(exponents - TOP_BIT, exponents)
    integers = coefficients * up
    return integers.add_(ROUNDER).sub_(ROUNDER), down


def _power_of_two(biased: Tensor, exponents: Tensor) -> Tensor:
    """float32 (groups, 1) with this biased exponent; 0 for groups that count as zero."""
    return torch.where(exponents >= SMALLEST, biased << 23, 0).view(torch.float32)[:, None]
