"""Noise on what peers learn, correlated between those that mix (DECOR, arXiv 2405.01031; CorN-DSGD): it hides
each peer's part, and most of it is gone from the mean.

What the local steps of a round move x_i by is cut to a length C, L2, and

    x_i += C (sqrt(a) u_i + sqrt(a rho) sum over neighbours j of +- v_ij)

with u_i of its own and v_ij of the pair, the same for both but for the sign, from a secret that both have: no
byte of it is sent. Over the peers the noise has the covariance R = a (I + rho Lap), and to everybody else a
round says as much of peer i as Gaussian noise of standard deviation 1 / sqrt((R^-1)_ii) would let through. a
is such that this is `noise` at least, for all, and rho such that tr(W R W^T) is the least, what is left after
mixing with W; at most `_MOST`, as where a partner is lost its half of v_ij stays.

CorN's own optimum, R like |W|^-1, cannot be had from pairs: on a ring the other entries of a row are together
more than the one of the diagonal.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Final

import numpy as np
import torch
from blake3 import blake3

from ...compression.errors import ConfigError
from ..base import Parameter
from .topology import Edge, mixing_weight

_MOST: Final = 16.0
_RATIOS: Final = (0.0, *(2.0**k for k in range(-6, 5)))

Secret = Callable[[str], bytes]
"""Of this peer and that one."""


@lru_cache(maxsize=64)
def amounts(edges: tuple[Edge, ...], n_peers: int, weights: tuple[float, ...]) -> tuple[float, float]:
    """a and a rho for `noise` 1. `weights`: of the edges in W; 1 / n_peers of all pairs, in a merge."""
    laplacian, mixing = np.zeros((n_peers, n_peers)), np.eye(n_peers)
    for (i, j), weight in zip(edges, weights, strict=True):
        for matrix, x in ((laplacian, 1.0), (mixing, -weight)):
            matrix[[i, j], [i, j]] += x
            matrix[[i, j], [j, i]] -= x
    lambdas, vectors = np.linalg.eigh(laplacian)
    own, paired = np.trace(mixing @ mixing.T), np.trace(mixing @ laplacian @ mixing.T)

    def found(rho: float) -> tuple[float, float, float]:
        a = float((vectors**2 / (1 + rho * lambdas)).sum(axis=1).max())
        return a * float(own + rho * paired), a, a * rho

    return min(map(found, _RATIOS))[1:]


def mixing_weights(edges: Sequence[Edge], *, in_pairs: bool) -> tuple[float, ...]:
    return tuple(0.5 if in_pairs else mixing_weight(edges, i, j) for i, j in edges)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Of a round. `edges`: by places among `names`, of which this peer is one, or there are no pairs for it;
    `weights`: of the edges in W."""

    me: str
    names: Sequence[str]
    edges: Sequence[Edge]
    weights: tuple[float, ...]

    def amounts(self) -> tuple[float, float]:
        if self.me not in self.names:
            return 1.0, 0.0
        return amounts(tuple(self.edges), len(self.names), self.weights)

    def partners(self) -> list[str]:
        both = [(self.names[i], self.names[j]) for i, j in self.edges]
        return [b if a == self.me else a for a, b in both if self.me in (a, b)]


class PrivateSteps:
    """Of one peer. `clip`: C; `noise`: see the module's docstring."""

    def __init__(self, parameters: Sequence[Parameter], clip: float, noise: float) -> None:
        self._parameters, self._clip, self._noise = parameters, clip, noise
        self._before: list[torch.Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Before the local steps: the model has x_i."""
        self._before = [p.local.clone() for p in self._parameters]

    @torch.no_grad()
    def end(self, pairs: Pairs, secret: Secret, round_: int) -> None:
        """After them. Raises ConfigError: they had no beginning."""
        if not self._before:
            raise ConfigError("privacy is of whole rounds: step(closure), not gradients that are in place")
        moved = [p.local - before for p, before in zip(self._parameters, self._before, strict=True)]
        length = sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in moved))
        kept = min(1.0, self._clip / length) if length else 1.0
        for p, before, change in zip(self._parameters, self._before, moved, strict=True):
            p.local.copy_(before + change * kept)
        self._before = []
        own, paired = pairs.amounts()
        self._add(sqrt(own), secrets.randbits(63))
        for other in pairs.partners():
            seed = blake3(secret(other) + round_.to_bytes(8, "little")).digest(8)
            sign = 1.0 if pairs.me < other else -1.0
            self._add(sign * sqrt(paired), int.from_bytes(seed, "little") >> 1)

    def _add(self, amount: float, seed: int) -> None:
        """Noise from torch's generator, on the CPU: the same on both ends but for rounding."""
        generator = torch.Generator().manual_seed(seed)
        for p in self._parameters:
            noise = torch.randn(p.local.shape, generator=generator)
            p.local.add_(noise.to(p.local.device) * (amount * self._noise * self._clip))
