"""Everything, nothing selected. As float32: for small models, tests and as a baseline. With fewer bits: what
Streaming DiLoCo sends of a pseudo-gradient (4 bits, arXiv 2501.18512)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..base import Compressor, Field, Moved, Packed, Part, Turn, refuse_part
from ..exact import exact_arithmetic
from ..numerics.reduce import l1_norm, mean_weights
from .dense_codec import DenseBits, DenseCodec, Float32Codec, GroupedCodec, dense_codec
from .slicing import Slicing
from .zstd import ZstdCodec

_CHUNK: Final = 1 << 18  # elements at a time: the sum stays in the cache


@dataclass(frozen=True, slots=True)
class Dense(Compressor):
    """All n elements of the parameter (codecs/dense_codec.py): with 32 bits one float32 tensor,
    4 n bytes, |value| < 2^60; with fewer 2 ceil(n / group_size) + ceil(n bits / 8) bytes.

    `zstd`: at most that, and 7% to 50% less (codecs/zstd.py has the figures), besides up to 11 bytes
    of framing for each parameter. The values are the same.
    """

    bits: DenseBits = 32
    """Of an element: 32 is float32 as it is."""
    group_size: int = 1024
    """Elements that share a scale."""
    zstd: bool = False
    """Compress the bytes once more; needs pip install 'thinwire[zstd]'."""

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        if not isinstance(self.zstd, bool):
            raise ValueError(f"zstd {self.zstd!r}: true or false")
        self._window()

    def __repr__(self) -> str:
        """States of earlier versions name their compressor like this."""
        zstd = ", zstd=True" if self.zstd else ""
        return f"Dense(bits={self.bits!r}, group_size={self.group_size!r}{zstd})"

    def _window(self) -> Slicing:
        """The same as a window over everything."""
        kind = _Squeezed if self.zstd else Slicing
        return kind(rate=1.0, bits=self.bits, group_size=self.group_size)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        return self._window().fields(part)

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that `check` would refuse."""
        if self.bits != 32 or self.zstd:
            return self._window().pack(x, part, turn)
        refuse_part(part)
        return Float32Codec().pack([x.detach().to("cpu", torch.float32, copy=True)])

    def takes_moved(self) -> bool:
        codec = self._window().codec
        return isinstance(codec, GroupedCodec) and codec.takes_moved()

    def send_moved(self, moved: Moved, decay: float) -> Packed:
        refuse_part(moved.part)
        codec = self._window().codec
        assert isinstance(codec, GroupedCodec)
        return codec.send_moved(moved, decay)

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        self._window().check(packed, part, turn)

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        if self.bits != 32 or self.zstd:
            return self._window().decode(packs, weights, part, turn)
        rounded, inverse = mean_weights(weights)
        out = torch.zeros(part.n_local)
        here = [values[part.start : part.stop] for (values,) in packs]
        with exact_arithmetic():
            for first in range(0, out.numel(), _CHUNK):
                mean = out[first : first + _CHUNK]
                for values, w in zip(here, rounded, strict=True):
                    mean.add_(values[first : first + _CHUNK] * w)
                mean.mul_(inverse).add_(0.0)
        return out

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's values, whatever the part."""
        if self.bits != 32 or self.zstd:
            return self._window().magnitude(packed, part, turn)
        with exact_arithmetic():
            return l1_norm(packed[0])


@dataclass(frozen=True, slots=True)
class _Squeezed(Slicing):
    @property
    def codec(self) -> DenseCodec:
        return ZstdCodec(dense_codec(self.bits, self.group_size))
