"""How a row of elements is cut into groups, and the groups into slabs that are worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor
from torch.nn.functional import pad

from ..base import Part

SLAB: Final = 1 << 18
"""Elements at a time: scratch of a few MB, whatever the parameter's size."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Groups [first, last) alike: `length` elements and `n_coefficients` each, of which `k` are sent."""

    first: int
    last: int
    length: int
    n_coefficients: int
    k: int

    @property
    def n_groups(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Flat:
    """n elements in groups of `size`, the last one shorter. A full group sends k, one of m elements
    ceil(k m / size). Each is filled up to a multiple of `chunk` coefficients.
    """

    n: int
    size: int
    k: int
    chunk: int = 1

    @property
    def n_groups(self) -> int:
        return -(-self.n // self.size)

    def slabs(self, start: int = 0, stop: int | None = None, at_once: int = SLAB) -> Iterator[Slab]:
        """The groups that overlap the elements [start, stop), equal ones together, `at_once` elements."""
        stop = self.n if stop is None else stop
        n_full = self.n // self.size
        first, last = start // self.size, -(-stop // self.size)
        step = max(1, at_once // self.size)
        for g in range(first, min(last, n_full), step):
            yield self._slab(g, min(g + step, last, n_full), self.size)
        if first <= n_full < last:
            yield self._slab(n_full, n_full + 1, self.n - n_full * self.size)

    def _slab(self, first: int, last: int, length: int) -> Slab:
        n_coefficients = -(-length // self.chunk) * self.chunk
        return Slab(first, last, length, n_coefficients, -(-self.k * length // self.size))

    def read(self, x: Tensor, slab: Slab) -> Tensor:
        """The slab's elements, float32 (groups, n_coefficients), filled up with zeros."""
        start = slab.first * self.size
        groups = x[start : start + slab.n_groups * slab.length].float().view(slab.n_groups, slab.length)
        return pad(groups, (0, slab.n_coefficients - slab.length))

    def write(self, values: Tensor, slab: Slab, part: Part, out: Tensor) -> None:
        """(groups, n_coefficients) to where they belong in `out`, which holds the elements of `part`."""
        row = values[:, : slab.length].reshape(-1)
        start = slab.first * self.size
        a, b = max(start, part.start), min(start + row.numel(), part.stop)
        out[a - part.start : b - part.start] = row[a - start : b - start]
