"""The setting in which replicated arithmetic runs (ARCHITECTURE.md, "Exact arithmetic")."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Setting:
    """What float32 matrix products compute in, by torch's old name and its new ones. `legacy` is None after a
    mix of both: torch refuses to read the old one then."""

    legacy: str | None
    cuda: str
    mkldnn: str

    @classmethod
    def now(cls) -> _Setting:
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:
            legacy = None
        backends = torch.backends
        return cls(legacy, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]

    def restore(self) -> None:
        """The old name first: setting it sets the new ones, too."""
        if self.legacy is not None:
            torch.set_float32_matmul_precision(self.legacy)
        torch.backends.cuda.matmul.fp32_precision = self.cuda
        torch.backends.mkldnn.matmul.fp32_precision = self.mkldnn  # type: ignore[attr-defined]


class _Precision:
    """IEEE float32 matrix products while anybody needs them: the setting is one for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._before: _Setting | None = None

    def enter(self) -> None:
        with self._lock:
            if self._n_users == 0:
                self._before = _Setting.now()
                torch.set_float32_matmul_precision("highest")
            self._n_users += 1

    def leave(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0 and self._before is not None:
                self._before.restore()


_precision = _Precision()
_here = threading.local()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, no autocast, IEEE float32 matrix products; restores what was set before.

    `apply`, `decode`, `check` and fingerprints run inside it, whatever the caller's training loop has set.
    Within itself it costs nothing.
    """
    if getattr(_here, "is_exact", False):
        yield
        return
    _precision.enter()
    _here.is_exact = True
    try:
        with torch.no_grad(), _without_autocast("cpu"), _without_autocast("cuda"):
            yield
    finally:
        _here.is_exact = False
        _precision.leave()


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """What switches it off takes longer than to see that it is."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def byte_row(t: Tensor) -> Tensor:
    """All of its bytes in order: flat uint8 on its device, in its own memory where that is contiguous.

    torch 2.13 calls a tensor of one element contiguous with any stride, and views it as bytes with 1 only.
    """
    flat = t.detach().contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def to_float32(x: float) -> float:
    """A host scalar rounded once to float32: computed with + - * / in Python floats, used as a multiplier."""
    return float(np.float32(x))


@lru_cache(maxsize=64)
def power(beta: float, t: int) -> float:
    """beta^t as a running product: the same on every machine."""
    product = 1.0
    for _ in range(t):
        product *= beta
        if product < 2.0**-60:  # 1 - product is 1 from here on
            return 0.0
    return product


def root(x: float) -> float:
    """Of a number from 0 on: an integer root is the same on every machine."""
    return isqrt(int(x * 2.0**60)) / float(1 << 30)
