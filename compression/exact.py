"""The setting in which replicated arithmetic runs (ARCHITECTURE.md, "Exact arithmetic")."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class _Precision:
    """IEEE float32 matrix products while anybody needs them: the setting is one for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._before = ""

    def enter(self) -> None:
        with self._lock:
            if self._n_users == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self._n_users += 1

    def leave(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0:
                torch.set_float32_matmul_precision(self._before)


_precision = _Precision()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, no autocast, IEEE float32 matrix products; restores what was set before.

    `apply`, `decode`, `check` and fingerprints run inside it, whatever the caller's training loop has set.
    """
    _precision.enter()
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        _precision.leave()


def to_float32(x: float) -> float:
    """A host scalar rounded once to float32: computed with + - * / in Python floats, used as a multiplier."""
    return float(np.float32(x))
