"""What the coordinator tries of a task's model before a run begins: what would stop every node at its first
round, or train something that is neither shared nor saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from ...compression.errors import ConfigError, first_line
from ...optim.base import Closure, canonical_name
from .buffers import INSTEAD, persistent_buffers

log = logging.getLogger("thinwire.coordinator")

_MOST_BYTES: Final = 2**31
"""Of the parameters of a model that the coordinator runs once; of a larger one it looks at the layers."""


def refuse_shared_memory(model: nn.Module) -> None:
    """Raises ConfigError for two parameters over the same memory: what one is set to, the other would be."""
    ends: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in model.named_parameters():
        steps = zip(p.shape, p.stride(), strict=True)
        extent = int(1 + sum((n - 1) * step for n, step in steps)) if p.numel() else 0
        first = int(p.storage_offset()) * p.itemsize
        storage = p.untyped_storage()._cdata
        ends.setdefault(storage, []).append((first, first + extent * p.itemsize, name))
    for pieces in ends.values():
        pieces.sort()
        for (_, stop, name), (first, _, other) in pairwise(pieces):
            if first < stop:
                raise ConfigError(
                    f"the task's model: parameters {name} and {other} share memory (one is a view of the "
                    f"other). Tie them by using one nn.Parameter in both places, or copy one: .clone()"
                )


@dataclass(frozen=True, slots=True)
class Trial:
    """A forward pass of a run's model. `make`: with initial values, on the CPU; `draw`: its first batch, may
    raise anything where the coordinator has no data; `strange`: a parameter that the task makes in another
    type than the run's, in words; `trains`: in training mode, with gradients."""

    make: Callable[[], nn.Module]
    draw: Callable[[nn.Module], Closure]
    strange: str | None
    trains: bool

    def run(self, skeleton: nn.Module) -> None:
        """`skeleton`: the model on the meta device. Raises ConfigError."""
        has_buffers = self.trains and any(True for _ in persistent_buffers(skeleton))
        if not has_buffers and self.strange is None:
            return
        changed = self._changed(skeleton)
        if changed and self.trains:
            raise ConfigError(
                f"the task's model: a forward pass in training changes its buffers {', '.join(changed[:3])}"
                f"{' and more' if len(changed) > 3 else ''}, which this strategy neither shares nor saves. "
                f'{INSTEAD}; strategy "spsa" keeps them frozen by itself'
            )

    def _changed(self, skeleton: nn.Module) -> list[str]:
        n_bytes = sum(p.numel() * p.itemsize for p in skeleton.parameters())
        if n_bytes > _MOST_BYTES:
            return _statistics(skeleton)
        model = self.make()
        try:
            closure = self.draw(model)
        except Exception as e:  # noqa: BLE001 - a task of the user's: it may want data that nodes have
            log.debug("no batch to try the model with: %s", e)
            return _statistics(skeleton)
        before = {name: buffer.clone() for name, buffer in persistent_buffers(model)}
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                model.train(self.trains)
                closure()
        except Exception as e:  # of the user's model: anything
            if self.strange is not None:
                raise ConfigError(f"{self.strange}, and its loss fails: {first_line(e)}") from e
            log.debug("the model could not be tried: %s", e)
            return _statistics(skeleton)
        return [n for n, b in persistent_buffers(model) if n not in before or not _same(b, before[n])]


def _statistics(model: nn.Module) -> list[str]:
    """Buffers of torch's own layers that keep running statistics in training."""
    model.train()
    kinds = (nn.modules.batchnorm._NormBase,)
    return [
        canonical_name(f"{name}.running_mean" if name else "running_mean")
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.running_mean is not None and module.training
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
