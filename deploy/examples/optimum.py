"""Strongly convex losses with a known optimum, one of each peer: least squares on data that differ.

    cd deploy/examples
    thinwire coordinator optimum.toml --task optimum:make
    PART=0 thinwire join TICKET --task optimum:make          and so with PART=1, 2 and 3

Nobody has the others' data, and no mean of the peers' own optima is the optimum of all. "Loss" is the
distance from it: `thinwire status` has that of the peers' own models, and the last round's merge is theirs.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.tasks.base import Init, device_of
from thinwire.optim.api import Closure

PARTS, ROWS, WIDTH = 4, 64, 10
MU, SMOOTHNESS = 0.25, 4.0
"""Of every part's loss: optimum.toml says the same."""


def part_of(number: int) -> tuple[Tensor, Tensor]:
    """A (ROWS, WIDTH) and b (ROWS): the curvatures of |A x - b|^2 / 2 are from MU to SMOOTHNESS."""
    generator = torch.Generator().manual_seed(number)
    q_RW, _ = torch.linalg.qr(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64))
    v_WW, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    a_RW = q_RW @ torch.linspace(MU, SMOOTHNESS, WIDTH, dtype=torch.float64).sqrt().diag() @ v_WW
    return a_RW, a_RW @ (3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))


def optimum() -> Tensor:
    """Of the sum of all parts' losses."""
    parts = [part_of(number) for number in range(PARTS)]
    left_WW = torch.stack([a.T @ a for a, _ in parts]).sum(0)
    return torch.linalg.solve(left_WW, torch.stack([a.T @ b for a, b in parts]).sum(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(WIDTH))


class Optimum:
    """See `Task`."""

    loss_unit = "from the optimum"
    n_samples = n_tokens = ROWS

    def __init__(self, part: int) -> None:
        self._a_RW, self._b_R = (t.float() for t in part_of(part))
        self._best_W = optimum().float()

    def model(self) -> nn.Module:
        return Net()

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return Init("zeros")

    def held_out(self) -> bytes:
        return b"nothing but the optimum, which everybody can compute"

    def corpus(self) -> None:
        return None

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        pass

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        """The same in every round: all of the part."""
        a_RW, b_R = (t.to(device_of(model)) for t in (self._a_RW, self._b_R))
        return lambda: (a_RW @ model.x - b_R).square().sum() / 2

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        return float((model.x - self._best_W.to(device_of(model))).norm())


def make(options: config.Task, data: Path | None) -> Optimum:
    """What `--task optimum:make` calls."""
    part = os.environ.get("PART", "0")
    if data is not None or part not in map(str, range(PARTS)):
        raise ConfigError(f"PART={part}: from 0 to {PARTS - 1}, and no --data: each peer has one part")
    return Optimum(int(part))
