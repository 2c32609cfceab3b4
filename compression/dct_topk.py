"""DeMo's compressor: the largest cosine coefficients of each group (Peng et al. 2024, arXiv 2411.19870).

A parameter is flattened and cut into groups of `group_size` elements, a group into chunks of 64 elements; the
last chunk is filled up with zeros. Each chunk is transformed, and a group sends its k largest coefficients;
a shorter last group of n elements sends ceil(k n / group_size), a zero group none.

    scales   bfloat16, one per group; 0: this group sends nothing
    codes    uint8, `width` bits per coefficient: the index in the group's coefficients (12 bits for 4096),
             strictly increasing, and above it the value, 1 or 8 bits

    1 bit    a set bit is negative; value = sign * scale, scale = mean |coefficient| of those sent
    8 bits   q, two's complement, -127..127; value = q * scale, scale = largest / 127 rounded up
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.compression import dct
from thinwire.compression.base import Field, Packed, Part, Turn
from thinwire.compression.bits import n_bytes, pack_bits, unpack_bits
from thinwire.compression.errors import BadPayload
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.reduce import VALUE_LIMIT, l1_norm, mean_weights

Array = npt.NDArray[Any]

_SCALE_LIMIT_BITS: Final = (127 + 60) << 7  # bfloat16 of VALUE_LIMIT
_SLAB: Final = 1 << 18  # elements at a time: scratch of a few MB, whatever the parameter's size


@dataclass(frozen=True, slots=True)
class Slab:
    """Groups [first, last) of equal length; `n_coefficients` is in whole chunks, each sends `k`."""

    first: int
    last: int
    length: int
    n_coefficients: int
    k: int


@dataclass(frozen=True, slots=True)
class Entries:
    """What a pack says: E entries in order of position; group g has entries [offsets[g], offsets[g + 1])."""

    position_E: Array  # int64: group * group_size + index
    value_E: Array  # float32, exact
    offsets: Array  # int64, G + 1 of them


@dataclass(frozen=True, slots=True)
class Layout:
    """What a group may send, for the G groups of a parameter; int64."""

    start_G: Array  # position of the first coefficient
    n_coefficients_G: Array
    k_G: Array

    def n_sent(self, scales: Tensor) -> Array:
        """int64 (G,): how many coefficients each group sends."""
        sent_G: Array = self.k_G * (scales.view(torch.int16).numpy() != 0)
        return sent_G


@dataclass(frozen=True, slots=True)
class DctTopK:
    """k of every `group_size` cosine coefficients, with values of 1 or 8 bits.

    With G groups that send c coefficients in all, a pack has 2 G + ceil(c * width / 8) bytes;
    width = 13 or 20 for groups of 4096. Values are below 2^60 (scales; 8-bit values 127 times that).
    """

    k: int = 32
    group_size: int = 4096
    bits: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (1, 8):
            raise ValueError(f"bits {self.bits}: 1 or 8")
        if self.group_size % dct.N or not dct.N <= self.group_size <= 1 << 16:
            raise ValueError(f"group_size {self.group_size} is not a multiple of 64 in [64, 65536]")
        if not 1 <= self.k <= self.group_size:
            raise ValueError(f"k {self.k} is not in [1, {self.group_size}]")

    @property
    def index_bits(self) -> int:
        return (self.group_size - 1).bit_length()

    @property
    def width(self) -> int:
        """Bits per coefficient, without the scales."""
        return self.index_bits + self.bits

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        n_codes = sum(s.k * (s.last - s.first) for s in self._slabs(part.n_global))
        return (
            Field(torch.bfloat16, self._n_groups(part)),
            Field(torch.uint8, n_bytes(n_codes, self.width)),
        )

    # ------------------------------------------------------------------------------- pack: local

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that are not finite or too large."""
        if part != Part.whole(part.shape):
            raise ValueError(f"packs whole parameters only, not [{part.start}, {part.stop}) of {part.shape}")
        scales: list[Tensor] = [torch.empty(0, dtype=torch.bfloat16)]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        with torch.no_grad():
            for slab in self._slabs(part.n_global):
                scale_G, codes_E = self._pack_slab(x.detach(), slab)
                scales.append(scale_G.cpu())
                codes.append(codes_E.cpu())
        return torch.cat(scales), pack_bits(torch.cat(codes), self.width)

    def _pack_slab(self, x: Tensor, slab: Slab) -> tuple[Tensor, Tensor]:
        """Scales (G,) bfloat16 and codes (E,) int64 of the slab's groups."""
        n_groups = slab.last - slab.first
        start = slab.first * self.group_size
        groups_GL = x[start : start + n_groups * slab.length].float().view(n_groups, slab.length)
        padding = slab.n_coefficients - slab.length
        coefficients_GC = dct.forward(torch.nn.functional.pad(groups_GL, (0, padding)))
        if not bool(coefficients_GC.abs().amax() < VALUE_LIMIT / 2):  # NaN is not below it either
            raise ValueError("values to send are not finite, or not below 2^59")
        index_GK, value_GK = largest(coefficients_GC, slab.k)
        scale_G = self._scales(value_GK.abs())
        live_G = scale_G > 0
        if self.bits == 1:
            raw_GK = (value_GK < 0).long()
        else:
            q_GK = torch.round(value_GK / scale_G.float()[:, None]).nan_to_num().clamp(-127, 127)
            raw_GK = q_GK.long() & 255
        return scale_G, (raw_GK << self.index_bits | index_GK)[live_G].view(-1)

    def _scales(self, magnitude_GK: Tensor) -> Tensor:
        if self.bits == 1:
            return magnitude_GK.mean(dim=1).to(torch.bfloat16)
        exact_G = magnitude_GK.amax(dim=1) / 127
        return ((exact_G.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)

    # ------------------------------------------------------------------------------- check, decode: exact

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        n_groups = self._n_groups(part)
        if [t.dtype for t in packed] != [torch.bfloat16, torch.uint8] or packed[0].shape != (n_groups,):
            raise BadPayload("shape", f"expected {n_groups} bfloat16 scales and uint8 codes")
        scale_bits = packed[0].view(torch.int16).numpy().view(np.uint16)
        if bool((scale_bits & 0x7F80 == 0x7F80).any()):
            raise BadPayload("nan", "scale")
        if bool((scale_bits >= _SCALE_LIMIT_BITS).any()):  # the sign bit is above all exponents
            raise BadPayload("range", "scale is negative or not below 2^60")
        self._check_codes(packed, part)

    def _check_codes(self, packed: Packed, part: Part) -> None:
        scales, codes = packed
        layout = self._layout(part)
        n_sent_G = layout.n_sent(scales)
        n_codes = int(n_sent_G.sum())
        if codes.shape != (n_bytes(n_codes, self.width),):
            raise BadPayload("shape", f"{tuple(codes.shape)} bytes for {n_codes} coefficients")
        if n_codes * self.width % 8 and int(codes[-1]) >> n_codes * self.width % 8:
            raise BadPayload("range", "padding bits are set")
        index_E, raw_E = self._split(codes, n_codes)
        if bool((index_E >= layout.n_coefficients_G.repeat(n_sent_G)).any()):
            raise BadPayload("index", "past the end of a group")
        position_E = layout.start_G.repeat(n_sent_G) + index_E
        if bool((position_E[1:] <= position_E[:-1]).any()):
            raise BadPayload("index", "repeated or out of order")
        if self.bits == 8 and bool((raw_E == 128).any()):
            raise BadPayload("range", "value -128")

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the coefficients in order, then the integer transform per group. On the CPU."""
        rounded, inverse = mean_weights(weights)
        out = torch.zeros(part.n_local, dtype=torch.float32)
        shares = [self._entries(p, part) for p in packs]
        with exact_arithmetic():
            for slab in self._slabs(part.n_global, part.start, part.stop):
                mean_GC = torch.from_numpy(self._sum(shares, rounded, slab)).mul_(inverse)
                values = dct.inverse_exact(mean_GC)[:, : slab.length].reshape(-1)
                start = slab.first * self.group_size
                a, b = max(start, part.start), min(start + values.numel(), part.stop)
                out[a - part.start : b - part.start] = values[a - start : b - start]
        return out

    def _sum(self, shares: Sequence[Entries], weights: Sequence[float], slab: Slab) -> Array:
        """The sum of weight * value over the shares in order: float32 (groups, coefficients)."""
        shape = (slab.last - slab.first, slab.n_coefficients)
        sum_C = np.zeros(shape[0] * shape[1], dtype=np.float32)
        for share, w in zip(shares, weights, strict=True):
            here = slice(share.offsets[slab.first], share.offsets[slab.last])
            position_E = share.position_E[here] - slab.first * self.group_size
            # A share has no position twice: reading, adding and writing back has one order only.
            sum_C[position_E] = sum_C[position_E] + share.value_E[here] * np.float32(w)
        return sum_C.reshape(shape)

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's coefficients, whatever the part."""
        with exact_arithmetic():
            return l1_norm(torch.from_numpy(self._entries(packed, part).value_E))

    # ------------------------------------------------------------------------------- layout

    def _entries(self, packed: Packed, part: Part) -> Entries:
        """Of a pack that was checked. Every product of a scale (8 bits) and q (7 bits) is exact."""
        scales, codes = packed
        layout = self._layout(part)
        n_sent_G = layout.n_sent(scales)
        offsets = np.concatenate([[0], n_sent_G.cumsum()])
        index_E, raw_E = self._split(codes, int(offsets[-1]))
        signed_E = 1 - 2 * raw_E if self.bits == 1 else (raw_E ^ 128) - 128
        value_E = signed_E.astype(np.float32) * scales.float().numpy().repeat(n_sent_G)
        return Entries(layout.start_G.repeat(n_sent_G) + index_E, value_E, offsets)

    def _split(self, codes: Tensor, n_codes: int) -> tuple[Array, Array]:
        """Index and value bits of each coefficient, int64."""
        code_E = unpack_bits(codes, self.width, n_codes).numpy()
        return code_E & ((1 << self.index_bits) - 1), code_E >> self.index_bits

    def _layout(self, part: Part) -> Layout:
        return _layout_of(self, part.n_global)

    def _n_groups(self, part: Part) -> int:
        return -(-part.n_global // self.group_size)

    def _slabs(self, n: int, start: int = 0, stop: int | None = None) -> Iterator[Slab]:
        """The groups of a parameter of n elements that overlap [start, stop): equal ones together."""
        stop = n if stop is None else stop
        size, n_full = self.group_size, n // self.group_size
        first, last = start // size, -(-stop // size)
        step = max(1, _SLAB // size)
        for g in range(first, min(last, n_full), step):
            yield Slab(g, min(g + step, last, n_full), size, size, self.k)
        if first <= n_full < last:
            length = n - n_full * size
            n_chunks = -(-length // dct.N)
            yield Slab(n_full, n_full + 1, length, n_chunks * dct.N, -(-self.k * length // size))


def largest(values_GC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Per row the k largest by magnitude, ties to the lower index: rising int64 indices, and the values."""
    magnitude = values_GC.abs()
    threshold = magnitude.topk(k, dim=1).values[:, -1:]
    chosen = magnitude >= threshold
    if int(chosen.sum()) != k * len(chosen):
        above = magnitude > threshold
        ties = chosen & ~above
        chosen = above | (ties & (ties.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(-1, k)
    return index, values_GC.gather(1, index)


@lru_cache(maxsize=4096)
def _layout_of(compressor: DctTopK, n: int) -> Layout:
    """The layout of a parameter of n elements: a few bytes per group, kept because every round needs it."""
    slabs = list(compressor._slabs(n))
    sizes = [s.last - s.first for s in slabs]
    return Layout(
        start_G=np.arange(sum(sizes), dtype=np.int64) * compressor.group_size,
        n_coefficients_G=np.array([s.n_coefficients for s in slabs], dtype=np.int64).repeat(sizes),
        k_G=np.array([s.k for s in slabs], dtype=np.int64).repeat(sizes),
    )
