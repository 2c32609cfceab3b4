"""The numba kernel of `gradients`: a momentum decays and takes a gradient in, in one pass."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from ...compression.cpu.threads import share


def decay_and_add(momentum: Tensor, grad: Tensor, decay: float, factor: float) -> None:
    """momentum = decay * momentum + factor * grad. Flat contiguous float32 CPU tensors."""
    y, x = momentum.numpy(), grad.numpy()
    a, b = np.float32(decay), np.float32(factor)
    share(lambda i, j: _decay_and_add(y[i:j], x[i:j], a, b), 0, y.size, smallest=1 << 16)


@numba.njit(cache=True, nogil=True)
def _decay_and_add(y: Any, x: Any, decay: Any, factor: Any) -> None:
    for i in range(y.size):
        y[i] = decay * y[i] + factor * x[i]
