"""The demo's char-LM trained by a swarm in one process, and by the plain optimizer to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.replicas import Replica, run_round
from thinwire.compression.numerics.noise import initial_values
from thinwire.coordinator.protocol.schedule import lr_factor
from thinwire.coordinator.protocol.settings import ScheduleSection
from thinwire.node import config
from thinwire.node.tasks.text import TextTask
from thinwire.optim.base import Closure

Weights = dict[str, Tensor]
Schedule = Callable[[int], float]
"""The learning-rate factor of a round, from 1 on."""


class Text:
    """The built-in task `text`; batches, initial values and noise are those of a seed."""

    def __init__(self, options: config.Task, seed: int) -> None:
        self.seed = seed
        self.task = TextTask(options, None)
        self.task.load(None, self.task.held_out())

    def model(self, base: Weights | None = None) -> nn.Module:
        """A new one, with exact initial values or with the given ones."""
        model = self.task.model()
        if base is not None:
            model.load_state_dict(base)
            return model
        with torch.no_grad():
            for i, (name, p) in enumerate(sorted(model.named_parameters())):
                init = self.task.init(name, tuple(p.shape))
                if init.rule == "normal":
                    p.copy_(initial_values(self.seed, i, 0, p.numel(), init.scale).view(p.shape))
                else:
                    p.fill_(1.0 if init.rule == "ones" else 0.0)
        return model

    def batch(self, model: nn.Module, seed: int) -> Closure:
        return self.task.draw(model, seed + (self.seed << 40))

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """On the held-out text, in nats per byte."""
        return self.task.evaluate(model.eval())


def constant(round: int) -> float:
    return 1.0


def linear(n_rounds: int, warmup_rounds: int = 10) -> Schedule:
    """As in the demo."""
    section = ScheduleSection(name="linear", warmup_rounds=warmup_rounds, final_factor=0.1)
    return lambda round: lr_factor(section, round, n_rounds)


def train(
    text: Text,
    strategy: dict[str, Any],
    *,
    n_peers: int,
    n_rounds: int,
    schedule: Schedule = constant,
    base: Weights | None = None,
) -> nn.Module:
    """What a swarm has after its last round. Fails if its replicas differ by a bit."""
    models = [text.model(base) for _ in range(n_peers)]
    replicas = [Replica(strategy, i, m, text.batch, schedule, text.seed) for i, m in enumerate(models)]
    for round_ in range(1, n_rounds + 1):
        run_round(replicas, round_)
    assert len({r.print() for r in replicas}) == 1
    return models[0]


def train_data_parallel(
    text: Text, lr: float, *, n_peers: int, n_rounds: int, schedule: Schedule = constant
) -> nn.Module:
    """torch's AdamW on the mean gradient of the batches that the peers of `train` draw."""
    model = text.model().train()
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for round_ in range(1, n_rounds + 1):
        adamw.param_groups[0]["lr"] = lr * schedule(round_)
        adamw.zero_grad()
        for peer in range(n_peers):
            loss = text.batch(model, 1000 * round_ + 100 * peer + 1)() / n_peers
            loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
    return model
