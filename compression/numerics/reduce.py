"""What the exact reductions of all compressors share: weights of a mean, and a sum without an order."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, ldexp
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..exact import to_float32
from ..kernels import use_numba

_WEIGHT_RANGE: Final = (2.0**-40, 2.0**40)
_CHUNK: Final = 1 << 20
_BITS: Final = 40


def mean_weights(weights: Sequence[float]) -> tuple[list[float], float]:
    """The weights as float32 values and 1 / their sum as a float32 value; 0 if all are zero.

    A weight is 0 or in [2^-40, 2^40]: anything else is the caller's mistake, a ValueError.
    """
    rounded = [to_float32(w) for w in weights]
    for w in rounded:
        if not (w == 0 or _WEIGHT_RANGE[0] <= w <= _WEIGHT_RANGE[1]):
            raise ValueError(f"weight {w} is neither 0 nor in [2^-40, 2^40]")
    if not rounded:
        raise ValueError("nothing to decode")
    total = 0.0
    for w in rounded:
        total += w
    return rounded, to_float32(1.0 / total) if total > 0 else 0.0


def l1_norm(values: Tensor) -> float:
    """Sum of |values| of a finite float tensor, the same in any order and on any device.

    Values are rounded to multiples of 2^-40 of the largest one's power of two and added as integers.
    """
    flat = values.detach().reshape(-1)
    if flat.numel() and flat.dtype == torch.float32 and use_numba(flat):
        from ..cpu import reduce_cpu

        return reduce_cpu.l1_norm(flat.contiguous())
    if flat.numel() == 0 or (largest := float(flat.abs().amax())) == 0.0:
        return 0.0
    shift = _BITS - frexp(largest)[1]  # exact, and so is multiplying by a power of two
    total = 0
    for chunk in torch.split(flat, _CHUNK):
        integers = torch.round(chunk.double().abs() * ldexp(1.0, shift))
        total += int(integers.to(torch.int64).sum())
    return float(total) * ldexp(1.0, -shift)


def counted_l1_norms(
    value_SG: npt.NDArray[Any], n_G: npt.NDArray[Any], first_P: npt.NDArray[Any]
) -> list[list[float]]:
    """`l1_norm` of P pieces of each row, in which value g stands n_G[g] times: of piece p those of all rows.
    float32 values as float64; int64. `first_P`: where each piece begins, and the last one ends."""
    n_P = np.diff(first_P)

    def of_pieces(add: np.ufunc, x_SG: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # One more, where an empty piece at the end begins. (`np.pad` is slow.)
        padded = np.zeros((len(x_SG), x_SG.shape[1] + 1), x_SG.dtype)
        padded[:, :-1] = x_SG
        found: npt.NDArray[Any] = add.reduceat(padded, first_P[:-1], axis=1) * (n_P > 0)
        return found

    size_SG = np.abs(value_SG) * (n_G > 0)
    shift_SP = _BITS - np.frexp(of_pieces(np.maximum, size_SG))[1]
    shift_SG = np.repeat(shift_SP, n_P, axis=1)
    integer_SG = np.rint(np.ldexp(size_SG, shift_SG)).astype(np.int64)  # at most 2^40
    high_SP = of_pieces(np.add, (integer_SG >> 20) * n_G)
    low_SP = of_pieces(np.add, (integer_SG & 0xFFFFF) * n_G)
    columns = zip(high_SP.T.tolist(), low_SP.T.tolist(), shift_SP.T.tolist(), strict=True)
    return [
        [float((high << 20) + low) * ldexp(1.0, -shift) for high, low, shift in zip(*column, strict=True)]
        for column in columns
    ]
