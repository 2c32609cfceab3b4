"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) on replicated moments: exact
(ARCHITECTURE.md, "Exact arithmetic").

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g g
    theta = theta (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

One rounding per operation. Scalars are Python floats, rounded once to float32; beta^t is a running product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ...compression.exact import power, to_float32

ENTRIES: Final = ("moment1", "moment2", "updates")
"""Of the replicated state of a parameter; `updates` is t, a 0-d float32: exact up to 2^24, by when all
corrections are 1."""


@dataclass(frozen=True, slots=True)
class AdamW:
    """The rule's settings."""

    beta1: float
    beta2: float
    eps: float

    def new_state(self, theta: Tensor) -> dict[str, Tensor]:
        """Zero, for a parameter of any shape: the moments have it too."""
        state = {entry: torch.zeros(theta.shape, device=theta.device) for entry in ENTRIES[:2]}
        return {**state, "updates": torch.zeros(())}

    def step(self, state: dict[str, Tensor], g: Tensor, lr: float) -> Tensor:
        """Within `exact_arithmetic`: moves the state on by `g` (flat float32, overwritten).

        Returns what is to be subtracted from theta, flat float32.
        """
        m, v = state["moment1"].view(-1), state["moment2"].view(-1)
        t = int(state["updates"].add_(1.0))
        m.mul_(to_float32(self.beta1)).add_(g * to_float32(1.0 - self.beta1))
        v.mul_(to_float32(self.beta2)).add_(g.mul_(g).mul_(to_float32(1.0 - self.beta2)))
        correction1 = 1.0 - power(self.beta1, t)
        correction2 = 1.0 - power(self.beta2, t)
        # In float32 torch's own root is wrong in the last bit for some inputs; by way of float64 it never is.
        root = (v * to_float32(1.0 / correction2)).double().sqrt_().float()
        return (m * to_float32(lr / correction1)).div_(root.add_(to_float32(self.eps)))
