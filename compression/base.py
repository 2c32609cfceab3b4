"""The contract of compressors: tensors to few bytes and back (design: section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Packed = tuple[Tensor, ...]
"""What a compressor makes of one parameter: 1-d CPU tensors, as `Compressor.fields` describes them."""

Payload = dict[str, Packed]
"""Parameter name -> its packed tensors."""


@dataclass(frozen=True, slots=True)
class Part:
    """The slice of a flattened parameter that a rank holds: elements [start, stop) of prod(shape)."""

    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Part:
        return cls(tuple(shape), 0, prod(shape))

    @property
    def entire(self) -> Part:
        """The whole parameter that this is a part of."""
        return Part.whole(self.shape)

    @property
    def n_global(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    @property
    def n_local(self) -> int:
        """Elements of this part."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Turn:
    """What a round fixes for everybody. Seeds are unsigned 64-bit, `lr_factor` is a float32 value."""

    round: int
    shared_seed: int
    own_seed: int
    lr_factor: float


@dataclass(frozen=True, slots=True)
class Field:
    """One packed tensor as a receiver expects it: 1-d, `dtype`, at most `n_elements` long.

    `n_elements` is also the length that a sender normally uses: only other lengths cost header bytes.
    """

    dtype: torch.dtype
    n_elements: int


Fields = Mapping[str, tuple[Field, ...]]
"""Parameter name -> what is expected for it; drives the decoding of a payload."""


class Compressor(Protocol):
    """Packs one flattened parameter (or a rank's part of it) and decodes the mean of what peers packed.

    `turn.round` counts the rounds in which the parameter is sent: compressors that select by it come to every
    element that way.
    """

    def fields(self, part: Part) -> tuple[Field, ...]:
        """The packed tensors of this parameter as a receiver expects them, `n_elements` being the most."""
        ...

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Local, may be inexact. `x`: float32, 1-d, `part.n_local` long; not changed. Result on the CPU."""
        ...

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        """Raises `BadPayload` for anything that `decode` must not see; as exact as `decode`."""
        ...

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Exact: sum of w q over sum of w, in order. float32, 1-d, `part.n_local` long, never -0."""
        ...

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Sum of the absolute values that `packed` stands for: exact, in no order, the same on any device.

        Strategies without sign clip by it: `packed` was checked before.
        """
        ...
