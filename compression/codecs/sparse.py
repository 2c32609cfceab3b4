"""What compressors share that send the k largest coefficients of each group of a parameter.

A pack has the scales of all groups and the codes of the coefficients that were sent (codecs/sparse_codec.py).
With G groups that send E coefficients in all it has 2 G bytes and what `indices` needs for E:

    packed   ceil(E (index bits + value bits) / 8)
    rice     ceil(E (r + value bits) / 8) + ceil((E + sum of gap >> r) / 8)

A zero group sends nothing. Ties go to the lower index.

The k largest are found by a threshold: the k-th largest magnitude, of which equal ones count from the lower
index on. What is above it, and as many equal ones as are missing, is sent. The kernels look for the threshold
by bisection over the bits of the magnitudes, which as integers are in the order of the values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base import (
    Change,
    Compressor,
    Entries,
    Field,
    Packed,
    Part,
    Payload,
    PendingPacks,
    Reduce,
    Senders,
    Source,
    Step,
    Target,
    Turn,
    refuse_part,
)
from ..exact import exact_arithmetic, power
from ..kernels import kernels_on, use_numba
from ..numerics.dct import N
from ..numerics.index_layout import IndexFormat, index_layout
from ..numerics.reduce import counted_l1_norms, l1_norm, mean_weights
from ..numerics.value_formats import Bits, check_sendable, format_of
from ..numerics.values import quantize
from ..rows import joined
from .sparse_codec import check_pack, read_pack, strongest_groups, write_pack
from .sparse_dispatch import (
    check_all,
    fused_send,
    fused_update,
    gpu_packs,
    has_fused_send,
    mean_on_cpu,
    mean_over_senders,
    pack_many,
    plain_row,
    select_on_cpu,
    send,
)
from .sparse_layout import SparseLayout, group_ranges, n_coefficients, shapes_of
from .tiles import Tiles

Array = npt.NDArray[Any]

MAX_GROUP: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Sparse(Compressor):
    """k of the coefficients of every `group_size` elements; see the module's docstring.

    Subclasses transform groups there and back. Values are below 2^67.
    """

    k: int = 32
    """Coefficients sent of every group, from 1 to group_size."""
    group_size: int = 4096
    """Elements of a group."""
    bits: Bits = 1
    """Of a coefficient: 1 is its sign."""
    indices: IndexFormat = "packed"
    """How positions are written: all of one length, or shorter by about a third (rice)."""

    selects_its_own: ClassVar[bool] = True
    transforms: ClassVar[bool] = False
    """Whether what is sent are cosine coefficients; else the elements themselves."""

    def __post_init__(self) -> None:
        """Raises ValueError, in words for the user."""
        if not 1 <= self.group_size <= MAX_GROUP:
            raise ValueError(f"group_size {self.group_size} is not in [1, {MAX_GROUP}]")
        if not 1 <= self.k <= self.group_size:
            raise ValueError(f"k {self.k} is not in [1, {self.group_size}]")
        _new_layout(self)  # refuses unknown formats

    @abstractmethod
    def forward(self, groups_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Coefficients of groups filled up with zeros: float32 (groups, coefficients). Local, inexact."""

    @abstractmethod
    def inverse(self, mean_GC: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Exact, within `exact_arithmetic`, never -0: what these coefficients stand for, same shape."""

    @property
    def tile_side(self) -> int:
        """Of square tiles that a parameter is cut into; 0: into flat groups."""
        return 0

    @property
    def pack_layout(self) -> SparseLayout:
        """What backends need to know."""
        return _layout_of(self)

    def fields(self, part: Part) -> tuple[Field, ...]:
        """A pack always is of the whole parameter, whatever the part that is decoded from it."""
        return self.pack_layout.of(part.shape).fields

    def n_sent(self, part: Part) -> int:
        return int(self.pack_layout.of(part.shape).most.k_G.sum())

    def moved_share(self, part: Part, n_packs: int) -> float:
        """If peers selected by chance: what any coefficient moves that one of them has sent. Of a flat group
        that is not full more is sent."""
        layout = self.pack_layout
        if isinstance(layout.groups(part.shape), Tiles):
            return 1.0 - power(1.0 - self.k / self.group_size, n_packs * self.group_size)
        most = layout.of(part.shape).most
        n_all = int(most.n_G.sum())
        unmoved = 1.0 - int(most.k_G.sum()) / n_all if n_all else 0.0
        return 1.0 - power(unmoved, n_packs * (min(N, self.group_size) if self.transforms else 1))

    # ------------------------------------------------------------------------------- pack: local

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        """Raises ValueError for a part of a parameter, and for values that are not finite or too large."""
        refuse_part(part)
        if gpu_packs(self.pack_layout, part, x):
            (packed,) = send(self.pack_layout, [plain_row(Source(part, x))]).packs()
            return packed
        scales: list[Tensor] = [torch.empty(0, dtype=torch.bfloat16)]
        indices: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        with torch.no_grad():
            for index_GK, value_GK in self.selected(x.detach(), part.shape):
                scale_G, code_E = quantize(value_GK, self.pack_layout.format)
                scales.append(scale_G.cpu())
                indices.append(index_GK[scale_G > 0].view(-1).cpu())
                codes.append(code_E.cpu())
        return write_pack(
            self.pack_layout, part.shape, torch.cat(scales), torch.cat(indices), torch.cat(codes)
        )

    def selected(self, x: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Which coefficients are sent, rising, and their values, both (groups, k), a few groups at a time.

        Raises ValueError for values that cannot be sent.
        """
        if use_numba(x):
            yield from select_on_cpu(self.pack_layout, x, shape)
            return
        groups = self.pack_layout.groups(shape)
        for slab in groups.slabs():
            coefficients_GC = self.forward(groups.read(x, slab), shape)
            check_sendable(coefficients_GC)
            yield largest(coefficients_GC, slab.k)

    def pack_many(self, sources: Iterable[Source], turn: Turn) -> list[Packed]:
        """Small ones together, where kernels can; on a GPU large ones, too."""
        return pack_many(self.pack_layout, sources, lambda source: self.pack(source.x, source.part, turn))

    def strongest(self, packed: Packed, part: Part, share: float) -> Packed:
        """This share of the groups, one at least: those with most in them."""
        return strongest_groups(self.pack_layout, packed, part.shape, share)

    def has_fused_send(self, sources: Sequence[tuple[Part, Tensor]]) -> bool:
        return has_fused_send(self.pack_layout, sources)

    def fused_send(self, sources: Sequence[Source], change: Change) -> PendingPacks:
        return fused_send(self.pack_layout, sources, change)

    # ------------------------------------------------------------------------------- check, decode: exact

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        check_pack(self.pack_layout, packed, part.shape)

    def check_all(self, payload: Payload, parts: Mapping[str, Part], turn: Turn) -> None:
        """In one call of a kernel, as long as nothing is wrong."""
        check_all(self.pack_layout, payload, parts, lambda packed, part: self.check(packed, part, turn))

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Weighted mean of the coefficients in order, then the inverse per group. On the CPU."""
        rounded, inverse = mean_weights(weights)
        out = torch.empty(part.n_local, dtype=torch.float32)
        if use_numba(out):
            from ..cpu import sparse_cpu

            sparse_cpu.decode(out, part.start, mean_on_cpu(self.pack_layout, packs, rounded, inverse, part))
            return out

        def mean(entries: Sequence[tuple[Array, Array]], n: int) -> Tensor:
            rows = [(at, value, w) for (at, value), w in zip(entries, rounded, strict=True)]
            return summed(rows, n).mul_(inverse)

        return self.decode_entries([self.entries(p, part) for p in packs], mean, part)

    def decode_senders(
        self,
        device: torch.device,
        packs: Sequence[Packed],
        weights: Sequence[float],
        senders: Senders,
        part: Part,
        turn: Turn,
    ) -> Tensor:
        rounded, _ = mean_weights(weights)
        if kernels_on(device) == "triton":
            out = torch.zeros(part.n_local, dtype=torch.float32, device=device)
            step = Step(scale=-1.0)  # 0 - (-1) x is x, and never -0
            self.fused_update(*_alone(out, part, packs, step), weights, turn, senders)
            return out
        out = torch.empty(part.n_local, dtype=torch.float32)
        if use_numba(out):
            from ..cpu import sparse_cpu

            mean_of = mean_over_senders(self.pack_layout, packs, rounded, senders, part)
            sparse_cpu.decode(out, part.start, mean_of)
            return out.to(device)

        def mean(entries: Sequence[tuple[Array, Array]], n: int) -> Tensor:
            of_each = zip(entries, rounded, senders.weights, strict=True)
            rows = [(at, value, w, whole) for (at, value), w, whole in of_each]
            sum_C = summed([(at, value, w) for at, value, w, _ in rows], n)
            of_senders_C = summed([(at, np.ones_like(value), whole) for at, value, _, whole in rows], n)
            return sum_C / of_senders_C.clamp(min=senders.least)

        return self.decode_entries([self.entries(p, part) for p in packs], mean, part).to(device)

    def decode_on(
        self, device: torch.device, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn
    ) -> Tensor:
        """There, where it has kernels."""
        if kernels_on(device) != "triton":
            return self.decode(packs, weights, part, turn).to(device)
        out = torch.zeros(part.n_local, dtype=torch.float32, device=device)
        step = Step(scale=-1.0)  # 0 - (-1) x is x, and never -0
        self.fused_update(*_alone(out, part, packs, step), weights, turn)
        return out

    def fused_update(
        self,
        targets: Sequence[Target],
        payloads: Sequence[Payload],
        weights: Sequence[float],
        turn: Turn,
        senders: Senders | None = None,
    ) -> None:
        """In one pass over the targets: on a GPU in one launch for all, on a CPU in one call for small
        ones."""
        others = fused_update(self.pack_layout, targets, payloads, *mean_weights(weights), senders)
        Compressor.fused_update(self, others, payloads, weights, turn, senders)

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        """Of the whole parameter's coefficients, whatever the part."""
        with exact_arithmetic():
            return l1_norm(torch.from_numpy(self.entries(packed, part).value_E))

    def magnitudes(
        self, payloads: Sequence[Payload], parts: Mapping[str, Part], turn: Turn
    ) -> list[list[float]]:
        """Of signs the scales say it all."""
        if self.bits != 1 or not payloads or not parts:
            return Compressor.magnitudes(self, payloads, parts, turn)
        ranges, names = group_ranges(self.pack_layout, shapes_of(parts)), list(parts)
        scale_SG = torch.stack([joined(payload, names, 0, 2) for payload in payloads])
        return counted_l1_norms(scale_SG.double().numpy(), ranges.k_G, ranges.first_P)

    def entries(self, packed: Packed, part: Part) -> Entries:
        return read_pack(self.pack_layout, packed, part.shape)

    def decode_entries(self, entries: Sequence[Entries], reduce: Reduce, part: Part) -> Tensor:
        """A few groups at a time: first `reduce`, then the inverse per group."""
        out = torch.empty(part.n_local, dtype=torch.float32)
        groups = self.pack_layout.groups(part.shape)
        with exact_arithmetic():
            for slab in groups.slabs(part.start, part.stop):
                before = slab.first * self.pack_layout.n_coefficients
                cuts = [slice(e.offsets[slab.first], e.offsets[slab.last]) for e in entries]
                here = [
                    (e.position_E[cut] - before, e.value_E[cut]) for e, cut in zip(entries, cuts, strict=True)
                ]
                reduced = reduce(here, slab.n_groups * slab.n_coefficients)
                mean_GC = reduced.view(slab.n_groups, slab.n_coefficients)
                groups.write(self.inverse(mean_GC, part.shape), slab, part, out)
        return out


def _alone(
    x: Tensor, part: Part, packs: Sequence[Packed], step: Step
) -> tuple[list[Target], list[dict[str, Packed]]]:
    """One target, and payloads that have nothing else."""
    return [Target(x, part, "", step)], [{"": packed} for packed in packs]


def summed(entries: Sequence[tuple[Array, Array, float]], n: int) -> Tensor:
    """float32 (n,): at every position the sum of value times weight, in the order of (positions, values,
    weight); 0 where there are none."""
    sum_C = np.zeros(n, dtype=np.float32)
    for position_E, value_E, w in entries:
        # Nobody has a position twice: reading, adding and writing back has one order only.
        sum_C[position_E] = sum_C[position_E] + value_E * np.float32(w)
    return torch.from_numpy(sum_C)


@lru_cache(maxsize=256)
def _layout_of(compressor: Sparse) -> SparseLayout:
    return _new_layout(compressor)


def _new_layout(compressor: Sparse) -> SparseLayout:
    """Raises ValueError for unknown formats."""
    c = compressor
    format_, n = format_of(c.bits), n_coefficients(c.group_size, c.transforms)
    indices = index_layout(c.indices, n, c.k, format_.width)
    return SparseLayout(c.k, c.group_size, format_, indices, c.transforms, c.tile_side)


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
