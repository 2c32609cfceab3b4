"""Everything, nothing selected. As float32: for small models, tests and as a baseline. With fewer bits: what
Streaming DiLoCo sends of a pseudo-gradient (4 bits, arXiv 2501.18512)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from thinwire.compression.base import Field, Packed, Part, Turn
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.reduce import l1_norm, mean_weights
from thinwire.compression.rows import Float32Row, RowBits
from thinwire.compression.slicing import Slicing

_CHUNK: Final = 1 << 18  # elements at a time: the sum stays in the cache


@dataclass(frozen=True, slots=True)
class Dense:
    """32 bits: one float32 tensor with the part's elements, 4 bytes per element. |value| < 2^60.

    Fewer: a row of all n elements of the whole parameter (compression/rows.py), in
    2 ceil(n / group_size) + ceil(n bits / 8) bytes.
    """

    bits: RowBits = 32
    group_size: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        self._grouped()

    def _grouped(self) -> Slicing:
        """The same as a window over everything."""
        return Slicing(rate=1.0, bits=self.bits, group_size=self.group_size)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """With 32 bits a pack is of the part, with fewer of the whole parameter."""
        return (Field(torch.float32, part.n_local),) if self.bits == 32 else self._grouped().fields(part)

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """A copy on the CPU. Raises ValueError for values that `check` would refuse."""
        if self.bits != 32:
            return self._grouped().pack(x, part, turn)
        return Float32Row().pack([x.detach().to("cpu", torch.float32, copy=True)])

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        if self.bits != 32:
            self._grouped().check(packed, part, turn)
            return
        with exact_arithmetic():
            Float32Row().check(packed, part.n_local)

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        if self.bits != 32:
            return self._grouped().decode(packs, weights, part, turn)
        rounded, inverse = mean_weights(weights)
        out = torch.zeros_like(packs[0][0])
        with exact_arithmetic():
            for first in range(0, out.numel(), _CHUNK):
                mean = out[first : first + _CHUNK]
                for (values,), w in zip(packs, rounded, strict=True):
                    mean.add_(values[first : first + _CHUNK] * w)
                mean.mul_(inverse).add_(0.0)
        return out

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        if self.bits != 32:
            return self._grouped().magnitude(packed, part, turn)
        with exact_arithmetic():
            return l1_norm(packed[0])
