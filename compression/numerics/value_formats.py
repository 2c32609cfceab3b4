"""Formats of values: every group of float32 values becomes one bfloat16 scale and a few bits per value.

    bits     code                                       value                   scale
    1        set: negative                              +-scale                 mean |x|
    2        bit 0: twice as large; bit 1: negative     +-scale, +-2 scale      least squares
    4, 8     q, two's complement, without the lowest    q * scale               largest / 7 or 127, rounded up
    "e3m0"   4: bits 0 to 2: e, bit 3: negative         0 or +-2^(e-7) scale    3/4 of the largest, rounded up
    16       float16 h, |h| <= 2                        h * scale               the largest's power of two

A group whose scale is 0 has no codes. -0 has no code, so that a value has one form only. A scale has 8 bits
and a code at most 11: every product is exact, except below 2^-126, where it is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BadPayload

Array = npt.NDArray[Any]


Bits = Literal[1, 2, 4, 8, 16, "e3m0"]
"""How a value travels; see the module's docstring."""


VALUE_LIMIT: Final = 2.0**60
"""Every value in a payload is below this: weighted sums over all peers stay finite."""


SCALE_LIMIT_BITS: Final = (127 + 60) << 7
"""bfloat16 of VALUE_LIMIT."""

_LLOYD_STEPS: Final = 8


class Format(Protocol):
    """One way to write the values of a group. G groups of K values; E codes of any groups."""

    @property
    def width(self) -> int:
        """Bits of a code."""
        ...

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        """bfloat16 (G,), local: from the absolute values, finite float32 below 2^59."""
        ...

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        """int64 (G, K), local; anything for groups with scale 0. `scale_GK`: float32, may be expanded."""
        ...

    def refusal(self, code_E: Array) -> str | None:
        """What is wrong with codes that come from elsewhere."""
        ...

    def scale_refusal(self, scale_bits_G: Array) -> str | None:
        """What is wrong with these bits of bfloat16 scales, beyond what `check_scales` refuses anyway."""
        ...

    def read(self, code_E: Array, scale_E: Array) -> Array:
        """Exact: float32 values of good codes."""
        ...


def format_of(bits: object) -> Format:
    """Raises ValueError, in words for the user, for what is no format."""
    if isinstance(bits, bool) or not isinstance(bits, int | str) or bits not in FORMATS:
        raise ValueError(f"bits {bits!r}: one of {', '.join(map(str, FORMATS))}")
    return FORMATS[bits]


def check_sendable(values: Tensor) -> None:
    """Raises ValueError for values that are not finite or not below 2^59: `check` would refuse them."""
    if values.numel() and not bool(values.abs().amax() < VALUE_LIMIT / 2):  # NaN is not below it either
        raise ValueError("values to send are not finite, or not below 2^59")


def check_scales(scales: Tensor, format_: Format) -> None:
    """Raises BadPayload unless every bfloat16 scale is one that `format_` makes."""
    scale_bits = scales.view(torch.int16).numpy().view(np.uint16)
    if bool((scale_bits & 0x7F80 == 0x7F80).any()):
        raise BadPayload("nan", "scale")
    if bool((scale_bits >= SCALE_LIMIT_BITS).any()):  # the sign bit is above all exponents
        raise BadPayload("range", "scale is negative or not below 2^60")
    if (wrong := format_.scale_refusal(scale_bits)) is not None:
        raise BadPayload("range", wrong)


def check_codes(code_E: Array, format_: Format) -> None:
    """Raises BadPayload for codes that stand for no value."""
    if (wrong := format_.refusal(code_E)) is not None:
        raise BadPayload("range", wrong)


class Table:
    """A format of few values: `levels[code]`, float32, is what a code says, times the scale; NaN: no such."""

    def __init__(self, levels: list[float]) -> None:
        self.levels = np.array(levels, dtype=np.float32)
        self.width = (len(levels) - 1).bit_length()
        self._all_good = not bool(np.isnan(self.levels).any())

    def refusal(self, code_E: Array) -> str | None:
        bad = not self._all_good and bool(np.isnan(self.levels[code_E]).any())
        return "a code without a value" if bad else None

    def scale_refusal(self, scale_bits_G: Array) -> str | None:
        return None

    def read(self, code_E: Array, scale_E: Array) -> Array:
        values: Array = self.levels[code_E] * scale_E
        return values


class _Sign(Table):
    def __init__(self) -> None:
        super().__init__([1.0, -1.0])

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        """float64, so that kernels find the same in any order."""
        return magnitude_GK.double().mean(dim=1).float().to(torch.bfloat16)

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        return (value_GK < 0).long()


class _TwoBits(Table):
    def __init__(self) -> None:
        super().__init__([1.0, 2.0, -1.0, -2.0])

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        """Lloyd's iteration: which values count twice, then the scale with the least squared error."""
        scale_G1 = magnitude_GK.mean(dim=1, keepdim=True)
        for _ in range(_LLOYD_STEPS):
            times_GK = 1.0 + (magnitude_GK > 1.5 * scale_G1)
            scale_G1 = (magnitude_GK * times_GK).mean(dim=1, keepdim=True) / times_GK.square().mean(
                dim=1, keepdim=True
            )
        return scale_G1[:, 0].to(torch.bfloat16)

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        return (value_GK.abs() > 1.5 * scale_GK).long() | (value_GK < 0).long() << 1


class _Linear(Table):
    def __init__(self, width: int) -> None:
        self.largest = (1 << width - 1) - 1
        up = [float(q) for q in range(self.largest + 1)]
        super().__init__([*up, float("nan"), *(-q for q in up[:0:-1])])

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        return _rounded_up(magnitude_GK.amax(dim=1) / self.largest)

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        q_GK = torch.round(value_GK / scale_GK).nan_to_num().clamp(-self.largest, self.largest)
        return q_GK.long() & (2 * self.largest + 1)


class _E3M0(Table):
    """4-bit floats without a mantissa, as Streaming DiLoCo sends them (arXiv 2501.18512)."""

    def __init__(self) -> None:
        up = [2.0 ** (e - 7) for e in range(1, 8)]
        super().__init__([0.0, *up, float("nan"), *(-x for x in up)])

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        return _rounded_up(magnitude_GK.amax(dim=1) * 0.75)  # a value of 3/4 to 3/2 scales counts as one

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        up = torch.from_numpy(self.levels[:8]).to(value_GK.device)
        e_GK = torch.bucketize((value_GK.abs() / scale_GK).nan_to_num(), (up[:-1] + up[1:]) / 2)
        return e_GK | ((value_GK < 0) & (e_GK > 0)).long() << 3


class _Half:
    """float16 relative to a power of two: a momentum of 3e-8 would underflow otherwise."""

    width = 16

    def scales(self, magnitude_GK: Tensor) -> Tensor:
        largest_G = magnitude_GK.amax(dim=1)
        return (largest_G.view(torch.int32) & 0x7F800000).view(torch.float32).to(torch.bfloat16)

    def codes(self, value_GK: Tensor, scale_GK: Tensor) -> Tensor:
        h_GK = (value_GK / scale_GK).to(torch.float16) + 0.0  # no -0
        return h_GK.view(torch.int16).long() & 0xFFFF

    def refusal(self, code_E: Array) -> str | None:
        if bool((code_E & 0x7FFF > 0x4000).any()):
            return "a float16 that is beyond 2, or no number"
        return "a float16 of -0" if bool((code_E == 0x8000).any()) else None

    def scale_refusal(self, scale_bits_G: Array) -> str | None:
        return "scale is not a power of two" if bool((scale_bits_G & 0x7F).any()) else None

    def read(self, code_E: Array, scale_E: Array) -> Array:
        values: Array = code_E.astype(np.uint16).view(np.float16).astype(np.float32) * scale_E
        return values


def _rounded_up(scale_G: Tensor) -> Tensor:
    """bfloat16 of positive float32 values, never smaller than they are."""
    return ((scale_G.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


FORMATS: Final[Mapping[int | str, Format]] = {
    1: _Sign(),
    2: _TwoBits(),
    4: _Linear(4),
    8: _Linear(8),
    16: _Half(),
    "e3m0": _E3M0(),
}
