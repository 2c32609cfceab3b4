"""Buffers of models, such as the running statistics of a BatchNorm: a swarm shares parameters only, so that
buffers may not change in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import Tensor, nn

from ...optim.base import canonical_name

INSTEAD: Final = (
    "Take GroupNorm or LayerNorm instead of BatchNorm, or freeze the statistics (a train() that keeps those "
    "layers in eval mode)"
)
"""What whoever has made such a model is told."""


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a model's state has beside its parameters, by canonical names, each once."""
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield canonical_name(f"{module_name}.{name}" if module_name else name), buffer
