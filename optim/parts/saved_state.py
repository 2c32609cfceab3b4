"""A strategy's state as it is saved and restored: dtypes and containers as they are, bit for bit.

torch's `load_state_dict` would cast every tensor to the dtype of its parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compression.errors import ConfigError


def refuse_other_model(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError unless both lists of parameter groups have the same names in the same order."""
    theirs = [name for group in saved for name in group["param_names"]]
    ours = [name for group in own for name in group["param_names"]]
    if theirs != ours:
        strange = sorted(set(theirs) ^ set(ours))[:3] or "the same names in another order"
        raise ConfigError(f"the state of another model: {strange}")


def restored(value: Any, device: torch.device) -> Any:
    """A deep copy: `device` for tensors here, the CPU for those further down."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    cpu = torch.device("cpu")
    if isinstance(value, dict):
        return {k: restored(v, cpu) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(restored(v, cpu) for v in value)
    return value
