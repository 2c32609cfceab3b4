"""The largest elements of each group, without a transform, as SparseLoCo selects them (2025).

A parameter is flattened and cut into groups of `group_size` elements; the last group of n elements sends
ceil(k n / group_size). codecs/sparse.py has the format and its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..numerics.index_layout import IndexFormat
from .sparse import Sparse


@dataclass(frozen=True, slots=True)
class TopK(Sparse):
    """k of every `group_size` elements. `indices`: "rice" (about 8.5 bits at 32 of 4096) or "packed" (12)."""

    indices: IndexFormat = "rice"
    """How positions are written: all of one length, or shorter by about a third (rice)."""

    def forward(self, groups_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        return groups_GC

    def inverse(self, mean_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        return mean_GC.add_(0.0)
