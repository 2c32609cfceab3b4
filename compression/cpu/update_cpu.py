"""What decoded values do to a target, for flat groups and tiles alike: the means that are decoded, and the
step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np

from ..base import Step
from ..codecs.tiles import Tiles

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""


ZERO: Final = np.float32(0.0)
POWERS: Final = (np.arange(256, dtype=np.uint32) << np.uint32(23)).view(np.float32)  # by biased exponent


PLAIN, VALUES, SIGNS = range(3)  # what becomes of decoded values


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean of W packs. Their entries stand one after another; group g of pack w has
    [offset_WG[w, g], offset_WG[w, g + 1])."""

    position_E: Array  # int64: group * coefficients of a full group + index
    value_E: Array  # float32
    offset_WG: Array  # int64
    weight_W: Array  # float32
    inverse: Word  # float32: 1 / the sum of the weights
    n: int  # elements of the parameter
    size: int  # of a full group
    n_coefficients: int  # of a full group
    transforms: bool
    tiles: Tiles | None  # instead of flat groups


def how_of(step: Step) -> int:
    """How kernels name what becomes of decoded values."""
    return SIGNS if step.sign else VALUES


@numba.njit(inline="always")
def finish(y: Array, x: Array, how: int, decay: Word, scale: Word) -> None:
    """From decoded values to the target, one rounding per operation. Adding 0 makes 0 of -0."""
    if how == PLAIN:
        for i in range(y.size):
            y[i] = x[i] + ZERO
    elif how == VALUES:
        for i in range(y.size):
            y[i] = y[i] * decay - (x[i] + ZERO) * scale
    else:
        for i in range(y.size):
            sign = np.float32(x[i] > ZERO) - np.float32(x[i] < ZERO)
            y[i] = y[i] * decay - sign * scale
