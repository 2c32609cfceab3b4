"""The inner optimizer of local training: any of torch's, Lion or ScheduleFree, as a table in a run's config
names it.

For example {"name": "AdamW", "betas": [0.9, 0.95]}; learning rate and weight decay are the strategy's own. A
name alone, "muon", means the table with that name. Muon is two of them, see `muon`; for ScheduleFree see
`schedule_free`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from ...compression.errors import ConfigError, nearest
from ..base import Parameter
from ..parts.ranks import Ranks
from .muon import NAME as MUON
from .muon import check_muon, is_muons, muon_options, muon_step
from .schedule_free import NAME as SCHEDULE_FREE
from .schedule_free import schedule_free_step

REFUSED: Final = {
    "LBFGS": "it evaluates the loss itself",
    "SparseAdam": "it takes sparse gradients only",
}


_FUSED: Final = frozenset({"Adam", "AdamW"})
"""torch has a kernel for the CPU that takes a third of the time, but does not take it by itself."""

_WAYS: Final = frozenset({"fused", "foreach", "capturable", "differentiable"})
"""Options that say how to compute."""

LIBRARIES: Final = {
    "Lion": ("lion_pytorch", "Lion"),
    SCHEDULE_FREE: ("schedulefree", "AdamWScheduleFree"),
}
"""Optimizers from optional packages, with the module and the class of each: Lion (arXiv 2302.06675)."""

OF_FIXED_RATES: Final = {
    "Lion": ("decoupled_weight_decay", "use_triton"),
    SCHEDULE_FREE: ("warmup_steps",),
}
"""Options that are not taken: they go by the rate that an optimizer was made with, or have one device."""


_STATE_BYTES: Final = {"adamw": 8.0, "muon": 4.0, "lion": 4.0, "schedulefree": 12.0}


def state_bytes(inner: str | Mapping[str, Any]) -> float:
    """Of the optimizer, for each parameter; 0 of those that are not known here, at the least."""
    name = inner if isinstance(inner, str) else inner["name"]
    return _STATE_BYTES.get(str(name).lower(), 0.0)


def inner_table(inner: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The table that is meant; names alone may be written in any case."""
    if not isinstance(inner, str):
        return inner
    return {"name": {name.lower(): name for name in _known()}.get(inner.lower(), inner)}


def check_inner(inner: object, weight_decay: float) -> None:
    """Raises ConfigError for anything but the name of an optimizer of torch's, or a table that names one and
    fits it."""
    if isinstance(inner, str):
        inner = inner_table(inner)
    if not isinstance(inner, Mapping) or "name" not in inner:
        raise ConfigError(f'inner = {inner!r}: write a name, or a table with a name, {{"name": "AdamW"}}')
    name, known = inner["name"], _known()
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"inner optimizer {name!r}: {nearest(name, known - REFUSED.keys())}")
    if name in REFUSED:
        raise ConfigError(f"inner optimizer {name}: {REFUSED[name]}")
    for key in inner.keys() & set(OF_FIXED_RATES.get(name, ())):
        raise ConfigError(f"inner.{key}: leave it out, rates follow the run's schedule and any device")
    for key in inner.keys() & {"lr", "weight_decay"}:
        raise ConfigError(f"inner.{key}: {key} is an option of the strategy itself")
    if weight_decay and not _decays(name):
        raise ConfigError(f"inner optimizer {name} has no weight decay: weight_decay = 0 is needed")
    try:
        if name == MUON:
            check_muon(inner)
        else:
            _kind(name)([torch.zeros(2, 2)], lr=0.1, **_options(inner))
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as e:
        raise ConfigError(f"inner optimizer {name}: {e}") from e


def inner_step(
    inner: Mapping[str, Any],
    parameters: Sequence[Parameter],
    trained: Mapping[str, Tensor],
    lr_factor: float,
    states: Mapping[Tensor, Mapping[str, Any]],
    ranks: Ranks,
) -> dict[Tensor, dict[str, Any]]:
    """One step of `trained` (by parameter name) by their `grad`, going on from `states`, which hold what the
    optimizer's `state` had before. Returns what it has then.

    The tensors in `states` are used, not copied, where they are on the parameter's device.
    """
    if inner["name"] == SCHEDULE_FREE:
        kind = _kind(SCHEDULE_FREE)
        return schedule_free_step(kind, _options(inner), parameters, trained, lr_factor, states)
    if inner["name"] != MUON:
        optimizer = _build(inner, parameters, trained, lr_factor, states)
        optimizer.step()
        return {tensor: dict(optimizer.state[tensor]) for tensor in trained.values()}
    hidden = [p for p in parameters if is_muons(inner, p)]
    rest = [p for p in parameters if not is_muons(inner, p)]
    found = muon_step(inner, hidden, trained, lr_factor, states, ranks)
    if rest:
        adamw = {"name": "AdamW", "betas": muon_options(inner)["betas"]}
        own = {p.name: trained[p.name] for p in rest}
        kept = {t: states[t] for t in own.values()}
        found |= inner_step(adamw, rest, own, lr_factor, kept, ranks)
    return found


def _build(
    inner: Mapping[str, Any],
    parameters: Sequence[Parameter],
    trained: Mapping[str, Tensor],
    lr_factor: float,
    states: Mapping[Tensor, Mapping[str, Any]],
) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for p in parameters:
        wd = float(p.group["weight_decay"]) if p.decays else 0.0
        groups.setdefault((float(p.group["lr"]) * lr_factor, wd), []).append(trained[p.name])
    name, options = inner["name"], _options(inner)
    if (
        name in _FUSED
        and not options.keys() & _WAYS
        and all(t.device.type == "cpu" for t in trained.values())
    ):
        options["fused"] = True
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


@cache
def _known() -> frozenset[str]:
    return (
        frozenset(n for n, kind in vars(torch.optim).items() if isinstance(kind, type)) - {"Optimizer"}
        | LIBRARIES.keys()
    )


def _kind(name: str) -> Any:
    """Raises ConfigError: its package is not there."""
    if name not in LIBRARIES:
        return getattr(torch.optim, name)
    module, cls = LIBRARIES[name]
    try:
        return getattr(import_module(module), cls)
    except ImportError as e:
        raise ConfigError(
            f"inner optimizer {name} needs a package on every node ({e}): "
            f"pip install 'thinwire[{name.lower()}]'"
        ) from e


@cache
def _decays(name: str) -> bool:
    return "weight_decay" in inspect.signature(_kind(name)).parameters


def _options(inner: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and TOML know no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in inner.items() if k != "name"}
