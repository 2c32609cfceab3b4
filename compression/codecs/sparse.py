"""What compressors share that send the k largest coefficients of each group of a parameter.

    scales   bfloat16, one per group; 0: this group sends nothing
    codes    uint8: which coefficients (numerics/indices.py) with which values (numerics/values.py)

With G groups that send E coefficients in all, a pack has 2 G bytes and what `indices` needs for E:

    packed   ceil(E (index bits + value bits) / 8)
    rice     ceil(E (r + value bits) / 8) + ceil((E + sum of gap >> r) / 8)

A zero group sends nothing. Ties go to the lower index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base import Field, Packed, Part, Turn
from ..errors import BadPayload
from ..exact import exact_arithmetic
from ..kernels import kernels_for, use_numba
from ..numerics.indices import IndexCoder, IndexFormat, Most, PackedIndices, coder_of
from ..numerics.reduce import l1_norm, mean_weights
from ..numerics.value_formats import Bits, Format, Table, check_codes, check_scales, check_sendable, format_of
from ..numerics.values import quantize
from .groups import SLAB, Flat, Slab
from .tiles import Tiles

if TYPE_CHECKING:
    from ..cpu import sparse_cpu
    from .fused_update import Step

Array = npt.NDArray[Any]

MAX_GROUP: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Entries:
    """What a pack says: E entries in order of position; group g has entries [offsets[g], offsets[g + 1])."""

    position_E: Array  # int64: group * coefficients of a full group + index
    value_E: Array  # float32, exact
    offsets: Array  # int64, G + 1 of them


@dataclass(frozen=True, slots=True)
class Layout:
    """What a group may send, for the G groups of a parameter."""

    start_G: Array  # int64: position of the first coefficient
    most: Most
    max_bytes: int  # of the codes

    @property
    def n_groups(self) -> int:
        return len(self.start_G)

    def n_sent(self, scales: Tensor) -> Array:
        """int64 (G,): how many coefficients each group sends."""
        sent_G: Array = self.most.k_G * (scales.view(torch.int16).numpy() != 0)
        return sent_G


@dataclass(frozen=True, slots=True)
class Sparse(ABC):
    """k of the coefficients of every `group_size` elements; see the module's docstring.

    Subclasses say how a parameter is cut into groups, and transform a slab of them there and back. Values are
    below 2^67.
    """

    k: int = 32
    group_size: int = 4096
    bits: Bits = 1
    indices: IndexFormat = "packed"

    transforms: ClassVar[bool] = False
    """Whether what is sent of flat groups are cosine coefficients; else the elements themselves."""

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        if not 1 <= self.group_size <= MAX_GROUP:
            raise ValueError(f"group_size {self.group_size} is not in [1, {MAX_GROUP}]")
        if not 1 <= self.k <= self.group_size:
            raise ValueError(f"k {self.k} is not in [1, {self.group_size}]")
        self.coder  # noqa: B018 (refuses unknown formats)

    @abstractmethod
    def groups(self, shape: tuple[int, ...]) -> Flat | Tiles:
        """How a parameter of this shape is cut."""

    @abstractmethod
    def forward(self, groups_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Coefficients of groups filled up with zeros: float32 (groups, coefficients). Local, inexact."""

    @abstractmethod
    def inverse(self, mean_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Exact, within `exact_arithmetic`, never -0: what these coefficients stand for, same shape."""

    @property
    def n_coefficients(self) -> int:
        """Of a full group."""
        return self.group_size

    @property
    def index_bits(self) -> int:
        """Of a packed index."""
        return (self.n_coefficients - 1).bit_length()

    @property
    def width(self) -> int:
        """Bits per coefficient with packed indices, without the scales."""
        return self.index_bits + self.format.width

    @property
    def format(self) -> Format:
        return format_of(self.bits)

    @property
    def coder(self) -> IndexCoder:
        return coder_of(self.indices, self.n_coefficients, self.k, self.format.width)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        layout = layout_of(self, part.shape)
        return Field(torch.bfloat16, layout.n_groups), Field(torch.uint8, layout.max_bytes)

    # ------------------------------------------------------------------------------- pack: local

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that are not finite or too large."""
        refuse_part(part)
        if kernels_for(x) == "triton":
            from ..gpu import pack_triton

            if pack_triton.takes(self, part.shape):
                row = x.detach().float().contiguous()
                (packed,) = pack_triton.Sent(self, [pack_triton.Source(part.shape, row)]).packs()
                return packed
        scales: list[Tensor] = [torch.empty(0, dtype=torch.bfloat16)]
        indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        with torch.no_grad():
            for index_GK, value_GK in self._selected(x.detach(), part.shape):
                scale_G, code_E = quantize(value_GK, self.format)
                scales.append(scale_G.cpu())
                indices.append(index_GK[scale_G > 0].view(-1).cpu())
                codes.append(code_E.cpu())
        all_scales = torch.cat(scales)
        layout = layout_of(self, part.shape)
        n_sent_G = layout.n_sent(all_scales)
        return all_scales, self.coder.pack(torch.cat(indices), torch.cat(codes), n_sent_G, layout.most)

    def _selected(self, x: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Which coefficients are sent, rising, and their values, a few groups at a time."""
        groups = self.groups(shape)
        if use_numba(x):
            from ..cpu import sparse_cpu, tiles_cpu

            row = x.float().contiguous()
            for slab in groups.slabs(at_once=16 * SLAB):
                if isinstance(groups, Tiles):
                    index_GK, value_GK, top = tiles_cpu.largest(row, groups, slab)
                else:
                    first = slab.first * self.group_size
                    elements = row[first : first + slab.n_groups * slab.length]
                    index_GK, value_GK, top = sparse_cpu.largest(elements, slab, self.transforms)
                check_sendable(torch.tensor(top))
                yield index_GK, value_GK
            return
        for slab in groups.slabs():
            coefficients_GC = self.forward(groups.read(x, slab), shape)
            check_sendable(coefficients_GC)
            yield largest(coefficients_GC, slab.k)

    def strongest(self, packed: Packed, part: Part, share: float) -> Packed:
        """Of what `pack` made only this share of the groups, one at least: those with most in them."""
        scales, codes = packed
        layout = layout_of(self, part.shape)
        n_sent_G = layout.n_sent(scales)
        entries = self.entries(packed, part)
        group_E = np.arange(layout.n_groups).repeat(n_sent_G)
        magnitude_G = np.bincount(group_E, np.abs(entries.value_E), layout.n_groups)
        n_kept = max(1, int(share * layout.n_groups))
        is_kept_G = np.zeros(layout.n_groups, dtype=bool)
        is_kept_G[np.argsort(-magnitude_G, kind="stable")[:n_kept]] = True
        fewer = torch.where(torch.from_numpy(is_kept_G), scales, torch.zeros_like(scales))
        index_E, code_E = self.coder.unpack(codes, n_sent_G, layout.most)
        kept_E = is_kept_G.repeat(n_sent_G)
        index, code = torch.from_numpy(index_E[kept_E]), torch.from_numpy(code_E[kept_E])
        return fewer, self.coder.pack(index, code, layout.n_sent(fewer), layout.most)

    # ------------------------------------------------------------------------------- check, decode: exact

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        layout = layout_of(self, part.shape)
        if [(t.dtype, t.dim()) for t in packed] != [(torch.bfloat16, 1), (torch.uint8, 1)]:
            raise BadPayload("shape", "expected bfloat16 scales and uint8 codes")
        scales, codes = packed
        if scales.numel() != layout.n_groups:
            raise BadPayload("shape", f"{scales.numel()} scales for {layout.n_groups} groups")
        check_scales(scales, self.format)
        n_sent_G = layout.n_sent(scales)
        index_E, code_E = self.coder.unpack(codes, n_sent_G, layout.most)
        if bool((index_E >= layout.most.n_G.repeat(n_sent_G)).any()):
            raise BadPayload("index", "past the end of a group")
        position_E = layout.start_G.repeat(n_sent_G) + index_E
        if bool((position_E[1:] <= position_E[:-1]).any()):
            raise BadPayload("index", "repeated or out of order")
        check_codes(code_E, self.format)

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the coefficients in order, then the inverse per group. On the CPU."""
        rounded, inverse = mean_weights(weights)
        out = torch.empty(part.n_local, dtype=torch.float32)
        if use_numba(out):
            from ..cpu import sparse_cpu

            sparse_cpu.decode(out, part.start, self._mean(packs, rounded, inverse, part.shape))
            return out
        shares = [self.entries(p, part) for p in packs]
        groups = self.groups(part.shape)
        with exact_arithmetic():
            for slab in groups.slabs(part.start, part.stop):
                mean_GC = torch.from_numpy(self._sum(shares, rounded, slab)).mul_(inverse)
                groups.write(self.inverse(mean_GC, part.shape), slab, part, out)
        return out

    def packs_at_once(self, shapes: Iterable[tuple[int, ...]], tensors: Iterable[Tensor]) -> bool:
        """Whether `pack_triton.Sent` takes all of these parameters."""
        if not all(kernels_for(t) == "triton" for t in tensors):
            return False
        from ..gpu import pack_triton

        return all(pack_triton.takes(self, shape) for shape in shapes)

    def has_kernel(self, target: Tensor) -> bool:
        """Whether `descend` can be used."""
        return kernels_for(target) != "torch"

    def descend(
        self, target: Tensor, packs: Sequence[Packed], weights: Sequence[float], part: Part, step: Step
    ) -> None:
        """See `descent.descend`."""
        if kernels_for(target) == "triton":
            from ..gpu import sparse_triton
            from .fused_update import Target

            sparse_triton.descend(self, [Target(target.detach(), part, packs, step)], weights)
            return
        from ..cpu import sparse_cpu

        sparse_cpu.descend(target, part.start, self._mean(packs, *mean_weights(weights), part.shape), step)

    def _mean(
        self, packs: Sequence[Packed], weights: Sequence[float], inverse: float, shape: tuple[int, ...]
    ) -> sparse_cpu.Mean:
        from ..cpu import sparse_cpu

        if isinstance(self.coder, PackedIndices) and isinstance(self.format, Table):
            k_G, levels = layout_of(self, shape).most.k_G, self.format.levels
            entries = sparse_cpu.read_packed(
                packs, k_G, self.index_bits, self.width, levels, self.n_coefficients
            )
        else:
            entries = sparse_cpu.joined([self.entries(p, Part.whole(shape)) for p in packs])
        return sparse_cpu.Mean(
            *entries,
            weight_W=np.array(weights, dtype=np.float32),
            inverse=np.float32(inverse),
            n=prod(shape),
            size=self.group_size,
            n_coefficients=self.n_coefficients,
            transforms=self.transforms,
            tiles=groups if isinstance(groups := self.groups(shape), Tiles) else None,
        )

    def _sum(self, shares: Sequence[Entries], weights: Sequence[float], slab: Slab) -> Array:
        """The sum of weight * value over the shares in order: float32 (groups, coefficients)."""
        shape = (slab.n_groups, slab.n_coefficients)
        sum_C = np.zeros(shape[0] * shape[1], dtype=np.float32)
        for share, w in zip(shares, weights, strict=True):
            here = slice(share.offsets[slab.first], share.offsets[slab.last])
            position_E = share.position_E[here] - slab.first * self.n_coefficients
            # A share has no position twice: reading, adding and writing back has one order only.
            sum_C[position_E] = sum_C[position_E] + share.value_E[here] * np.float32(w)
        return sum_C.reshape(shape)

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's coefficients, whatever the part."""
        with exact_arithmetic():
            return l1_norm(torch.from_numpy(self.entries(packed, part).value_E))

    def entries(self, packed: Packed, part: Part) -> Entries:
        """What a pack says that was checked."""
        scales, codes = packed
        layout = layout_of(self, part.shape)
        n_sent_G = layout.n_sent(scales)
        index_E, code_E = self.coder.unpack(codes, n_sent_G, layout.most)
        offsets = np.concatenate([[0], n_sent_G.cumsum()])
        if isinstance(self.format, Table) and use_numba(scales):
            from ..cpu import sparse_cpu

            found = index_E, code_E, offsets, scales.float().numpy(), self.format.levels
            return Entries(*sparse_cpu.spread(*found, self.n_coefficients), offsets)
        value_E = self.format.read(code_E, scales.float().numpy().repeat(n_sent_G))
        return Entries(layout.start_G.repeat(n_sent_G) + index_E, value_E, offsets)


def refuse_part(part: Part) -> None:
    """Raises ValueError unless the part is a whole parameter."""
    if part != Part.whole(part.shape):
        raise ValueError(f"packs whole parameters only, not [{part.start}, {part.stop}) of {part.shape}")


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
def layout_of(compressor: Sparse, shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter: a few bytes per group, kept because every round needs it."""
    slabs = list(compressor.groups(shape).slabs())
    sizes = [s.n_groups for s in slabs]
    most = Most(
        k_G=np.array([s.k for s in slabs], dtype=np.int64).repeat(sizes),
        n_G=np.array([s.n_coefficients for s in slabs], dtype=np.int64).repeat(sizes),
    )
    start_G = np.arange(sum(sizes), dtype=np.int64) * compressor.n_coefficients
    return Layout(start_G, most, compressor.coder.max_bytes(most))
