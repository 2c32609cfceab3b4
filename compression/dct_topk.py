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
from typing import Final

import torch
from torch import Tensor

from thinwire.compression import dct
from thinwire.compression.base import Field, Packed, Part, Turn
from thinwire.compression.bits import n_bytes, pack_bits, unpack_bits
from thinwire.compression.errors import BadPayload
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.reduce import VALUE_LIMIT, l1_norm, mean_weights

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

    position_E: Tensor  # int64: group * group_size + index
    value_E: Tensor  # float32, exact
    offsets: list[int]  # G + 1 of them


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
        scales, codes = packed
        with exact_arithmetic():
            self._check_scales(scales)
            n_codes = int(self._kept(scales, part).sum())
            if codes.shape != (n_bytes(n_codes, self.width),):
                raise BadPayload("shape", f"{tuple(codes.shape)} bytes for {n_codes} coefficients")
            self._check_codes(scales, codes, part)

    def _check_scales(self, scales: Tensor) -> None:
        if not bool(scales.isfinite().all()):
            raise BadPayload("nan", "scale")
        if bool((scales.view(torch.int16) < 0).any()) or not bool((scales < VALUE_LIMIT).all()):
            raise BadPayload("range", "scale is negative or not below 2^60")

    def _check_codes(self, scales: Tensor, codes: Tensor, part: Part) -> None:
        kept_G = self._kept(scales, part)
        n_codes = int(kept_G.sum())
        code_E = unpack_bits(codes, self.width, n_codes)
        if n_codes * self.width % 8 and int(codes[-1]) >> (n_codes * self.width % 8):
            raise BadPayload("range", "padding bits are set")
        index_E = code_E & ((1 << self.index_bits) - 1)
        limit_G = torch.full_like(kept_G, self.group_size)
        for slab in self._slabs(part.n_global):
            limit_G[slab.first : slab.last] = slab.n_coefficients
        position_E = self._group_starts(kept_G) + index_E
        if bool((index_E >= limit_G.repeat_interleave(kept_G)).any()):
            raise BadPayload("index", "past the end of a group")
        if bool((position_E[1:] <= position_E[:-1]).any()):
            raise BadPayload("index", "repeated or out of order")
        if self.bits == 8 and bool((code_E >> self.index_bits == 128).any()):
            raise BadPayload("range", "value -128")

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the coefficients in order, then the integer transform, group by group."""
        rounded, inverse = mean_weights(weights)
        with exact_arithmetic():
            shares = [self._entries(p, part) for p in packs]
            out = torch.zeros(part.n_local, dtype=torch.float32, device=packs[0][0].device)
            for slab in self._slabs(part.n_global, part.start, part.stop):
                mean_GC = self._mean(shares, rounded, slab, out.device).mul_(inverse)
                values = dct.inverse_exact(mean_GC)[:, : slab.length].reshape(-1)
                start = slab.first * self.group_size
                a, b = max(start, part.start), min(start + values.numel(), part.stop)
                out[a - part.start : b - part.start] = values[a - start : b - start]
        return out

    def _mean(
        self, shares: Sequence[Entries], weights: Sequence[float], slab: Slab, device: torch.device
    ) -> Tensor:
        """The sum of weight * value over the shares in order: float32 (groups, coefficients)."""
        shape = (slab.last - slab.first, slab.n_coefficients)
        flat = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=device)
        for share, w in zip(shares, weights, strict=True):
            here = slice(share.offsets[slab.first], share.offsets[slab.last])
            position = share.position_E[here] - slab.first * self.group_size
            # A share has no position twice: reading, adding and writing back has one order only.
            flat[position] = flat[position] + share.value_E[here] * w
        return flat.view(shape)

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's coefficients, whatever the part."""
        with exact_arithmetic():
            return l1_norm(self._entries(packed, part).value_E)

    # ------------------------------------------------------------------------------- layout

    def _entries(self, packed: Packed, part: Part) -> Entries:
        scales, codes = packed
        kept_G = self._kept(scales, part)
        offsets = [0, *kept_G.cumsum(0).tolist()]
        code_E = unpack_bits(codes, self.width, offsets[-1])
        raw_E = code_E >> self.index_bits
        signed_E = 1 - 2 * raw_E if self.bits == 1 else (raw_E ^ 128) - 128
        value_E = signed_E.float() * scales.float().repeat_interleave(kept_G)
        position_E = self._group_starts(kept_G) + (code_E & ((1 << self.index_bits) - 1))
        return Entries(position_E, value_E, offsets)

    def _group_starts(self, kept_G: Tensor) -> Tensor:
        """First coefficient position of each entry's group."""
        starts_G = torch.arange(kept_G.numel(), device=kept_G.device) * self.group_size
        return starts_G.repeat_interleave(kept_G)

    def _kept(self, scales: Tensor, part: Part) -> Tensor:
        """int64 (G,): how many coefficients each group sends."""
        kept_G = torch.zeros(scales.numel(), dtype=torch.int64, device=scales.device)
        for slab in self._slabs(part.n_global):
            kept_G[slab.first : slab.last] = slab.k
        return kept_G * (scales != 0)

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
