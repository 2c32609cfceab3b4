"""Uneven data (`--split`): which pieces of each class a peer trains on. Pure, and the same for the same seed.

labels:K      every class is cut into shards, as many as suit its size, and every peer gets K of them: it sees
              K classes at most (McMahan et al. 2017, arXiv 1602.05629; here a shard has one class)
dirichlet:A   each class is dealt out in proportions from Dirichlet(A, ..., A): the smaller A, the more of it
              goes to few (Hsu et al. 2019, arXiv 1909.06335). Peers end with more and with fewer data.

No two peers have the same piece. Drawn again, at most `TRIES` times, until each peer has at least
1 / `LEAST_SHARE` of an equal share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ...compression.errors import ConfigError
from ..tasks.classes import Classes, Piece

SECTIONS: Final = 10
"""Of text that is dealt out by Dirichlet."""

LEAST_SHARE: Final = 10
TRIES: Final = 1000
MAX_CLASSES: Final = 64


@dataclass(frozen=True, slots=True)
class Split:
    kind: Literal["labels", "dirichlet"]
    value: float

    @classmethod
    def parse(cls, text: str) -> Split:
        """Raises ConfigError."""
        kind, _, value = text.partition(":")
        try:
            if kind == "labels" and 1 <= int(value) <= MAX_CLASSES:
                return cls("labels", int(value))
            if kind == "dirichlet" and 1e-3 <= float(value) <= 1e6:
                return cls("dirichlet", float(value))
        except ValueError:
            pass
        raise ConfigError(
            f"--split {text!r}: write it as labels:2 (classes that a peer sees, 1 to {MAX_CLASSES}) or "
            f"dirichlet:0.3 (the smaller the more uneven, 0.001 at least)"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}"

    def n_sections(self, n_peers: int) -> int:
        """Into how many classes text is cut."""
        return int(self.value) * n_peers if self.kind == "labels" else SECTIONS

    def pieces(self, sizes: Sequence[int], n_peers: int, seed: int) -> list[list[Piece]]:
        """Of each peer, by class. Raises ConfigError where these classes cannot be dealt out so."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        least = sum(sizes) / n_peers / LEAST_SHARE
        for _ in range(TRIES):
            dealt = self._dealt(sizes, n_peers, rng)
            if all(sum(p.size for p in pieces) >= least for pieces in dealt):
                return dealt
        raise ConfigError(
            f"--split {self}: in {TRIES} tries some peer always had less than a {LEAST_SHARE}th of its equal "
            f"share: take fewer peers, more classes or a larger number"
        )

    def _dealt(self, sizes: Sequence[int], n_peers: int, rng: np.random.Generator) -> list[list[Piece]]:
        if self.kind == "labels":
            return _shards(sizes, n_peers, int(self.value), rng)
        found: list[list[Piece]] = [[] for _ in range(n_peers)]
        for number, size in enumerate(sizes):
            shares = rng.dirichlet(np.full(n_peers, self.value))
            ends = [0, *(int(x) for x in np.floor(np.cumsum(shares)[:-1] * size)), size]
            for peer, (start, stop) in enumerate(pairwise(ends)):
                found[peer] += _unless_empty(Piece(number, start, stop))
        return found


def _shards(sizes: Sequence[int], n_peers: int, n_each: int, rng: np.random.Generator) -> list[list[Piece]]:
    """Shards lie class by class, the classes in a drawn order, and go round the peers, in a drawn order."""
    n_shards = n_peers * n_each
    if n_shards < len(sizes):
        raise ConfigError(
            f"--split labels:{n_each}: {n_peers} peers that see {n_each} classes each do not see all "
            f"{len(sizes)}: labels:{-(-len(sizes) // n_peers)} does, or --peers {-(-len(sizes) // n_each)}"
        )
    counts = _shards_of(sizes, n_shards)
    in_order: list[Piece] = []
    for number in rng.permutation(len(sizes)):
        ends = [sizes[number] * i // counts[number] for i in range(counts[number] + 1)]
        in_order += [Piece(int(number), a, b) for a, b in pairwise(ends)]
    found: list[list[Piece]] = [[] for _ in range(n_peers)]
    peers = rng.permutation(n_peers)
    for i, piece in enumerate(in_order):
        found[peers[i % n_peers]] += _unless_empty(piece)
    return found


def _shards_of(sizes: Sequence[int], n_shards: int) -> list[int]:
    """How many each class is cut into: one at least, the next one always to the class with the largest."""
    counts = [1] * len(sizes)
    for _ in range(n_shards - len(sizes)):
        largest = max(range(len(sizes)), key=lambda i: sizes[i] / counts[i])
        counts[largest] += 1
    return counts


def _unless_empty(piece: Piece) -> list[Piece]:
    return [piece] if piece.size else []


# ------------------------------------------------------------------------------------------- in words


def table(pieces: Sequence[Sequence[Piece]], n_classes: int) -> npt.NDArray[np.float64]:
    """How much each peer has of each class: peers x classes."""
    found = np.zeros((len(pieces), n_classes))
    for peer, some in enumerate(pieces):
        for piece in some:
            found[peer, piece.number] += piece.size
    return found


def unevenness(amounts: npt.NDArray[np.float64]) -> list[float]:
    """Of each peer: the total variation between its classes and those of all data; 0 where they are alike,
    near 1 where it has few of many."""
    of_all = amounts.sum(0) / amounts.sum()
    own = amounts / amounts.sum(1, keepdims=True)
    return [float(x) for x in np.abs(own - of_all).sum(1) / 2]


def told(split: Split, classes: Classes, pieces: Sequence[Sequence[Piece]]) -> str:
    """A line for people."""
    amounts = table(pieces, len(classes.sizes))
    apart = unevenness(amounts)
    n_seen = [int((row > 0.05 * row.sum()).sum()) for row in amounts]
    shares = amounts.sum(1) / amounts.sum()
    return (
        f"split {split}: {len(classes.sizes)} classes ({classes.names[0]}, ...) over {len(pieces)} peers. A "
        f"peer's classes differ from those of all data by {sum(apart) / len(apart):.2f} on average, "
        f"{max(apart):.2f} at most (total variation: 0 alike, 1 nothing in common); classes with more than "
        f"5% of its data: {', '.join(map(str, n_seen))}; {classes.unit} of all: "
        f"{', '.join(f'{share:.0%}' for share in shares)}"
    )
