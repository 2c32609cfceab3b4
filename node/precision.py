"""What local work computes in: every node's own choice, nothing of it reaches the replica."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bf16"]
"""auto: `torch.autocast` to bfloat16 on GPUs that have it; bf16: see `mesh.sharded_model`."""


def autocast(precision: Precision, device: torch.device, needs_grad: bool) -> AbstractContextManager[Any]:
    """For a forward pass. Without gradients (spsa) nothing is rounded: its losses differ by less."""
    if precision == "auto" and needs_grad and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
