"""The numba kernels of DiLoCo's outer step and of what a peer sends: one pass each, with the same bits."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from ...compression.cpu.threads import share


def outer_step(theta: Tensor, momentum: Tensor, step: Tensor, mu: float, lr: float, nesterov: bool) -> None:
    """momentum = mu momentum + step; theta -= lr (step + mu momentum), or lr momentum. One rounding per
    operation. Flat contiguous float32 CPU tensors of one length; factors are float32 values."""
    y, m, x = (t.detach().numpy() for t in (theta, momentum, step))
    factors = np.float32(mu), np.float32(lr)
    share(lambda a, b: _step(y[a:b], m[a:b], x[a:b], *factors, nesterov), 0, y.size, smallest=1 << 16)


def add_moved(residual: Tensor, outer: Tensor, inner: Tensor, decay: float) -> None:
    """residual = decay residual + (outer - inner). One rounding per operation. Flat contiguous float32 CPU
    tensors of one length."""
    e, x, y = (t.detach().numpy() for t in (residual, outer, inner))
    share(lambda a, b: _add_moved(e[a:b], x[a:b], y[a:b], np.float32(decay)), 0, e.size, smallest=1 << 16)


@numba.njit(cache=True, nogil=True)
def _add_moved(e: Any, x: Any, y: Any, decay: Any) -> None:
    for i in range(e.size):
        e[i] = e[i] * decay + (x[i] - y[i])


@numba.njit(cache=True, nogil=True)
def _step(y: Any, m: Any, x: Any, mu: Any, lr: Any, nesterov: bool) -> None:
    if nesterov:
        for i in range(y.size):
            m[i] = m[i] * mu + x[i]
            y[i] -= (x[i] + m[i] * mu) * lr
    else:
        for i in range(y.size):
            m[i] = m[i] * mu + x[i]
            y[i] -= m[i] * lr
