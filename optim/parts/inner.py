"""The inner optimizer of local training: any of torch's, as a table in a run's config names it.

For example {"name": "AdamW", "betas": [0.9, 0.95]}; learning rate and weight decay are the strategy's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from ...compression.errors import ConfigError, nearest
from ..base import Parameter

REFUSED: Final = {
    "LBFGS": "it evaluates the loss itself",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only",
}


def check_inner(inner: object, weight_decay: float) -> None:
    """Raises ConfigError for anything but a table that names an optimizer of torch's and fits it."""
    if not isinstance(inner, Mapping) or "name" not in inner:
        raise ConfigError(f'inner = {inner!r}: write a table with a name, {{"name": "AdamW"}}')
    name = inner["name"]
    known = {n for n, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer"}
    if name not in known:
        raise ConfigError(f"inner optimizer {name!r}: {nearest(name, known - REFUSED.keys())}")
    if name in REFUSED:
        raise ConfigError(f"inner optimizer {name}: {REFUSED[name]}")
    for key in inner.keys() & {"lr", "weight_decay"}:
        raise ConfigError(f"inner.{key}: {key} is an option of the strategy itself")
    if weight_decay and not _decays(name):
        raise ConfigError(f"inner optimizer {name} has no weight decay: weight_decay = 0 is needed")
    try:
        _kind(name)([torch.zeros(2, 2)], lr=0.1, **_options(inner))
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(f"inner optimizer {name}: {e}") from e


def build_inner(
    inner: Mapping[str, Any],
    parameters: Sequence[Parameter],
    trained: Mapping[str, Tensor],
    lr_factor: float,
    states: Mapping[Tensor, Mapping[str, Any]],
) -> torch.optim.Optimizer:
    """Over `trained` (by parameter name), going on from `states`, which hold what its `state` had before.

    The tensors in `states` are used, not copied, where they are on the parameter's device.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for p in parameters:
        wd = float(p.group["weight_decay"]) if p.decays else 0.0
        groups.setdefault((float(p.group["lr"]) * lr_factor, wd), []).append(trained[p.name])
    name, options = inner["name"], _options(inner)
    optimizer: torch.optim.Optimizer = _kind(name)(
        [
            {"params": tensors, "lr": lr, **({"weight_decay": wd} if _decays(name) else {})}
            for (lr, wd), tensors in groups.items()
        ],
        lr=0.1,  # every group has its own
        **options,
    )
    # torch keeps the number of steps on the CPU, unless a kernel reads it on the device.
    on_device = bool(options.get("capturable") or options.get("fused"))
    for tensor, state in states.items():
        optimizer.state[tensor] = {
            entry: value.to(tensor.device)
            if isinstance(value, Tensor) and (on_device or entry != "step")
            else value
            for entry, value in state.items()
        }
    return optimizer


def _kind(name: str) -> Any:
    return getattr(torch.optim, name)


@cache
def _decays(name: str) -> bool:
    return "weight_decay" in inspect.signature(_kind(name)).parameters


def _options(inner: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and TOML know no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in inner.items() if k != "name"}
