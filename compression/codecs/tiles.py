"""A matrix cut into square tiles: one tile is one group. Tiles at the lower and right edges are filled up.

Weights that are neighbours in a matrix, along both axes, have gradients alike: a transform along both puts
more of a tile into few coefficients than one along the flattened rows. Parameters of more axes are matrices
of their leading axes by the others, cut where that is squarest. A slab is a run of tiles of one row of tiles,
or several such rows, so that reading and writing is one permutation of axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.nn.functional import pad

from ..base import Part
from .groups import SLAB, Slab


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The parameter as a matrix, the squarest of those that its leading axes make; (1, n) below two axes."""
    splits = [(prod(shape[:i]), prod(shape[i:])) for i in range(1, len(shape))]
    return max(splits, key=min, default=(1, prod(shape)))


@dataclass(frozen=True, slots=True)
class Tiles:
    """A matrix in tiles of side x side, row of tiles by row of tiles. Each has side^2 coefficients.

    A full tile sends k, a tile with m elements of the matrix ceil(k m / side^2).
    """

    rows: int
    columns: int
    side: int
    k: int

    @property
    def n_wide(self) -> int:
        return -(-self.columns // self.side)

    @property
    def n_groups(self) -> int:
        return self.n_wide * -(-self.rows // self.side)

    def slabs(self, start: int = 0, stop: int | None = None, at_once: int = SLAB) -> Iterator[Slab]:
        """The tiles of the rows of tiles that overlap the flattened elements [start, stop), equal ones
        together, `at_once` elements."""
        stop = self.rows * self.columns if stop is None else stop
        tall = self.side * self.columns  # elements of a row of tiles
        first, last = start // tall, -(-stop // tall)
        n_full_high, n_full_wide = self.rows // self.side, self.columns // self.side
        step = max(1, at_once // self.side**2)
        if n_full_wide < self.n_wide or step < self.n_wide:
            for r in range(first, last):
                for c in range(0, n_full_wide, step):
                    yield self._slab(r, c, min(step, n_full_wide - c))
                if n_full_wide < self.n_wide:
                    yield self._slab(r, n_full_wide, 1)
            return
        step //= self.n_wide
        for r in range(first, min(last, n_full_high), step):
            yield self._slab(r, 0, (min(r + step, last, n_full_high) - r) * self.n_wide)
        if first <= n_full_high < last:
            yield self._slab(n_full_high, 0, self.n_wide)

    def _slab(self, r: int, c: int, n_tiles: int) -> Slab:
        """`n_tiles` tiles alike, from column c of row r of tiles on."""
        high = min(self.side, self.rows - r * self.side)
        wide = min(self.side, self.columns - c * self.side)
        first, size = r * self.n_wide + c, self.side**2
        return Slab(first, first + n_tiles, high * wide, size, -(-self.k * high * wide // size))

    def _block(self, slab: Slab) -> tuple[slice, slice, int, int]:
        """The rows and columns of the matrix that a slab covers, and how many tiles high and wide it is."""
        r, c = divmod(slab.first, self.n_wide)
        n_high = max(1, slab.n_groups // self.n_wide)
        n_wide = slab.n_groups // n_high
        rows = slice(r * self.side, min((r + n_high) * self.side, self.rows))
        return rows, slice(c * self.side, min((c + n_wide) * self.side, self.columns)), n_high, n_wide

    def read(self, x: Tensor, slab: Slab) -> Tensor:
        """The slab's tiles, float32 (tiles, side^2), each row by row, filled up with zeros."""
        rows, columns, n_high, n_wide = self._block(slab)
        block = x.view(self.rows, self.columns)[rows, columns].float()
        right, below = n_wide * self.side - block.shape[1], n_high * self.side - block.shape[0]
        tiles = pad(block, (0, right, 0, below)).view(n_high, self.side, n_wide, self.side)
        return tiles.permute(0, 2, 1, 3).reshape(slab.n_groups, self.side**2)

    def write(self, values: Tensor, slab: Slab, part: Part, out: Tensor) -> None:
        """(tiles, side^2) to where they belong in `out`, which holds the elements of `part`."""
        rows, columns, n_high, n_wide = self._block(slab)
        tiles = values.view(n_high, n_wide, self.side, self.side).permute(0, 2, 1, 3)
        block = tiles.reshape(n_high * self.side, n_wide * self.side)[:, : columns.stop - columns.start]
        if part == Part.whole(part.shape):
            out.view(self.rows, self.columns)[rows, columns] = block[: rows.stop - rows.start]
            return
        for row, line in zip(range(rows.start, rows.stop), block, strict=False):
            start = row * self.columns + columns.start
            a, b = max(start, part.start), min(start + line.numel(), part.stop)
            if a < b:
                out[a - part.start : b - part.start] = line[a - start : b - start]
