"""MeZO (arXiv 2305.17333) in plain torch: Gaussian directions, float scalars, the mean over all probes; and
LOZO (arXiv 2410.07698), whose directions are of low rank.

g     = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
theta = theta - lr / n * sum of g z

LOZO: z of a matrix is U V^T with `rank` columns; U is drawn for every probe, V once for `interval` rounds, by
all peers alike. As its program has it; vectors have Gaussian directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from .text import Learnt, Schedule

EPS: Final = 1e-3

Directions = Callable[[int], Tensor]
"""The next direction of a round, from 1 on: flat, as parameters are in `parameters_to_vector`."""


@torch.no_grad()
def train_mezo(
    text: Learnt,
    *,
    lr: float,
    n_peers: int,
    n_rounds: int,
    n_probes: int,
    schedule: Schedule,
    noise: Literal["gauss", "sign"] = "gauss",
    lozo: Lozo | None = None,
) -> nn.Module:
    """Every peer makes `n_probes` of a round, one batch each. `lozo`: its directions in place of `noise`."""
    model = text.model().eval()
    rng = torch.Generator().manual_seed(text.seed)
    theta = nn.utils.parameters_to_vector(model.parameters())
    directions = _plain(len(theta), rng, noise) if lozo is None else lozo.directions(model, rng)

    def loss_at(values: Tensor, peer: int, number: int) -> float:
        nn.utils.vector_to_parameters(values, model.parameters())
        return float(text.batch(model, peer, number)())

    for round_ in range(1, n_rounds + 1):
        step = torch.zeros_like(theta)
        for peer in range(n_peers):
            for number in range((round_ - 1) * n_probes + 1, round_ * n_probes + 1):
                z = directions(round_).to(theta.device)
                up, down = (loss_at(theta + sign * EPS * z, peer, number) for sign in (1, -1))
                step += (up - down) / (2 * EPS) * z
        theta = theta - lr * schedule(round_) / (n_peers * n_probes) * step
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def _plain(n: int, rng: torch.Generator, noise: str) -> Directions:
    def draw(_round: int) -> Tensor:
        z = torch.randn(n, generator=rng)
        return z.sign_() if noise == "sign" else z

    return draw


@dataclass(frozen=True, slots=True)
class Lozo:
    rank: int = 2
    interval: int = 50

    def directions(self, model: nn.Module, rng: torch.Generator) -> Directions:
        shapes = [p.shape for p in model.parameters()]
        begun: dict[int, list[Tensor]] = {}

        def draw(round_: int) -> Tensor:
            first = (round_ - 1) // self.interval
            if first not in begun:
                begun.clear()
                begun[first] = [torch.randn(s[-1], self.rank, generator=rng) for s in shapes]
            found = [self._of(s, v, rng) for s, v in zip(shapes, begun[first], strict=True)]
            return torch.cat([z.reshape(-1) for z in found])

        return draw

    def _of(self, shape: torch.Size, v_NR: Tensor, rng: torch.Generator) -> Tensor:
        if len(shape) < 2:
            return torch.randn(shape, generator=rng)
        u_MR = torch.randn(shape[0], self.rank, generator=rng)
        return u_MR @ v_NR.T
