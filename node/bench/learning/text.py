"""What is learnt: the built-in text, by a GPT that begins alike for all, from batches by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ....compression.numerics.noise import initial_values
from ....coordinator.protocol.schedule import lr_factor
from ....coordinator.protocol.settings import ScheduleSection
from ....optim.base import Closure
from ... import config
from ...compare.split import Split
from ...tasks.text import TextTask

Weights = dict[str, Tensor]

Schedule = Callable[[int], float]
"""The learning-rate factor of a round, or of a step, from 1 on."""


class Learnt(Protocol):
    """What a method is trained on: `Text`, or `labels.Labels`."""

    @property
    def seed(self) -> int: ...

    def model(self) -> nn.Module: ...

    def batch(self, model: nn.Module, peer: int, number: int) -> Closure: ...

    def loss(self, model: nn.Module) -> float: ...


class Text:
    """The built-in task `text`. Batches and initial values are those of `seed`, whatever the device."""

    def __init__(
        self,
        options: config.Task,
        seed: int,
        base: Weights | None = None,
        device: str = "cpu",
        *,
        split: Split | None = None,
        n_peers: int = 1,
    ) -> None:
        """`base`: initial values, else the exact ones of the seed; `device`: of its models. `split`: how
        uneven the data of so many peers are; None: all draw from the same."""
        self.seed, self._base, self.device = seed, base, device
        self.task = TextTask(options, None)
        if split is None:
            self.task.load(None, self.task.held_out())
            self._tasks = [self.task] * n_peers
            return
        classes = self.task.divide(split.n_sections(n_peers))
        self._tasks = [TextTask(options, None) for _ in range(n_peers)]
        for task, pieces in zip(self._tasks, split.pieces(classes.sizes, n_peers, seed), strict=True):
            task.load(classes.taken(pieces), classes.held_out)
        self.task.load(self.task.corpus(), classes.held_out)

    def model(self) -> nn.Module:
        """A new one on the device, with the initial values, in training mode."""
        model = self.task.model().to(self.device)
        if self._base is not None:
            model.load_state_dict(self._base)
            return model
        with torch.no_grad():
            for i, (name, p) in enumerate(sorted(model.named_parameters())):
                init = self.task.init(name, tuple(p.shape))
                if init.rule == "normal":
                    p.copy_(initial_values(self.seed, i, 0, p.numel(), init.scale).view(p.shape))
                else:
                    p.fill_(1.0 if init.rule == "ones" else 0.0)
        return model

    def batch(self, model: nn.Module, peer: int, number: int) -> Closure:
        """A peer's batch, from 1 on: the same one whatever is trained with it."""
        return self._tasks[peer % len(self._tasks)].draw(model, (self.seed << 40) + (peer << 32) + number)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """On the held-out text, in nats per byte. Leaves the model in evaluation mode."""
        return self.task.evaluate(model.eval())


def constant(_round: int) -> float:
    return 1.0


def linear(n: int) -> Schedule:
    """A warm-up of a twentieth of `n` rounds or steps, and down to a tenth."""
    section = ScheduleSection(name="linear", warmup_rounds=max(1, n // 20), final_factor=0.1)
    return lambda round: lr_factor(section, round, n)
