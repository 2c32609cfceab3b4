"""Schedule-Free AdamW (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682), by its authors' package.

Gradients are taken at y = (1 - beta1) z + beta1 x, where z makes the steps and x is their average over all of
training: what a peer has learnt is x. So a phase ends at x (`to_average`), and the next one sets out from y
(`to_gradients`). What is kept of z is z - y: it stays right when a round moves the parameters.

Of each tensor: `exp_avg_sq`, `offset` (z - y), `is_average` (the tensor holds x), and what the package keeps
of a group of them: `k` steps so far, `weight_sum`, `lr_max`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..base import Parameter

NAME: Final = "ScheduleFree"

_OF_GROUPS: Final = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
"""At the first step."""


def schedule_free_step(
    kind: Any,
    options: Mapping[str, Any],
    parameters: Sequence[Parameter],
    trained: Mapping[str, Tensor],
    lr_factor: float,
    states: Mapping[Tensor, Mapping[str, Any]],
) -> dict[Tensor, dict[str, Any]]:
    """As `inner_step`. `kind`: the package's optimizer; `options`: its own."""
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in parameters:
        tensor, wd = trained[p.name], float(p.group["weight_decay"]) if p.decays else 0.0
        so_far = (states[tensor].get(name, first) for name, first in _OF_GROUPS.items())
        groups.setdefault((float(p.group["lr"]) * lr_factor, wd, *so_far), []).append(tensor)
    made = [
        {"params": tensors, "lr": lr, "weight_decay": wd, "train_mode": True}
        | dict(zip(_OF_GROUPS, so_far, strict=True))
        for (lr, wd, *so_far), tensors in groups.items()
    ]
    optimizer: torch.optim.Optimizer = kind(made, **options)
    for tensor, state in states.items():
        if state:
            squares, offset = (state[name].to(tensor.device) for name in ("exp_avg_sq", "offset"))
            optimizer.state[tensor] = {"exp_avg_sq": squares, "z": offset.add_(tensor)}
    optimizer.step()
    return {
        tensor: {
            "exp_avg_sq": optimizer.state[tensor]["exp_avg_sq"],
            "offset": optimizer.state[tensor]["z"].sub_(tensor),
            "is_average": False,
            **{name: group[name] for name in _OF_GROUPS},
        }
        for group in optimizer.param_groups
        for tensor in group["params"]
    }


def to_average(inner: Mapping[str, Any], trained: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
    """From y to x, of tensors and what is kept of each."""
    _move(inner, trained, is_average=True)


def to_gradients(inner: Mapping[str, Any], trained: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
    """From x to y."""
    _move(inner, trained, is_average=False)


def _move(
    inner: Mapping[str, Any], trained: Iterable[tuple[Tensor, dict[str, Any]]], is_average: bool
) -> None:
    far = 1.0 - 1.0 / inner.get("betas", (0.9, 0.999))[0]  # x - y, of z - y
    for tensor, state in trained:
        if state.get("is_average", is_average) != is_average:
            tensor.add_(state["offset"].to(tensor.device), alpha=far if is_average else -far)
            state["is_average"] = is_average
