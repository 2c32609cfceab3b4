"""Who exchanges with whom, drawn from what the ledger says, and how well that mixes. Pure.

    ring         i with i - 1 and i + 1, in an order that follows from the peers' names
    exponential  i with i - 2^k and i + 2^k, k = round mod ceil(log2 n): log2 n rounds bring all to all
    random       pairs, others in every round
    complete     everybody with everybody
    file         who the run file says (`edges`), as far as both train now

Everybody draws the same graph. For methods that take one edge at a time (A2CiD2) a matching of it is drawn:
no peer has more than one partner in a round.

How well a graph mixes is said by two numbers (A2CiD2, arXiv 2306.08289), for edges that are taken at a rate:

    Lambda = sum over edges of rate (e_i - e_j)(e_i - e_j)^T
    chi1   = 1 / lambda_2(Lambda)                                      rounds to a consensus, without momentum
    chi2   = max over edges of 1/2 (e_i - e_j)^T Lambda^+ (e_i - e_j)  at most chi1; sqrt(chi1 chi2) with it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2
from typing import Final, Literal, TypeVar

import numpy as np
from blake3 import blake3

Topology = Literal["ring", "exponential", "random", "complete", "file"]

T = TypeVar("T")

Edge = tuple[int, int]
"""Places of two peers in the order of their names, the lower one first."""

FIXED: Final = frozenset(("ring", "complete", "file"))
"""The same edges in every round, while the same peers train."""

_DRAWS: Final = 64
"""Of matchings, to know how often an edge is in one."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """See the module's docstring; both in rounds."""

    chi1: float
    chi2: float


def edges_of(topology: Topology, n_peers: int, round_: int, seed: int, degree: int = 1) -> list[Edge]:
    """The round's graph. `seed`: the round's, the same for all; `degree`: partners of a peer in "random", at
    most."""
    n = n_peers
    if n < 2:
        return []
    if topology == "complete":
        return [(i, j) for i in range(n) for j in range(i + 1, n)]
    if topology == "random":
        return sorted({edge for k in range(degree) for edge in _pairs(_shuffled(range(n), seed, k))})
    step = 1 if topology == "ring" else 2 ** (round_ % max(1, ceil(log2(n))))
    return sorted({_edge(i, (i + step) % n) for i in range(n) if (i + step) % n != i})


def matching_of(edges: Sequence[Edge], seed: int) -> list[Edge]:
    """Those of which no two have a peer in common, and none could be added. `seed`: as of `edges_of`."""
    taken: set[int] = set()
    found = []
    for i, j in _shuffled(edges, seed, 0):
        if i not in taken and j not in taken:
            taken |= {i, j}
            found.append((i, j))
    return sorted(found)


def mixing_weight(edges: Sequence[Edge], i: int, j: int) -> float:
    """Metropolis: symmetric, and the weights of a peer and its neighbours make up one."""
    degrees = [sum(peer in edge for edge in edges) for peer in (i, j)]
    return 1.0 / (1 + max(degrees))


@lru_cache(maxsize=64)
def matching_spectrum(edges: tuple[Edge, ...], n_peers: int) -> Spectrum:
    """Of matchings of these, one in a round."""
    n_taken = sum(len(matching_of(edges, r)) for r in range(_DRAWS))
    return spectrum(edges, n_peers, n_taken / (_DRAWS * max(1, len(edges))))


def spectrum(edges: Sequence[Edge], n_peers: int, rate: float) -> Spectrum:
    """Of a graph whose edges are all taken `rate` times in a round; where it is in pieces, of the worst."""
    if not edges:
        return Spectrum(1.0, 1.0)
    laplacian = np.zeros((n_peers, n_peers))
    for i, j in edges:
        laplacian[[i, j], [i, j]] += rate
        laplacian[[i, j], [j, i]] -= rate
    inverse = np.linalg.pinv(laplacian)
    resistances = [inverse[i, i] + inverse[j, j] - 2 * inverse[i, j] for i, j in edges]
    lambdas = np.linalg.eigvalsh(laplacian)
    slowest = min(x for x in lambdas if x > 1e-9 * lambdas[-1])  # zero once for each piece
    return Spectrum(chi1=float(1 / slowest), chi2=float(max(resistances) / 2))


def union_of(topology: Topology, n_peers: int) -> list[Edge]:
    """All edges that any round has; not of a "file"."""
    if topology in FIXED:
        return edges_of(topology, n_peers, 0, 0)
    if topology == "random":
        return edges_of("complete", n_peers, 0, 0)
    rounds = range(max(1, ceil(log2(max(2, n_peers)))))
    return sorted({edge for r in rounds for edge in edges_of(topology, n_peers, r, 0)})


def _edge(i: int, j: int) -> Edge:
    return (i, j) if i < j else (j, i)


def _pairs(order: Sequence[int]) -> list[Edge]:
    """The first with the second, the third with the fourth; of an odd number the last one stays alone."""
    return [_edge(i, j) for i, j in zip(order[::2], order[1::2], strict=False)]


def _shuffled(items: Sequence[T], seed: int, salt: int) -> list[T]:
    """In an order that is the same on every machine."""
    key = seed.to_bytes(8, "little") + salt.to_bytes(4, "little")
    return sorted(items, key=lambda item: blake3(key + repr(item).encode()).digest(16))
