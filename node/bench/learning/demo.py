"""DeMo (arXiv 2411.19870) in plain torch: the transform in tiles, and training with it.

delta = beta delta + lr grad                    momentum, local
q     = the k largest DCT coefficients of each tile
delta = delta - q
theta = theta - lr sign(mean of q over those that sent a coefficient)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import cos, pi, sqrt

import torch
from torch import Tensor, nn

from .text import Schedule, Text

TILE = 64

Pack = tuple[Tensor, Tensor]
"""int64 indices and float32 values of the coefficients of every tile."""


def train_demo(
    text: Text, *, lr: float, n_peers: int, n_steps: int, schedule: Schedule, k: int = 32, beta: float = 0.999
) -> nn.Module:
    """`schedule`: over steps."""
    model = text.model()
    parameters = list(model.parameters())
    momenta = [[torch.zeros_like(p) for p in parameters] for _ in range(n_peers)]
    for step in range(1, n_steps + 1):
        rate = lr * schedule(step)
        packs: list[list[Pack]] = [[] for _ in parameters]
        for peer, momentum in enumerate(momenta):
            grads = torch.autograd.grad(text.batch(model, peer, step)(), parameters)
            for delta, grad, sent in zip(momentum, grads, packs, strict=True):
                delta.mul_(beta).add_(grad, alpha=rate)
                sent.append(select(delta, k))
                delta.sub_(decode(sent[-1:], delta.shape))
        with torch.no_grad():
            for p, sent in zip(parameters, packs, strict=True):
                p.add_(decode(sent, p.shape).sign_(), alpha=-rate)
    return model


def select(x: Tensor, k: int) -> Pack:
    """The k largest coefficients of every tile of a vector or matrix."""
    coefficients = _tiles(x)
    flat = coefficients.reshape(*coefficients.shape[: x.ndim], -1)
    index = flat.abs().topk(min(k, flat.shape[-1]), dim=-1, sorted=False).indices
    return index, flat.gather(-1, index)


def decode(packs: Sequence[Pack], shape: torch.Size) -> Tensor:
    """The mean of those that sent a coefficient, transformed back."""
    index = torch.cat([i for i, _ in packs], dim=-1)
    value = torch.cat([v for _, v in packs], dim=-1)
    n = [tile_of(size) for size in shape]
    flat = torch.zeros(*index.shape[:-1], n[0] * n[-1] if len(n) == 2 else n[0], device=value.device)
    flat.scatter_reduce_(-1, index, value, reduce="mean", include_self=False)
    return _untiled(flat, shape)


def tile_of(size: int) -> int:
    """The largest divisor up to 64, as DeMo's program has it."""
    return next(n for n in range(min(TILE, size), 0, -1) if size % n == 0)


def _tiles(x: Tensor) -> Tensor:
    if x.ndim == 1:
        n = tile_of(len(x))
        return torch.einsum("yi,ib->yb", x.view(-1, n), cosine_basis(n, x.device))
    rows, columns = x.shape
    m, n = tile_of(rows), tile_of(columns)
    tiles = x.view(rows // m, m, columns // n, n).permute(0, 2, 1, 3)
    return torch.einsum("yxij,ib,jd->yxbd", tiles, cosine_basis(m, x.device), cosine_basis(n, x.device))


def _untiled(flat: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 1:
        basis = cosine_basis(tile_of(shape[0]), flat.device)
        return torch.einsum("yb,ib->yi", flat, basis).reshape(shape)
    m, n = (tile_of(size) for size in shape)
    tiles = flat.view(shape[0] // m, shape[1] // n, m, n)
    bases = cosine_basis(m, flat.device), cosine_basis(n, flat.device)
    return torch.einsum("yxbd,ib,jd->yxij", tiles, *bases).permute(0, 2, 1, 3).reshape(shape)


@cache
def cosine_basis(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal DCT-II: column b is the b-th cosine."""
    rows = [
        [cos(pi * (i + 0.5) * b / n) * sqrt((1 if b == 0 else 2) / n) for b in range(n)] for i in range(n)
    ]
    return torch.tensor(rows, device=device)
