"""Everything, as float32: no compression. For small models, tests and as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from thinwire.compression.base import Field, Packed, Part, Turn
from thinwire.compression.errors import BadPayload
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.reduce import VALUE_LIMIT, l1_norm, mean_weights

_CHUNK: Final = 1 << 18  # elements at a time: the sum stays in the cache


@dataclass(frozen=True, slots=True)
class Dense:
    """One float32 tensor with the part's elements: 4 bytes per element. |value| < 2^60."""

    def fields(self, part: Part) -> tuple[Field, ...]:
        return (Field(torch.float32, part.n_local),)

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """A copy on the CPU. Raises ValueError for values that `check` would refuse."""
        values = x.detach().to("cpu", torch.float32, copy=True)
        if not bool((values.abs() < VALUE_LIMIT).all()):
            raise ValueError("values to send are not finite, or not below 2^60")
        return (values,)

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        if len(packed) != 1 or packed[0].dtype != torch.float32 or packed[0].shape != (part.n_local,):
            raise BadPayload("shape", f"expected {part.n_local} float32 values")
        with exact_arithmetic():
            for values in torch.split(packed[0], _CHUNK):
                if not bool(values.isfinite().all()):
                    raise BadPayload("nan", "value")
                if not bool((values.abs() < VALUE_LIMIT).all()):
                    raise BadPayload("range", "value not below 2^60")

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
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
        with exact_arithmetic():
            return l1_norm(packed[0])
