"""Which backend does what a sparse compressor has to do, and how many parameters go into one call of a
kernel.

A call for each of many small parameters takes longer than their work. On a GPU all of them share launches, on
a CPU those of up to `batched_cpu.SMALL` elements share calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from ..base import Change, Packed, Part, Payload, PendingPacks, Senders, Source, Target
from ..kernels import kernels_for, kernels_on, use_numba
from ..numerics.value_formats import check_sendable
from .groups import SLAB
from .sparse_codec import read_pack
from .sparse_layout import SparseLayout
from .tiles import Tiles

if TYPE_CHECKING:
    from ..cpu.update_cpu import Mean

AT_ONCE: Final = 1 << 22
"""Elements that are packed together, about: what is made on the way to them is there at the same time."""

AT_ONCE_ON_GPU: Final = 1 << 28
"""The same on a GPU: sources may be made for the purpose."""


# ------------------------------------------------------------------------------------------- pack: local


def gpu_packs(layout: SparseLayout, part: Part, x: Tensor) -> bool:
    """Whether `send` takes this whole parameter."""
    if kernels_for(x) != "triton":
        return False
    from ..gpu import pack_triton

    return pack_triton.takes(layout, part.shape)


def send(layout: SparseLayout, sources: Sequence[Source], change: Change | None = None) -> PendingPacks:
    """Of one GPU, on which `gpu_packs`. Changes the sources if there is a change to make."""
    from ..gpu import pack_triton

    return pack_triton.Sent(layout, sources, change)


def has_fused_send(layout: SparseLayout, sources: Sequence[tuple[Part, Tensor]]) -> bool:
    """Whether `fused_send` takes these whole parameters."""
    numba = {device: kernels_on(device) == "numba" for device in {x.device for _, x in sources}}
    on_cpu = [part.shape for part, x in sources if numba[x.device]]
    if not all(numba[x.device] or gpu_packs(layout, part, x) for part, x in sources):
        return False
    if not on_cpu:
        return True
    from ..cpu import send_cpu

    return send_cpu.takes(layout, on_cpu)


def fused_send(layout: SparseLayout, sources: Sequence[Source], change: Change) -> PendingPacks:
    """Of one device, of parameters that `has_fused_send` takes."""
    if not use_numba(sources[0].x):
        return send(layout, sources, change)
    from ..cpu import send_cpu

    return send_cpu.Sent(layout, sources, change)


def plain_row(source: Source) -> Source:
    """The same in contiguous float32, as `send` reads it."""
    return Source(source.part, source.x.detach().float().contiguous())


def select_on_cpu(layout: SparseLayout, x: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Which coefficients are sent, rising, and their values, a few groups at a time. `x`: where numba takes
    it."""
    from ..cpu import sparse_cpu, tiles_cpu

    groups, row = layout.groups(shape), x.float().contiguous()
    for slab in groups.slabs(at_once=16 * SLAB):
        if isinstance(groups, Tiles):
            index_GK, value_GK, top = tiles_cpu.largest(row, groups, slab)
        else:
            first = slab.first * layout.group_size
            elements = row[first : first + slab.n_groups * slab.length]
            index_GK, value_GK, top = sparse_cpu.largest(elements, slab, layout.transforms)
        check_sendable(torch.tensor(top))
        yield index_GK, value_GK


def pack_many(
    layout: SparseLayout, sources: Iterable[Source], pack: Callable[[Source], Packed]
) -> list[Packed]:
    """`pack` of each, which is called where no kernel takes it together with others."""
    batches = _Batches(layout)
    alone = {i: pack(s) for i, s in enumerate(sources) if not batches.takes(i, s)}
    packs = alone | batches.finished()
    return [packs[i] for i in range(len(packs))]


class _Batches:
    """What kernels take together, by its number."""

    def __init__(self, layout: SparseLayout) -> None:
        self._layout = layout
        self._packs: dict[int, Packed] = {}
        self._small: dict[int, Source] = {}
        self._n_small = 0
        self._on_gpu: dict[int, Source] = {}
        self._n_on_gpu = 0
        self._device: torch.device | None = None  # of those on a GPU
        self._under_way: list[tuple[list[int], PendingPacks]] = []

    def takes(self, number: int, source: Source) -> bool:
        """False if it has to be packed alone."""
        if gpu_packs(self._layout, source.part, source.x):
            self._add_on_gpu(number, source)
            return True
        if self._is_small(source):
            self._small[number] = source
            self._n_small += source.x.numel()
            if self._n_small > AT_ONCE:
                self._pack_small()
            return True
        return False

    def finished(self) -> dict[int, Packed]:
        """The host waits for a GPU when the last launch is under way."""
        self._pack_small()
        self._send()
        for numbers, pending in self._under_way:
            self._packs.update(zip(numbers, pending.packs(), strict=True))
        return self._packs

    def _add_on_gpu(self, number: int, source: Source) -> None:
        if self._device != source.x.device:
            self._send()
            self._device = source.x.device
        self._on_gpu[number] = plain_row(source)
        self._n_on_gpu += source.x.numel()
        if self._n_on_gpu > AT_ONCE_ON_GPU:
            self._send()

    def _send(self) -> None:
        if self._on_gpu:
            self._under_way.append(([*self._on_gpu], send(self._layout, [*self._on_gpu.values()])))
            self._on_gpu, self._n_on_gpu = {}, 0

    def _is_small(self, source: Source) -> bool:
        x = source.x
        if x.dtype != torch.float32 or not x.is_contiguous() or not x.numel() or not use_numba(x):
            return False
        from ..cpu import batched_cpu

        return batched_cpu.takes(self._layout, source.part.shape)

    def _pack_small(self) -> None:
        if self._small:
            from ..cpu import batched_cpu

            small = [*self._small.values()]
            packs = batched_cpu.pack(self._layout, [s.x for s in small], [s.part.shape for s in small])
            self._packs.update(zip(self._small, packs, strict=True))
            self._small, self._n_small = {}, 0


# ------------------------------------------------------------------------------------- check, decode: exact


def check_all(
    layout: SparseLayout,
    payload: Payload,
    parts: Mapping[str, Part],
    check: Callable[[Packed, Part], None],
) -> None:
    """`check` of each in order, which says what is wrong: one call of a kernel says whether anything is."""
    if parts and kernels_on(torch.device("cpu")) == "numba":
        from ..cpu import entries_cpu

        if entries_cpu.takes(layout) and entries_cpu.all_good(layout, payload, parts):
            return
    for name, part in parts.items():
        check(payload[name], part)


def mean_on_cpu(
    layout: SparseLayout, packs: Sequence[Packed], weights: Sequence[float], inverse: float, part: Part
) -> Mean:
    """What numba kernels read of the packs. `weights` and `inverse`: of `mean_weights`."""
    from ..cpu import entries_cpu, sparse_cpu
    from ..cpu.update_cpu import Mean

    if entries_cpu.takes(layout):
        entries = entries_cpu.read(layout, packs, part.shape)
    else:
        entries = sparse_cpu.joined([read_pack(layout, p, part.shape) for p in packs])
    return Mean(
        *entries,
        weight_W=np.array(weights, dtype=np.float32),
        inverse=np.float32(inverse),
        n=part.n_global,
        size=layout.group_size,
        n_coefficients=layout.n_coefficients,
        transforms=layout.transforms,
        tiles=groups if isinstance(groups := layout.groups(part.shape), Tiles) else None,
    )


def mean_over_senders(
    layout: SparseLayout, packs: Sequence[Packed], weights: Sequence[float], senders: Senders, part: Part
) -> Mean:
    """The same of the means over senders: as one pack, in which every coefficient is its own mean."""
    from ..cpu.senders_cpu import merged

    return merged(mean_on_cpu(layout, packs, weights, 1.0, part), senders)


def fused_update(
    layout: SparseLayout,
    targets: Sequence[Target],
    payloads: Sequence[Payload],
    weights: list[float],
    inverse: float,
    senders: Senders | None = None,
) -> list[Target]:
    """Takes the steps that there are kernels for, and returns the others. `senders`: of means over those."""
    on_gpu: dict[torch.device, list[Target]] = {}
    on_cpu: list[Target] = []
    others: list[Target] = []
    for t in targets:
        match kernels_for(t.x):
            case "triton":
                on_gpu.setdefault(t.x.device, []).append(t)
            case "numba":
                on_cpu.append(t)
            case "torch":
                others.append(t)
    for some in on_gpu.values():
        from ..gpu import sparse_triton

        sparse_triton.fused_update(layout, some, payloads, weights, inverse, senders)
    if on_cpu:
        _update_on_cpu(layout, on_cpu, payloads, weights, inverse, senders)
    return others


def _update_on_cpu(
    layout: SparseLayout,
    targets: Sequence[Target],
    payloads: Sequence[Payload],
    weights: list[float],
    inverse: float,
    senders: Senders | None,
) -> None:
    """Small ones in one call."""
    from ..cpu import batched_cpu, sparse_cpu

    small = []
    for t in targets:
        if batched_cpu.takes(layout, t.part.shape):
            small.append(t)
        else:
            packs = [payload[t.name] for payload in payloads]
            mean = (
                mean_on_cpu(layout, packs, weights, inverse, t.part)
                if senders is None
                else mean_over_senders(layout, packs, weights, senders, t.part)
            )
            sparse_cpu.fused_update(t.x, t.part.start, mean, t.step)
    if small:
        batched_cpu.fused_update(layout, small, payloads, weights, inverse, senders)
