"""The setting in which replicated arithmetic runs (design: section 6, "Context")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, no autocast, IEEE float32 matrix products; restores what was set before.

    `apply`, `decode`, `check` and fingerprints run inside it, whatever the caller's training loop has set.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def to_float32(x: float) -> float:
    """A host scalar rounded once to float32: computed with + - * / in Python floats, used as a multiplier."""
    return float(np.float32(x))
