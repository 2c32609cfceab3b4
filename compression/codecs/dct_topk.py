"""DeMo's compressor: the largest cosine coefficients of each group (Peng et al. 2024, arXiv 2411.19870).

    flat    the parameter is flattened and cut into groups of `group_size` elements, a group into chunks of 64
            elements, each of which is transformed; the last chunk is filled up with zeros. Of n elements in a
            last, shorter group ceil(k n / group_size) coefficients are sent.
    tiles   the parameter as a matrix (codecs/tiles.py), cut into square tiles of `group_size` elements,
            each of which is transformed along both axes, as in DeMo's program. Parameters that are narrower
            than a tile are laid flat.

codecs/sparse.py has the format and its bytes: with packed indices 13 or 20 bits per coefficient for
values of 1 or 8 bits and groups of 4096.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Final, Literal

from torch import Tensor

from ..numerics import dct
from .sparse import Sparse
from .tiles import Tiles

_TILES: Final = tuple(n * n for n in dct.SIDES)


@dataclass(frozen=True, slots=True)
class DctTopK(Sparse):
    """k of the cosine coefficients of every `group_size` elements. `layout`: "flat" or "tiles"."""

    layout: Literal["flat", "tiles"] = "flat"
    """Chunks of the flattened parameter, or square tiles of it as a matrix, as in DeMo's program."""

    transforms = True

    def __post_init__(self) -> None:
        Sparse.__post_init__(self)
        if self.layout not in ("flat", "tiles"):
            raise ValueError(f"layout {self.layout!r}: flat or tiles")
        if self.layout == "tiles" and self.group_size not in _TILES:
            raise ValueError(f"group_size {self.group_size}: one of {', '.join(map(str, _TILES))} with tiles")

    @property
    def tile_side(self) -> int:
        return isqrt(self.group_size) if self.layout == "tiles" else 0

    def forward(self, groups_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        if isinstance(groups := self.pack_layout.groups(shape), Tiles):
            return dct.forward_2d(groups_GC, groups.side)
        return dct.forward(groups_GC)

    def inverse(self, mean_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        if isinstance(groups := self.pack_layout.groups(shape), Tiles):
            return dct.inverse_exact_2d(mean_GC, groups.side)
        return dct.inverse_exact(mean_GC)
