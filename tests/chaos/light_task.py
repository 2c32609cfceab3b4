"""A task that costs next to nothing, so that many real nodes fit on two cores: `--task light_task:make`.

A linear map is fitted; `task.layers` x `task.width` outputs and `task.width` inputs give its size. Instead of
computing for long, a batch sleeps for CHAOS_WORK_S seconds, as a node does whose work is done by a GPU.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from thinwire.node import config
from thinwire.node.tasks.base import Init
from thinwire.optim.base import Closure


class LightTask:
    """See `Task`. Mean squared error against the map that reverses its input."""

    def __init__(self, options: config.Task) -> None:
        self.options = options
        self.n_samples = self.n_tokens = options.batch
        self.work_s = float(os.environ.get("CHAOS_WORK_S", "0.05"))

    def model(self) -> nn.Module:
        o = self.options
        return nn.Sequential(nn.Linear(o.width, o.layers * o.width))

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return Init("zeros") if name.endswith("bias") else Init("normal", 0.02)

    def held_out(self) -> bytes:
        return b"chaos"

    def corpus(self) -> bytes | None:
        return None

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        assert held_out == b"chaos"

    def draw(self, model: nn.Module, seed: int) -> Closure:
        x_BI = self._batch(seed)

        def closure() -> Tensor:
            time.sleep(self.work_s)
            return _loss(model, x_BI)

        return closure

    def evaluate(self, model: nn.Module) -> float:
        return float(_loss(model, self._batch(0)))

    def _batch(self, seed: int) -> Tensor:
        rng = np.random.Generator(np.random.Philox(key=seed))
        shape = (self.options.batch, self.options.width)
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _loss(model: nn.Module, x_BI: Tensor) -> Tensor:
    y_BO = model(x_BI)
    target_BO = x_BI.flip(1).repeat(1, y_BO.shape[1] // x_BI.shape[1])
    return (y_BO - target_BO).square().mean()


def make(options: config.Task, data: Path | None) -> LightTask:
    return LightTask(options)
