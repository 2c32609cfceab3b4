"""MeZO (arXiv 2305.17333) in plain torch: Gaussian directions, float scalars, the mean over all probes.

g     = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
theta = theta - lr / n * sum of g z
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .text import Schedule, Text


@torch.no_grad()
def train_mezo(
    text: Text,
    *,
    lr: float,
    n_peers: int,
    n_rounds: int,
    n_probes: int,
    schedule: Schedule,
    eps: float = 1e-3,
) -> nn.Module:
    """Every peer makes `n_probes` of a round, one batch each."""
    model = text.model().eval()
    rng = torch.Generator().manual_seed(text.seed)
    theta = nn.utils.parameters_to_vector(model.parameters())

    def loss_at(values: Tensor, peer: int, number: int) -> float:
        nn.utils.vector_to_parameters(values, model.parameters())
        return float(text.batch(model, peer, number)())

    for round_ in range(1, n_rounds + 1):
        step = torch.zeros_like(theta)
        for peer in range(n_peers):
            for number in range((round_ - 1) * n_probes + 1, round_ * n_probes + 1):
                z = torch.randn(len(theta), generator=rng).to(theta.device)
                up, down = (loss_at(theta + sign * eps * z, peer, number) for sign in (1, -1))
                step += (up - down) / (2 * eps) * z
        theta = theta - lr * schedule(round_) / (n_peers * n_probes) * step
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model
