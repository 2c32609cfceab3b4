"""How packs of sparse compressors are laid out: all that their backends need to know of a compressor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base import Field, Part
from ..numerics.dct import N
from ..numerics.index_layout import IndexLayout, Most, RiceIndices
from ..numerics.value_formats import Format
from .groups import Flat
from .tiles import Tiles, matrix_of

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """Of every group of `group_size` elements k coefficients travel, as values of this format.

    `transforms`: they are cosine coefficients; else the elements themselves. `side`: of square tiles, which
    parameters are cut into that are wide enough; 0: all are laid flat.
    """

    k: int
    group_size: int
    format: Format
    indices: IndexLayout
    transforms: bool = False
    side: int = 0

    @property
    def n_coefficients(self) -> int:
        """Of a full group."""
        return n_coefficients(self.group_size, self.transforms)

    @property
    def index_bits(self) -> int:
        """Of an index as it is."""
        return (self.n_coefficients - 1).bit_length()

    def is_flat(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape is laid flat."""
        return not self.side or min(matrix_of(shape)) < self.side

    def groups(self, shape: tuple[int, ...]) -> Flat | Tiles:
        """How a parameter of this shape is cut."""
        if not self.is_flat(shape):
            return Tiles(*matrix_of(shape), self.side, self.k)
        return Flat(prod(shape), self.group_size, self.k, chunk=N if self.transforms else 1)

    def of(self, shape: tuple[int, ...]) -> GroupLayout:
        """Of a parameter of this shape."""
        return _group_layout(self, shape)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """What the G groups of a parameter may send."""

    start_G: Array  # int64: position of the first coefficient
    most: Most
    fields: tuple[Field, Field]  # of a pack, as `Compressor.fields` has them

    @property
    def n_groups(self) -> int:
        return len(self.start_G)

    @property
    def max_bytes(self) -> int:
        """Of the codes."""
        return self.fields[1].n_elements

    def n_sent(self, scales: Tensor) -> Array:
        """int64 (G,): how many coefficients each group sends; none where the scale is 0."""
        sent_G: Array = self.most.k_G * (scales.view(torch.int16).numpy() != 0)
        return sent_G


def n_coefficients(group_size: int, transforms: bool) -> int:
    """Of a full group: chunks of 64 are transformed, the last one filled up."""
    return -(-group_size // N) * N if transforms else group_size


@lru_cache(maxsize=4096)
def _group_layout(layout: SparseLayout, shape: tuple[int, ...]) -> GroupLayout:
    """A few bytes per group, kept because every round needs them."""
    slabs = list(layout.groups(shape).slabs())
    sizes = [s.n_groups for s in slabs]
    most = Most(
        k_G=np.array([s.k for s in slabs], dtype=np.int64).repeat(sizes),
        n_G=np.array([s.n_coefficients for s in slabs], dtype=np.int64).repeat(sizes),
    )
    start_G = np.arange(sum(sizes), dtype=np.int64) * layout.n_coefficients
    codes = Field(torch.uint8, layout.indices.max_bytes(most))
    return GroupLayout(start_G, most, (Field(torch.bfloat16, len(start_G)), codes))


def _max_unary(layout: SparseLayout, most: Most) -> int:
    return layout.indices.max_unary(most) if isinstance(layout.indices, RiceIndices) else 0


@dataclass(frozen=True, slots=True)
class GroupRanges:
    """Where the groups of P parameters are among all G, parameter by parameter."""

    n_P: Array  # int64: elements
    first_P: Array  # int64, P + 1: groups before each
    k_G: Array  # int64: how many each sends at most
    n_G: Array  # int64: of so many coefficients
    unary_P: Array  # int64: bytes of zeros and ones of each at most, with Rice codes
    byte_P: Array  # int64, P + 1: where the codes of each may begin
    layouts: tuple[GroupLayout, ...]


def shapes_of(parts: Mapping[str, Part]) -> tuple[tuple[int, ...], ...]:
    return tuple(part.shape for part in parts.values())


@lru_cache(maxsize=64)
def group_ranges(layout: SparseLayout, shapes: tuple[tuple[int, ...], ...]) -> GroupRanges:
    layouts = tuple(layout.of(shape) for shape in shapes)
    return GroupRanges(
        np.array([prod(shape) for shape in shapes], dtype=np.int64),
        np.cumsum([0, *(each.n_groups for each in layouts)]),
        np.concatenate([each.most.k_G for each in layouts]),
        np.concatenate([each.most.n_G for each in layouts]),
        np.array([_max_unary(layout, each.most) for each in layouts], dtype=np.int64),
        np.cumsum([0, *(each.max_bytes for each in layouts)]),
        layouts,
    )
